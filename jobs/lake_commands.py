"""Commands on a lake rather than on a run: status, verify, sql, gc, drop."""

import csv
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Final

import duckdb
import pyarrow.parquet as pq

from sae.jobs.lake import DataFile, Lake, Snapshot, connect, write_views
from sae.jobs.progress import say
from sae.jobs.verify import damages
from sae.schemas.errors import ConfigError, LakeError

_BATCH_ROWS: Final = 10_000
_UNLIMITED_WIDTH: Final = 1_000_000
# What CREATE makes is in memory. MULTI is PIVOT.
_READS: Final = frozenset({"SELECT", "MULTI", "SET", "CREATE"})
_EXPLAIN: Final = re.compile(r"^\s*explain(\s+analyze)?(\s*\([^)]*\))?\s", re.IGNORECASE)
# Of an autoencoder's files, those that remain when only its latents are dropped.
_OF_TRAINING: Final = frozenset({"checkpoints", "training_states", "metrics"})
# Kinds of properties and units, KIND/NAME..., that go with them.
_OF_LATENTS: Final = ("encode", "aggregate", "decoders")
_OF_AUTOENCODER: Final = (*_OF_LATENTS, "evaluate", "autoencoder")

Rows = list[dict[str, Any]]
Connection = duckdb.DuckDBPyConnection
Relation = duckdb.DuckDBPyRelation


def status(given: Namespace) -> None:
    """Prints what the lake holds and which steps are unfinished."""
    lake = Lake(given.lake)
    snapshot = lake.snapshot()
    print(f"{lake.path}: version {snapshot.version}")
    for title, rows in (
        ("table", _tables(snapshot)),
        ("corpus", _corpora(snapshot)),
        ("autoencoder", _autoencoders(snapshot)),
    ):
        _print_rows(title, rows)
    unfinished = list(_unfinished(snapshot))
    print("\nunfinished: " + ("; ".join(unfinished) or "nothing"))


def _tables(snapshot: Snapshot) -> Rows:
    tables = sorted({file.table for file in snapshot.files.values()})
    return [_described(table, snapshot.select(table)) for table in tables]


def _described(table: str, files: list[DataFile]) -> dict[str, Any]:
    rows, size = sum(file.rows for file in files), sum(file.bytes for file in files)
    return {"table": table, "files": len(files), "rows": rows, "bytes": size}


def _named(snapshot: Snapshot, kind: str) -> dict[str, Any]:
    """Properties KIND/NAME by name."""
    prefix = f"{kind}/"
    items = sorted(snapshot.properties.items())
    return {key.removeprefix(prefix): value for key, value in items if key.startswith(prefix)}


def _corpora(snapshot: Snapshot) -> Rows:
    return [
        {
            "corpus": name,
            "documents": state["n_documents"],
            "contexts": state["n_contexts"],
            "tokens": state["n_tokens"],
            "complete": state["complete"],
        }
        for name, state in _named(snapshot, "corpus").items()
    ]


def _autoencoders(snapshot: Snapshot) -> Rows:
    return [
        {
            "autoencoder": name,
            "model": state["model"],
            "hook": state["hook"],
            "latents": state["n_latents"],
            "k": state["k"],
            "tokens": state["tokens"],
            "complete": state["complete"],
            **_held_out(state.get("checkpoints", [])),
        }
        for name, state in _named(snapshot, "autoencoder").items()
    ]


def _held_out(checkpoints: Rows) -> dict[str, Any]:
    """Of the checkpoints that are kept: how many, the last one's FVU on held-out text, and the least one's."""
    scored = [one for one in checkpoints if one.get("fvu") is not None]
    best = min(scored, key=lambda one: float(one["fvu"]), default=None)
    return {
        "checkpoints": len(checkpoints),
        "fvu": f"{checkpoints[-1]['fvu']:.4f}" if scored and scored[-1] is checkpoints[-1] else "-",
        "best_fvu": f"{best['fvu']:.4f} at {best['tokens']:,} tokens" if best is not None else "-",
    }


def _unfinished(snapshot: Snapshot) -> Iterator[str]:
    # Ray comes with it, and takes seconds to import; the other commands need none of it.
    from sae.jobs import runs

    corpora = _named(snapshot, "corpus")
    for name, state in corpora.items():
        if not state["complete"]:
            yield f"tokenize of corpus {name}"
    for name, state in _named(snapshot, "autoencoder").items():
        if not state["complete"]:
            yield f"train of {name} ({state['tokens']:,} tokens so far)"
    merged = _named(snapshot, "aggregate")
    for name, encoding in _named(snapshot, "encode").items():
        moments = snapshot.select("moments", autoencoder=name)
        for corpus in sorted({file.corpus for file in moments if file.corpus}):
            plan, missing = runs.outstanding(snapshot, "encode", name, corpus, encoding["run_tokens"])
            if missing:
                yield f"encode of {corpus} with {name} ({len(missing)} of {plan.n_runs} runs are missing)"
        if merged.get(name) != sorted(file.sha256 for file in moments):
            yield f"aggregate of {name}"


