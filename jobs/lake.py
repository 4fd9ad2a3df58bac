"""The lake: immutable files and one JSON log.

A version of the lake is the sum of its log entries 0..N, `_log/%020d.json`. A writer first brings its files to disk
under names nobody reads, then links entry N+1 into the log if nobody else has; only then do they exist for readers.
A unit of work (`encode/demo/sotu/3`) can be committed once, so that a retried task changes nothing.
"""

import dataclasses
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import pyarrow as pa

from sae.jobs import formats, storage, views
from sae.schemas.errors import ConfigError, ConflictError, LakeError

FORMAT: Final = 1
_ENTRY_KEYS: Final = frozenset({"version", "unit", "add", "remove", "forget", "set"})
VIEWS_FILE: Final = "views.sql"
TENSORBOARD_FOLDER: Final = "tensorboard"
# Names that only a lake gives to files: it never deletes others, for somebody may keep theirs in its folder.
_DATA_FILE: Final = r"[a-z_]+/(.+/)?[0-9a-f]{16}\.[a-z]+"
_TEMPORARY: Final = r"(.+/)?\.tmp-[0-9a-f]{32}"
_OWN_FILE: Final = re.compile(f"{_DATA_FILE}|{_TEMPORARY}")
Range = views.Range


@dataclass(frozen=True, slots=True)
class DataFile:
    """One immutable file. Ranges are inclusive; `tokens` counts the tokens that its rows speak of."""

    path: str
    table: str
    rows: int
    bytes: int
    sha256: str
    corpus: str | None = None
    autoencoder: str | None = None
    subject: str | None = None
    run: int | None = None
    tokens: int = 0
    atoms: Range | None = None
    contexts: Range | None = None


@dataclass(frozen=True)
class Snapshot:
    """What the lake holds at one version; version -1 is a lake with nothing in it."""

    version: int = -1
    files: Mapping[str, DataFile] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    units: frozenset[str] = frozenset()

    def select(
        self,
        table: str,
        corpus: str | None = None,
        autoencoder: str | None = None,
        subject: str | None = None,
    ) -> list[DataFile]:
        """The table's files in order of run and path; None stands for any."""
        chosen = (
            file
            for file in self.files.values()
            if file.table == table
            and corpus in (None, file.corpus)
            and autoencoder in (None, file.autoencoder)
            and subject in (None, file.subject)
        )
        return sorted(chosen, key=lambda file: (-1 if file.run is None else file.run, file.path))

    def apply(self, entries: Iterable[dict[str, Any]]) -> "Snapshot":
        """The snapshot after further log entries."""
        version, files, properties, units = (
            self.version,
            dict(self.files),
            dict(self.properties),
            set(self.units),
        )
        for entry in entries:
            version = entry["version"]
            for path in entry["remove"]:
                files.pop(path, None)
            files.update((value["path"], _data_file(value)) for value in entry["add"])
            properties.update(entry["set"])
            units.difference_update(entry["forget"])
            units.update([entry["unit"]] if entry["unit"] else [])
        kept = {key: value for key, value in properties.items() if value is not None}
        return Snapshot(version, files, kept, frozenset(units))


