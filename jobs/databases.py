"""DuckDB databases of lake versions, in memory.

To make one takes a tenth of a second: DuckDB starts, and opens a file of every table. So a process keeps those that it
used last, and a connection is one more to a database that is there, with a catalog of its own for what it creates.
"""

import itertools
import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import Final

import duckdb

from sae.jobs import storage, token_sql, views
from sae.jobs.lake import Lake
from sae.jobs.lake_files import LakeFiles
from sae.jobs.recent import Recent
from sae.jobs.snapshots import DataFile, Snapshot
from sae.jobs.views import Bounds
from sae.schemas.errors import LakeError

Connection = duckdb.DuckDBPyConnection


@dataclass(frozen=True)
class _Database:
    """With the views of a version; `mapped` where contexts of examples come from arrays."""

    connection: Connection
    mapped: bool


_databases: Final = Recent[tuple[str, int, str | None], _Database](8)
_numbers: Final = itertools.count()


def connection(lake: Lake, snapshot: Snapshot, bounds: Bounds, shared: bool = True) -> Connection:
    """A connection to a version's tables, which show the rows within the bounds.

    One that is not shared may be given settings that others would mind.
    """
    tables = [file for file in snapshot.files.values() if file.table in views.TABLES]
    _check_readable(lake, snapshot, [file for file in tables if views.may_show(file, bounds)])
    database = _database(lake, snapshot, bounds) if shared else _made(lake, snapshot, bounds)
    connection = database.connection.cursor()
    own = f"own_{next(_numbers)}"
    schemas = f"{own}.main,memory.limited,memory.main" if bounds else f"{own}.main,memory.main"
    connection.execute(f"attach ':memory:' as {own}; set search_path = '{schemas}'")
    # Python's functions live as long as the connection that they were made with.
    weakref.finalize(connection, _detach, database.connection, own)
    if bounds:
        connection.execute(views.within(lake.path, tables, bounds))
    return connection


def _detach(database: Connection, catalog: str) -> None:
    database.execute(f"detach {catalog}")


def _database(lake: Lake, snapshot: Snapshot, bounds: Bounds) -> _Database:
    try:
        return _kept(lake, snapshot)
    except (duckdb.Error, LakeError):
        if not bounds:
            raise
        # What is damaged need not be what is asked for.
        return _made(lake, snapshot, bounds)


def _kept(lake: Lake, snapshot: Snapshot) -> _Database:
    key = lake.path, snapshot.version, snapshot.entry
    found = _databases.get(key)
    if found and (found.mapped or not token_sql.mapped_corpora(lake, snapshot)):
        return found
    return _databases.put(key, _made(lake, snapshot, {}))


def _made(lake: Lake, snapshot: Snapshot, bounds: Bounds) -> _Database:
    files = snapshot.files.values()
    # Of a database in memory the default is a folder where the command was started.
    spill = os.path.join(tempfile.gettempdir(), f"sae-spill-{os.getpid()}-{next(_numbers)}")
    connection = duckdb.connect(config={"temp_directory": spill})
    if not storage.is_local(lake.path):
        connection.register_filesystem(LakeFiles({lake.absolute(file): file.bytes for file in files}))
    connection.execute("set global parquet_metadata_cache = true")
    try:
        connection.execute(views.statements(lake.path, files, snapshot.properties, bounds))
    except duckdb.Error:
        tables = [file for file in files if file.table in views.TABLES]
        _check_readable(lake, snapshot, [file for file in tables if views.may_show(file, bounds)])
        raise
    corpora = token_sql.mapped_corpora(lake, snapshot)
    if corpora:
        token_sql.use_arrays(connection, corpora)
    connection.execute(views.limited_statements())
    connection.execute("set search_path = 'memory.limited,memory.main'")
    connection.execute(views.query(token_sql.EXAMPLES if corpora else "example_contexts"))
    return _Database(connection, bool(corpora))


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
