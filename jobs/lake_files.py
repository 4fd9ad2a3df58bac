"""The files of a lake version in an object store, as DuckDB's Python interface takes a file system.

DuckDB reads stores through an extension that has to be downloaded; this needs none. What it asks most is answered from
the log: files never change and their sizes are known.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from sae.jobs import storage

_NEVER = datetime.fromtimestamp(0, UTC)


class LakeFiles(AbstractFileSystem):  # type: ignore[misc]
    """Reads paths of which the sizes in bytes are given."""

    protocol = ("s3", "gs", "az")
    cachable = False

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._sizes = sizes

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        """A seekable stream; raises FileNotFoundError for what is not of the version, or is not to be read."""
        if mode != "rb":
            raise PermissionError(f"{path}: the lake's files never change; give a local path to write to")
        return storage.open_object(path, self.size(path))

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