class Lake:
    """A folder that holds a lake. Raises LakeError where there is none (unless `create`) or it is of a newer format.

    The folder of a new lake appears with its first commit.
    """

    def __init__(self, path: str, create: bool = False) -> None:
        storage.require_local(path)
        self.path = str(Path(path).absolute())
        self._latest = Snapshot()
        if not create and not storage.exists(self._log_path(0)):
            raise LakeError(
                f"{path}: no lake here (it has no _log folder with entries); give a lake's folder or run a step first"
            )

    def snapshot(self, version: int | None = None) -> Snapshot:
        """The newest version, or the one asked for."""
        self._latest = self._latest.apply(self._entries(self._latest.version + 1))
        if version is None or version == self._latest.version:
            return self._latest
        if not 0 <= version < self._latest.version:
            raise LakeError(f"{self.path}: no version {version}; versions go from 0 to {self._latest.version}")
        return Snapshot().apply(itertools.islice(self._entries(0), version + 1))

    def transaction(self, operation: str, unit: str | None = None) -> "Transaction":
        return Transaction(self, operation, unit)

    def absolute(self, file: DataFile | str) -> str:
        return storage.join(self.path, file if isinstance(file, str) else file.path)

    def verified(self, files: Iterable[DataFile]) -> list[str]:
        """Absolute paths of files whose size is what was committed; raises LakeError on the first that is not."""
        paths = []
        for file in files:
            path = self.absolute(file)
            found = storage.size(path) if storage.exists(path) else None
            if found != file.bytes:
                state = "is missing" if found is None else f"has {found} bytes"
                raise LakeError(f"{path}: {state}, the log says {file.bytes}; restore the file from a copy")
            paths.append(path)
        return paths

    def read(self, files: Iterable[DataFile], columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        return pa.concat_tables([formats.read(path, columns, filters) for path in self.verified(files)])

    def collect_garbage(self, older_than_s: float) -> list[str]:
        """Deletes files that the newest version does not use and that are older than the given age, in seconds."""
        deadline = time.time() - older_than_s
        # Listed first: what is committed between the two is then in use.
        found = storage.list_files(self.path) + storage.list_files(self.path, temporary=True)
        used = self.snapshot().files
        garbage = [
            path
            for path in found
            if path not in used and _OWN_FILE.fullmatch(path) and storage.modified(self.absolute(path)) < deadline
        ]
        for path in garbage:
            storage.remove(self.absolute(path))
        return garbage

    def _log_path(self, version: int | None) -> str:
        return storage.join(self.path, "_log", *([] if version is None else [f"{version:020d}.json"]))

    def _entries(self, version: int) -> Iterator[dict[str, Any]]:
        while (entry := self.entry(version)) is not None:
            yield entry
            version += 1

    def entry(self, version: int) -> dict[str, Any] | None:
        """The log entry of a version; None where the log is shorter."""
        path = self._log_path(version)
        if not storage.exists(path):
            return None
        damaged = LakeError(f"{path}: not a log entry; restore the file from a copy of the lake")
        try:
            entry: dict[str, Any] = json.loads(storage.read_bytes(path))
            format_ = int(entry["format"])
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        if format_ > FORMAT:
            raise LakeError(
                f"{self.path}: written by a newer sae (lake format {format_}, this one reads up to {FORMAT}); "
                "upgrade sae"
            )
        if not entry.keys() >= _ENTRY_KEYS or entry["version"] != version:
            raise damaged
        return entry

    def link(self, entry: dict[str, Any]) -> bool:
        """Puts the entry into the log as its version; False when another writer was first."""
        data = json.dumps(entry, allow_nan=False, sort_keys=True).encode()
        return storage.put_if_absent(self._log_path(entry["version"]), data)


class Transaction:
    """Files and properties that become visible together, or not at all.

    As a context manager it commits on leaving; on an exception its files are deleted. Raises ConflictError when the
    unit, a property it changed or a file it removes was changed by another writer since it began.
    """

    def __init__(self, lake: Lake, operation: str, unit: str | None) -> None:
        self.lake = lake
        self.base = lake.snapshot()
        self._operation, self._unit = operation, unit
        self._id, self._tried = secrets.token_hex(16), -1
        self._add: list[DataFile] = []
        self._remove: list[str] = []
        self._forget: list[str] = []
        self._set: dict[str, Any] = {}

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
            # An interrupt can come after the entry was linked: then the files are the lake's.
            if not self._is_linked():
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
        file = DataFile(
            path=path,
            table=table,
            bytes=storage.size(absolute),
            sha256=storage.sha256(absolute),
            **{"rows": 0, **named},
        )
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

    def forget(self, units: Iterable[str]) -> None:
        """Lets units of work be done again."""
        self._forget.extend(units)

    def set(self, key: str, value: Any) -> None:
        """Sets a property (plain JSON); None deletes it."""
        self._set[key] = value

    def _commit(self) -> None:
        while True:
            now = self.lake.snapshot()
            self._check(now)
            self._tried = now.version + 1
            entry = {
                "format": FORMAT,
                "id": self._id,
                "version": now.version + 1,
                "operation": self._operation,
                "unit": self._unit,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "add": [dataclasses.asdict(file) for file in self._add],
                "remove": self._remove,
                "forget": self._forget,
                "set": self._set,
            }
            if self.lake.link(entry):
                return

    def _is_linked(self) -> bool:
        entry = self.lake.entry(self._tried) if self._tried >= 0 else None
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

    def discard(self) -> None:
        """Deletes the files written so far."""
        for file in self._add:
            storage.remove(self.lake.absolute(file))


def _new_path(table: str, suffix: str, *folders: str | None) -> str:
    return "/".join([table, *filter(None, folders), f"{secrets.token_hex(8)}.{suffix}"])


def _data_file(value: dict[str, Any]) -> DataFile:
    ranges = {key: tuple(value[key]) if value[key] else None for key in ("atoms", "contexts")}
    return DataFile(**{**value, **ranges})


def connect(
    path: str, version: int | None = None, *, atoms: Range | None = None, contexts: Range | None = None
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with a view for every table of the lake at one version, and the macros of schemas/sql.

    With `atoms` or `contexts`, first and last, the tables that have such a key show only those rows, and files that
    hold none of them are never opened. Raises LakeError when a file of that version is missing or truncated.
    """
    lake = Lake(path)
    return open_tables(lake, lake.snapshot(version), atoms=atoms, contexts=contexts)


def open_tables(
    lake: Lake, snapshot: Snapshot, *, atoms: Range | None = None, contexts: Range | None = None
) -> duckdb.DuckDBPyConnection:
    """`connect` for a version that is read already."""
    bounds = {key: bound for key, bound in (("atom", atoms), ("context_id", contexts)) if bound is not None}
    for key, (first, last) in bounds.items():
        if first > last:
            raise ConfigError(f"{key}: got {first} to {last}; give the first and the last that you want, in this order")
    tables = (file for file in snapshot.files.values() if file.table in views.TABLES)
    _check_readable(lake, snapshot, [file for file in tables if views.may_show(file, bounds)])
    connection = duckdb.connect()
    connection.execute(views.statements(lake.path, snapshot.files.values(), snapshot.properties, bounds))
    return connection


def _check_readable(lake: Lake, snapshot: Snapshot, files: list[DataFile]) -> None:
    try:
        lake.verified(files)
    except LakeError:
        used = lake.snapshot().files
        gone = [file.path for file in files if file.path not in used and not storage.exists(lake.absolute(file))]
        if not gone:
            raise
        raise LakeError(
            f"{lake.path}: version {snapshot.version} can no longer be read, {len(gone)} of its files were deleted by "
            f"sae gc ({gone[0]}); ask for a newer version, the newest is {lake.snapshot().version}"
        ) from None


def write_views(lake: Lake) -> None:
    """Writes views.sql, with which a bare duckdb opens the newest version: `duckdb -init LAKE/views.sql`.

    A file that is right already is left alone.
    """
    snapshot = lake.snapshot()
    text = views.statements(lake.path, snapshot.files.values(), snapshot.properties).encode()
    path = lake.absolute(VIEWS_FILE)
    if not storage.exists(path) or storage.read_bytes(path) != text:
        storage.write_atomic(path, text)
