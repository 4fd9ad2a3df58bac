"""Files of object stores that are fetched once: a copy on this machine, checked each time that it is used.

They lie in $SAE_CACHE/pretrained (~/.cache/sae where SAE_CACHE is not set) as the store has them; beside each is a note
of its size, its SHA-256 and the store's version. A copy is not compared with the store again: delete it to fetch anew.
"""

import hashlib
import json
import os
import urllib.parse
from typing import Any, BinaryIO, Final

from sae.jobs import progress, storage
from sae.schemas.errors import StorageError

_PART: Final = 8 << 20
_MB: Final = 1_000_000
_ABSENT: Final = "not in the cache"


def is_offline() -> bool:
    """Whether SAE_OFFLINE says that no store may be asked."""
    return os.environ.get("SAE_OFFLINE", "").lower() not in ("", "0", "false")


def fetched(path: str, offline: bool = False) -> str:
    """The local path of a file's contents: a local file's own, or that of a whole and unchanged copy.

    With `offline`, or SAE_OFFLINE=1, only copies that are there are used.

    Raises:
        StorageError: there is no such file, none may be fetched, or what came is not what the store said.
    """
    if storage.is_local(path):
        return path
    copy = _place(path)
    problem = _problem(copy)
    if problem is None:
        return copy
    if offline or is_offline():
        raise StorageError(
            f"{path}: {problem} ({copy}), and no store may be asked (SAE_OFFLINE or --offline); fetch it once online"
        )
    if problem != _ABSENT:
        progress.say(f"import: {path}: {problem} ({copy}); fetching it anew")
    _fetch(path, copy)
    return copy


def _place(path: str) -> str:
    root = os.path.expanduser(os.environ.get("SAE_CACHE") or "~/.cache/sae")
    parts = [urllib.parse.quote(part, safe=" +=@,") for part in path.replace("://", "/", 1).split("/")]
    if any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{path}: names no object; write the path without empty names, . and ..")
    return storage.join(root, "pretrained", *parts)


def _note(copy: str) -> str:
    return f"{copy}.json"


def _problem(copy: str) -> str | None:
    """What is wrong with a copy, if anything."""
    noted = storage.read_if_there(_note(copy))
    size = storage.size_if_there(copy)
    if noted is None or size is None:
        return _ABSENT
    try:
        known = json.loads(noted)
        expected = known["size"], known["sha256"]
    except (ValueError, LookupError, TypeError):
        return "the note beside its copy in the cache is damaged"
    if size != expected[0]:
        return f"its copy in the cache has {size:,} bytes, of {expected[0]:,}"
    return None if storage.sha256(copy) == expected[1] else "its copy in the cache is damaged"


def _fetch(path: str, copy: str) -> None:
    stated = storage.state(path)
    free = storage.free_bytes(copy)
    if free < stated.size:
        raise StorageError(
            f"{path}: has {stated.size:,} bytes, {free:,} are free for {copy}; free some space, or set SAE_CACHE to a "
            "folder of a larger disk"
        )
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def write(file: BinaryIO) -> None:
        with (
            progress.bar("import", -(-stated.size // _MB), "MB") as bar,
            storage.open_read(path) as stream,
            storage.reading(path),
        ):
            written = 0
            while part := stream.read(_PART):
                file.write(part)
                sha256.update(part)
                md5.update(part)
                written += len(part)
                bar.advance(written // _MB - bar.done)
        now = storage.state(path)
        if (now.size, now.version) != (stated.size, stated.version):
            raise StorageError(f"{path}: was changed while it was fetched; run the command again")
        if written != stated.size or stated.md5 not in (None, md5.hexdigest()):
            raise StorageError(
                f"{path}: {written:,} bytes came, of {stated.size:,}, or others than the store has; run the command "
                "again"
            )

    storage.write_atomic(copy, write)
    note: dict[str, Any] = {
        "source": path,
        "size": stated.size,
        "version": stated.version,
        "sha256": sha256.hexdigest(),
    }
    storage.write_atomic(_note(copy), json.dumps(note, indent=1).encode())
