"""The lake: immutable files and one JSON log.

A version of the lake is the sum of its log entries 0..N, `_log/%020d.json`. A writer first brings its files to disk
under names nobody reads, then links entry N+1 into the log if nobody else has; only then do they exist for readers.
A unit of work (`encode/demo/sotu/3`) can be committed once, so that a retried task changes nothing.
"""

import calendar
import dataclasses
import itertools
import posixpath
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import pyarrow as pa

from sae.jobs import formats, storage, views
from sae.jobs.log import CHECKPOINT_EVERY, FORMAT, Log, sealed
from sae.jobs.recent import Recent
from sae.jobs.snapshots import DataFile, Snapshot
from sae.jobs.views import Range
from sae.schemas.errors import ConflictError, LakeError, StorageError

__all__ = ["DataFile", "Lake", "Range", "Snapshot", "Transaction", "connect", "write_views"]

VIEWS_FILE: Final = "views.sql"
TENSORBOARD_FOLDER: Final = "tensorboard"
# Names that only a lake gives to files: it never deletes others, for somebody may keep theirs in its folder.
_DATA_FILE: Final = r"[a-z][a-z_]*/(.+/)?[0-9a-f]{16}\.[a-z]+"
_TEMPORARY: Final = r"(.+/)?\.tmp-[0-9a-f]{32}"
_CHECKPOINT: Final = re.compile(r"_log/\d{20}\.checkpoint\.json")
_OWN_FILE: Final = re.compile(f"{_DATA_FILE}|{_TEMPORARY}|{_CHECKPOINT.pattern}")
_CREATED: Final = "%Y-%m-%dT%H:%M:%SZ"
_LONG_AGO: Final = "1970-01-01T00:00:00Z"
_FEW_FILES: Final = 16  # of an object store, up to which asking for each is cheaper than a listing

_snapshots: Final = Recent[str, Snapshot](8)


