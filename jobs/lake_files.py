"""The files of a lake version in an object store, as DuckDB's Python interface takes a file system.

DuckDB reads stores through an extension that has to be downloaded; this needs none. What it asks most is answered from
the log: files never change and their sizes are known.
"""

import io
from collections.abc import Mapping
from datetime import UTC, datetime
from threading import get_ident
from typing import Any

from fsspec import AbstractFileSystem

from sae.jobs import storage

_NEVER = datetime.fromtimestamp(0, UTC)


class LakeFile:
    """An object of which parts are read.

    Threads of DuckDB share it, and each goes to a position before it reads: the position is the thread's own.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size
        self._positions: dict[int, int] = {}

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._positions[get_ident()] = origin + offset
        return origin + offset

    def tell(self) -> int:
        return self._positions.get(get_ident(), 0)

    def read(self, n: int = -1) -> bytes:
        start = self.tell()
        stop = self._size if n < 0 else min(start + n, self._size)
        if stop <= start:
            return b""
        self._positions[get_ident()] = stop
        return storage.read_range(self._path, start, stop)

    def close(self) -> None:
        self._positions.clear()


class LakeFiles(AbstractFileSystem):  # type: ignore[misc]
    """Reads paths of which the sizes in bytes are given."""

    protocol = ("s3", "gs", "az")
    cachable = False

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._sizes = sizes

    def open(self, path: str, mode: str = "rb", **_: Any) -> "LakeFile":
        """Raises FileNotFoundError for what is not of the version, PermissionError for writing."""
        if mode != "rb":
            raise PermissionError(f"{path}: the lake's files never change; give a local path to write to")
        return LakeFile(path, self.size(path))

    def size(self, path: str) -> int:
        """In bytes."""
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return self._sizes[path]

    def exists(self, path: str, **_: Any) -> bool:
        return path in self._sizes

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: the views name every file."""
        return [path] if path in self._sizes else []

    def modified(self, path: str) -> datetime:
        """Always the same, so that DuckDB keeps what it has read."""
        return _NEVER