def _print_rows(title: str, rows: Rows) -> None:
    """A table with aligned columns, numbers to the right."""
    if not rows:
        print(f"\n{title}: none")
        return
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_right = [isinstance(value, int) for value in rows[0].values()]
    print()
    for line in cells:
        parts = zip(line, widths, to_right, strict=True)
        print("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in parts).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def verify(given: Namespace) -> None:
    """Reads every file of the log and the newest version; prints each that is not as it was written.

    Raises LakeError where there is one.
    """
    lake = Lake(given.lake)
    n_damaged = 0
    for line in damages(lake):
        print(line, flush=True)
        n_damaged += 1
    if n_damaged:
        raise LakeError(f"verify: {n_damaged} files of {lake.path} are not as they were written")
    snapshot = lake.snapshot()
    print(f"all {len(snapshot.files)} files of version {snapshot.version} and its log are as they were written")


def sql(given: Namespace) -> None:
    """Prints a query's answer on standard output; raises LakeError where the query fails.

    Raises ConfigError, before anything is run, where a statement could write a file.
    """
    query = sys.stdin.read() if given.query == "-" else given.query
    connection = connect(given.lake, given.version, atoms=given.atoms, contexts=given.contexts)
    # Some settings name files that DuckDB writes.
    connection.execute("set lock_configuration = true")
    try:
        _check_only_reads(connection, query)
        answer = connection.sql(query)
        if answer is None:
            raise ConfigError("sql: the text asks for nothing; give for example: select count(*) from latents")
        _WRITERS[given.format](connection, answer)
    except duckdb.Error as error:
        raise LakeError(f"sql: {_one_line(str(error))}") from None


def _check_only_reads(connection: Connection, query: str) -> None:
    for statement in connection.extract_statements(query):
        # `explain analyze` does what it explains.
        explained = _EXPLAIN.sub("", statement.query, count=1)
        if statement.type.name == "EXPLAIN" and explained != statement.query:
            _check_only_reads(connection, explained)
        elif statement.type.name not in _READS:
            raise ConfigError(
                f"sql: {statement.type.name} is not for asking; give select, and to have the answer in a file: "
                "sae sql ... --format parquet > answer.parquet"
            )


def _one_line(message: str) -> str:
    """DuckDB's message without the excerpt of the query that it ends with."""
    return " ".join(message.split("\nLINE ")[0].split())


def _rows(connection: Connection, answer: Relation) -> Iterator[tuple[Any, ...]]:
    connection.execute(answer.sql_query())
    while batch := connection.fetchmany(_BATCH_ROWS):
        yield from batch


def _write_table(_: Connection, answer: Relation) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED_WIDTH
    answer.show(max_width=width, max_rows=_BATCH_ROWS)


def _write_csv(connection: Connection, answer: Relation) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows([_csv_value(value) for value in row] for row in _rows(connection, answer))


def _csv_value(value: Any) -> Any:
    return _json(value) if isinstance(value, list | tuple | dict) else value


def _write_json(connection: Connection, answer: Relation) -> None:
    """An array of records, one a line."""
    separator = "[\n"
    for row in _rows(connection, answer):
        print(separator + _json(dict(zip(answer.columns, row, strict=True))), end="")
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """The value in JSON's types, with null where JSON has no number for it."""
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _write_parquet(_: Connection, answer: Relation) -> None:
    if sys.stdout.isatty():
        raise ConfigError("sql: Parquet is binary; send it to a file: sae sql ... --format parquet > answer.parquet")
    reader: Any = answer.to_arrow_reader(_BATCH_ROWS)
    with pq.ParquetWriter(sys.stdout.buffer, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


_WRITERS: Final[dict[str, Callable[[Connection, Relation], None]]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}


def gc(given: Namespace) -> None:
    """Deletes what the newest version does not use; lists it."""
    if not 0 <= given.older_than < math.inf:
        raise ConfigError(f"--older-than: got {given.older_than}; expected hours, 0 or more")
    lake = Lake(given.lake)
    removed = lake.collect_garbage(given.older_than * 3600)
    for path in removed:
        print(path)
    say(f"gc: {len(removed)} files removed")


def drop(given: Namespace) -> None:
    """Takes an autoencoder, or only its latents and what was made of them, out of the newest version."""
    lake = Lake(given.lake)
    whole = given.autoencoder is not None
    name: str = given.autoencoder if whole else given.latents
    with lake.transaction("drop") as transaction:
        snapshot = transaction.base
        _check_known(snapshot, name, whole)
        files = [
            file
            for file in snapshot.files.values()
            if file.autoencoder == name and (whole or file.table not in _OF_TRAINING)
        ]
        transaction.remove(files)
        kinds = _OF_AUTOENCODER if whole else _OF_LATENTS
        prefixes = tuple(f"{kind}/{name}/" for kind in kinds)
        transaction.forget(sorted(unit for unit in snapshot.units if unit.startswith(prefixes)))
        exact = {f"{kind}/{name}" for kind in kinds}
        for key in sorted(key for key in snapshot.properties if key in exact or key.startswith(prefixes)):
            transaction.set(key, None)
    write_views(lake)
    what = f"autoencoder {name}" if whole else f"the latents of {name}"
    size = sum(file.bytes for file in files)
    say(f"drop: {what} ({len(files)} files, {size:,} bytes); sae gc {given.lake} frees the space")


def _check_known(snapshot: Snapshot, name: str, whole: bool) -> None:
    known = _named(snapshot, "autoencoder" if whole else "encode")
    if name not in known:
        kind, flag = ("autoencoder", "--autoencoder") if whole else ("latents of", "--latents")
        raise LakeError(f"{flag}: no {kind} {name} in this lake; it has: {', '.join(known) or 'none'}")