class Lake:
    """A folder that holds a lake. Raises LakeError where there is none (unless `create`) or it is of a newer format.

    The folder of a new lake appears with its first commit.
    """

    def __init__(self, path: str, create: bool = False) -> None:
        self.path = str(Path(path).absolute()) if storage.is_local(path) else path.rstrip("/")
        self.log = Log(self.path)
        self._latest = Snapshot()
        if not create and storage.read_if_there(self.log.path(0)) is None:
            raise LakeError(
                f"{path}: no lake here (it has no _log folder with entries); give a lake's folder or run a step first"
            )

    def snapshot(self, version: int | None = None) -> Snapshot:
        """The newest version, or the one asked for."""
        latest = self._latest  # threads share a lake: what one of them read is whole
        if latest.version < 0:
            latest = self._remembered() or self.log.checkpoint()
        self._latest = latest = latest.apply(self.log.entries(latest.version + 1))
        _snapshots.put(self.path, latest)
        if version is None or version == latest.version:
            return latest
        if not 0 <= version < latest.version:
            raise LakeError(f"{self.path}: no version {version}; versions go from 0 to {latest.version}")
        before = self.log.checkpoint(version)
        return before.apply(itertools.islice(self.log.entries(before.version + 1), version - before.version))

    def _remembered(self) -> Snapshot | None:
        """What another Lake of this process read here last, if it is still the beginning of this log."""
        found = _snapshots.get(self.path)
        entry = self.log.entry(found.version) if found and found.entry else None
        return found if found and entry and entry.get("sha256") == found.entry else None

    def transaction(self, operation: str, unit: str | None = None, began: float | None = None) -> "Transaction":
        """What is committed notes how long it took: since `began`, in seconds since the epoch, or since now."""
        return Transaction(self, operation, unit, time.time() if began is None else began)

    def absolute(self, file: DataFile | str) -> str:
        return storage.join(self.path, file if isinstance(file, str) else file.path)

    def verified(self, files: Iterable[DataFile]) -> list[str]:
        """Absolute paths of files whose size is what was committed; raises LakeError on the first that is not."""
        paths, files = [], list(files)
        sizes = self.sizes(files)
        for file in files:
            path, found = self.absolute(file), sizes.get(file.path)
            if found != file.bytes:
                state = "is missing" if found is None else f"has {found} bytes"
                raise LakeError(f"{path}: {state}, the log says {file.bytes}; restore the file from a copy")
            paths.append(path)
        return paths

    def sizes(self, files: Sequence[DataFile]) -> dict[str, int]:
        """The sizes in bytes that files have on disk, by path; those that are missing are left out."""
        if storage.is_local(self.path) or len(files) < _FEW_FILES:
            found = {file.path: storage.size_if_there(self.absolute(file)) for file in files}
            return {path: size for path, size in found.items() if size is not None}
        folder = posixpath.commonpath([file.path for file in files])
        listed = storage.sizes_below(storage.join(self.path, folder))
        return {posixpath.join(folder, name): size for name, size in listed.items()}

    @contextmanager
    def local(self, file: DataFile) -> Iterator[str]:
        """A local path with a file's contents, checked as `verified` does it; see storage.local_copy."""
        (path,) = self.verified([file])
        with storage.local_copy(path) as local:
            yield local

    def check_room(self, n_bytes: int) -> None:
        """Raises StorageError where that much does not fit onto the disk of a lake that is on one."""
        free = storage.free_bytes(self.path) if storage.is_local(self.path) else n_bytes
        if free < n_bytes:
            raise StorageError(
                f"cannot write {self.path}: No space left for {n_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
                "free some space, with sae gc for instance, or use another disk"
            )

    def read(self, files: Iterable[DataFile], columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        return pa.concat_tables([formats.read(path, columns, filters) for path in self.verified(files)])

    def collect_garbage(self, older_than_s: float) -> list[str]:
        """Deletes files that are older than the given age, in seconds, and as long not used by the newest version."""
        deadline = time.time() - older_than_s
        # Listed first: what is committed between the two is then in use.
        found = storage.list_files(self.path) + storage.list_files(self.path, temporary=True)
        used = self._used_since(deadline)
        # A reader that has just read which checkpoint is the last one finds it.
        spared = sorted(filter(_CHECKPOINT.fullmatch, found))[-2:]
        unused = [path for path in found if path not in used and path not in spared and _OWN_FILE.fullmatch(path)]
        removed = storage.remove_older(map(self.absolute, unused), deadline)
        return [path for path in unused if self.absolute(path) in removed]

    def _used_since(self, time_s: float) -> set[str]:
        """Paths of the newest version, and of those that were the newest at that time or later.

        A reader may have opened one of these a moment before it was replaced, however old its files are.
        """
        newest = self.snapshot()
        used = set(newest.files)
        for version in range(newest.version, 0, -1):
            entry = self.log.entry(version)
            if entry is None or _seconds(entry.get("created", _LONG_AGO)) < time_s:
                break
            used.update(entry["remove"])
        return used


class Transaction:
    """Files and properties that become visible together, or not at all.

    As a context manager it commits on leaving; on an exception its files are deleted. Raises ConflictError when the
    unit, a property it changed or a file it removes was changed by another writer since it began, or what it requires
    no longer holds.
    """

    def __init__(self, lake: Lake, operation: str, unit: str | None, began: float) -> None:
        self.lake = lake
        self.base = lake.snapshot()
        self._operation, self._unit, self._began = operation, unit, began
        self._id, self._tried = secrets.token_hex(16), -1
        self._add: list[DataFile] = []
        self._remove: list[str] = []
        self._forget: list[str] = []
        self._set: dict[str, Any] = {}
        self._requirements: list[tuple[Callable[[Snapshot], bool], str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self._commit()
        except BaseException:
            if not self._may_be_linked():
                self.discard()
            raise

    def write(
        self,
        table: str,
        batches: pa.Table | Iterable[pa.Table],
        *,
        corpus: str | None = None,
        autoencoder: str | None = None,
        run: int | None = None,
        tokens: int = 0,
        contexts: Range | None = None,
    ) -> DataFile:
        """Adds one Parquet file of the table; `contexts` is told where the rows don't name them."""
        ranges: list[tuple[Range | None, Range | None]] = []

        def noted() -> Iterator[pa.Table]:
            for batch in [batches] if isinstance(batches, pa.Table) else batches:
                ranges.append((formats.column_range(batch, "atom"), formats.column_range(batch, "context_id")))
                yield batch

        counted = 0

        def written(path: str) -> None:
            nonlocal counted
            counted = formats.write(table, noted(), path)

        named = {"corpus": corpus, "autoencoder": autoencoder, "run": run, "tokens": tokens}
        file = self.write_with(table, "parquet", written, **named)
        return self._described(
            file,
            rows=counted,
            atoms=formats.widest(atoms for atoms, _ in ranges),
            contexts=formats.widest(found for _, found in ranges) or contexts,
        )

    def write_with(self, table: str, suffix: str, write: Callable[[str], None], **named: Any) -> DataFile:
        """Adds one file that `write` fills, given a local path; `named` are attributes of DataFile."""
        path = _new_path(table, suffix, *(named.get(key) for key in ("autoencoder", "corpus", "subject")))
        absolute = self.lake.absolute(path)
        with storage.staged(absolute) as local:
            write(local)
            size, sha256 = storage.size(local), storage.sha256(local)
        file = DataFile(path=path, table=table, bytes=size, sha256=sha256, **{"rows": 0, **named})
        self._add.append(file)
        return file

    def _described(self, file: DataFile, **more: Any) -> DataFile:
        self._add.remove(file)
        self._add.append(dataclasses.replace(file, **more))
        return self._add[-1]

    def hand_over(self) -> list[DataFile]:
        """The files written so far, for a transaction in another process to `adopt`; this one is then empty."""
        files, self._add = self._add, []
        return files

    def adopt(self, files: Iterable[DataFile]) -> None:
        """Commits files of other processes' transactions with its own, or deletes them with its own."""
        self._add.extend(files)

    def remove(self, files: Iterable[DataFile]) -> None:
        self._remove.extend(file.path for file in files)

    @property
    def removed(self) -> frozenset[str]:
        """Paths of the files that go."""
        return frozenset(self._remove)

    @property
    def added(self) -> list[DataFile]:
        """The files that come."""
        return list(self._add)

    def forget(self, units: Iterable[str]) -> None:
        """Lets units of work be done again."""
        self._forget.extend(units)

    def set(self, key: str, value: Any) -> None:
        """Sets a property (plain JSON); None deletes it."""
        self._set[key] = value

    def require(self, holds: Callable[[Snapshot], bool], otherwise: str) -> None:
        """Commits only if this is true of the version before; else the error says what another writer did."""
        self._requirements.append((holds, otherwise))

    def _commit(self) -> None:
        while True:
            now = self.lake.snapshot()
            self._check(now)
            self._tried = now.version + 1
            entry = sealed(
                {
                    "format": FORMAT,
                    "id": self._id,
                    "version": now.version + 1,
                    "operation": self._operation,
                    "unit": self._unit,
                    "created": time.strftime(_CREATED, time.gmtime()),
                    "span": [round(self._began, 3), round(time.time(), 3)],
                    "add": [file.to_json() for file in self._add],
                    "remove": self._remove,
                    "forget": self._forget,
                    "set": self._set,
                }
            )
            if self.lake.log.link(entry):
                if (entry["version"] + 1) % CHECKPOINT_EVERY == 0:
                    self.lake.log.write_checkpoint(now.apply([entry]), entry)
                return
            self._tried = -1

    def _may_be_linked(self) -> bool:
        """Whether the files can be the lake's after an exception while the entry was linked."""
        if self._tried < 0:
            return False
        if not storage.is_local(self.lake.path):
            return True  # a put whose answer never came can still be carried out
        entry = self.lake.log.entry(self._tried)
        return entry is not None and entry.get("id") == self._id

    def _check(self, now: Snapshot) -> None:
        if self._unit in now.units and self._unit not in self._forget:
            raise ConflictError(f"{self._unit}: already committed by another writer; nothing to do")
        for path in self._remove:
            if path not in now.files:
                raise ConflictError(f"{path}: removed by another writer meanwhile; run the step again")
        for key, value in self._set.items():
            if now.properties.get(key) not in (self.base.properties.get(key), value):
                raise ConflictError(f"{key}: changed by another writer meanwhile; run the step again")
        for holds, otherwise in self._requirements:
            if not holds(now):
                raise ConflictError(f"{otherwise} by another writer meanwhile; run the step again")

    def discard(self) -> None:
        """Deletes the files written so far; where that fails, they are garbage."""
        for file in self._add:
            with suppress(StorageError):
                storage.remove(self.lake.absolute(file))


def _seconds(created: str) -> int:
    """Since the epoch."""
    return calendar.timegm(time.strptime(created, _CREATED))


def _new_path(table: str, suffix: str, *folders: str | None) -> str:
    return "/".join([table, *filter(None, folders), f"{secrets.token_hex(8)}.{suffix}"])


def connect(
    path: str, version: int | None = None, *, atoms: Range | None = None, contexts: Range | None = None
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with a view for every table of the lake at one version, and the macros of schemas/sql.

    With `atoms` or `contexts`, first and last, the tables that have such a key show only those rows, and files that
    hold none of them are not asked. Raises LakeError when a file of that version is missing or truncated.

    Connections of a process to one version share a database, as DuckDB's connections to one file do: its settings
    and what it holds of files. What a connection creates is its own.
    """
    from sae.jobs import databases  # which are of lakes

    lake = Lake(path)
    return databases.connection(lake, lake.snapshot(version), views.bounds(atoms, contexts))


def write_views(lake: Lake) -> None:
    """Writes views.sql, with which a bare duckdb opens the newest version: `duckdb -init LAKE/views.sql`.

    A file that is right already is left alone.
    """
    snapshot = lake.snapshot()
    text = views.statements(storage.duckdb_url(lake.path), snapshot.files.values(), snapshot.properties).encode()
    path = lake.absolute(VIEWS_FILE)
    if not storage.exists(path) or storage.read_bytes(path) != text:
        storage.write_atomic(path, text)
