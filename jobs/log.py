"""The log of a lake: `_log/%020d.json` holds what each version changed, with a checksum.

Every so many versions the writer also stores a checkpoint, the sum of all entries so far, so that a reader need not
read them one by one; `_log/last_checkpoint` names one. Both only save time: the entries are the truth.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from sae.jobs import storage
from sae.jobs.snapshots import Snapshot
from sae.schemas.errors import LakeError, StorageError

FORMAT: Final = 1
CHECKPOINT_EVERY: Final = 64
_MOST_AT_ONCE: Final = 32  # entries, of which those behind the log's end are asked for in vain
_FOLDER: Final = "_log"
_HINT: Final = "last_checkpoint"
_ENTRY: Final = re.compile(r"(\d{20})\.json")
_CHECKPOINT: Final = re.compile(r"(\d{20})\.checkpoint\.json")
_ENTRY_KEYS: Final = frozenset({"version", "unit", "add", "remove", "forget", "set"})
# A key that has no checksum in it can be one whose name was damaged.
_KNOWN_KEYS: Final = _ENTRY_KEYS | {"format", "id", "operation", "created", "span", "sha256"}

Entry = dict[str, Any]


def sealed(entry: Entry) -> Entry:
    """The entry as it is read again, with its checksum."""
    plain: Entry = json.loads(_canonical(entry))
    return {**plain, "sha256": _sha256(plain)}


class DamagedError(LakeError):
    """A file of the log is not as it was written."""


class Log:
    """The log below a lake's path."""

    def __init__(self, lake: str) -> None:
        self._lake = lake
        self._folder = storage.join(lake, _FOLDER)

    def path(self, version: int) -> str:
        return self._named(f"{version:020d}.json")

    def entry(self, version: int) -> Entry | None:
        """The entry of a version; None where the log is shorter.

        Raises DamagedError where it is damaged, LakeError where a newer sae wrote it.
        """
        path = self.path(version)
        data = storage.read_if_there(path)
        if data is None:
            return None
        entry = _parsed(path, data)
        if entry["format"] > FORMAT:
            raise LakeError(
                f"{self._lake}: written by a newer sae (lake format {entry['format']}, this one reads up to {FORMAT}); "
                "upgrade sae"
            )
        if not _KNOWN_KEYS >= entry.keys() >= _ENTRY_KEYS or entry["version"] != version:
            raise _damaged(path)
        if entry.get("sha256", _sha256(entry)) != _sha256(entry):
            raise DamagedError(f"{path}: another sha256 than it was written with; {_REMEDY}")
        return entry

    def entries(self, version: int) -> Iterator[Entry]:
        """The entries from a version on, up to the first that is missing."""
        n_asked = 1
        while True:
            for entry in self._each(range(version, version + n_asked)):
                if entry is None:
                    return
                yield entry
            version, n_asked = version + n_asked, min(2 * n_asked, _MOST_AT_ONCE)

    def _each(self, versions: range) -> Iterator[Entry | None]:
        """The entries of versions, asked for together where each takes a way to a store and back."""
        if storage.is_local(self._lake) or len(versions) == 1:
            yield from map(self.entry, versions)
            return
        with ThreadPoolExecutor(len(versions)) as pool:
            yield from pool.map(self.entry, versions)

    def link(self, entry: Entry) -> bool:
        """Puts a sealed entry into the log as its version; False when another writer was first.

        Where an error is raised, the entry may still appear later if the log is in an object store.
        """
        if storage.put_if_absent(self.path(entry["version"]), _canonical(entry)):
            return True
        # The answer to a put can be lost, and the next one then finds the entry there.
        there = self.entry(entry["version"])
        return there is not None and there.get("id") == entry["id"]

    def versions(self) -> list[int]:
        """The versions whose entries are there, by listing them."""
        return self._listed(_ENTRY)

    # Checkpoints

    def checkpoint(self, version: int | None = None) -> Snapshot:
        """The newest checkpoint, up to the given version; that of an empty lake where there is none."""
        hinted = self._hint() if version is None else None
        found = self.read_checkpoint(hinted) if hinted is not None else None
        if found is not None:
            return found
        for candidate in reversed(self.checkpoints()):
            if version is None or candidate <= version:
                found = self.read_checkpoint(candidate)
                if found is not None:
                    return found
        return Snapshot()

    def checkpoints(self) -> list[int]:
        """The versions that have a checkpoint, by listing them."""
        return self._listed(_CHECKPOINT)

    def checkpoint_path(self, version: int) -> str:
        return self._named(f"{version:020d}.checkpoint.json")

    def read_checkpoint(self, version: int) -> Snapshot | None:
        """The checkpoint of a version; None where it is missing, damaged, or of another log."""
        path = self.checkpoint_path(version)
        with suppress(LakeError, StorageError):
            value = _parsed(path, storage.read_if_there(path) or b"")
            entry = self.entry(version)
            if (
                value["format"] == FORMAT
                and value.get("sha256") == _sha256(value)
                and entry is not None
                and value["entry"] == _sha256(entry)
            ):
                return Snapshot.from_json(value)
        return None

    def write_checkpoint(self, snapshot: Snapshot, entry: Entry) -> None:
        """Stores the snapshot, of which the entry is the last; where that fails, readers do without."""
        value = {"format": FORMAT, "entry": _sha256(entry), **snapshot.to_json()}
        with suppress(StorageError):
            storage.write_atomic(
                self.checkpoint_path(snapshot.version), _canonical({**value, "sha256": _sha256(value)})
            )
            storage.write_atomic(self._named(_HINT), str(snapshot.version).encode())

    def _hint(self) -> int | None:
        data = storage.read_if_there(self._named(_HINT))
        return int(data) if data is not None and data.isdigit() else None

    def _listed(self, pattern: re.Pattern[str]) -> list[int]:
        names = map(pattern.fullmatch, storage.list_files(self._folder))
        return [int(match[1]) for match in names if match]

    def _named(self, name: str) -> str:
        return storage.join(self._folder, name)


_REMEDY: Final = "restore the file from a copy of the lake"


def _damaged(path: str) -> DamagedError:
    return DamagedError(f"{path}: not a log entry; {_REMEDY}")


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    """A JSON object with a number as its format."""
    try:
        value: dict[str, Any] = json.loads(data)
        return {**value, "format": int(value["format"])}
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None


def _sha256(value: dict[str, Any]) -> str:
    """Of what is said, without the checksum itself."""
    return hashlib.sha256(_canonical({key: value[key] for key in value if key != "sha256"})).hexdigest()


def _canonical(value: dict[str, Any]) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, allow_nan=False, sort_keys=True).encode()
