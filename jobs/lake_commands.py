"""Commands on a lake rather than on a run: status, verify, sql, gc, drop."""

import csv
import itertools
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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.jobs import by_token, databases, formats, token_cache, views
from sae.jobs.lake import DataFile, Lake, Range, Snapshot, write_views
from sae.jobs.origin import digest
from sae.jobs.progress import say
from sae.jobs.ranges import size, united
from sae.jobs.verify import damages
from sae.schemas.errors import ConfigError, IncompleteError, LakeError
from sae.schemas.tables import CORPUS_SHIFT

_BATCH_ROWS: Final = 10_000
_UNLIMITED_WIDTH: Final = 1_000_000
# What CREATE makes is in memory. MULTI is PIVOT.
_READS: Final = frozenset({"SELECT", "MULTI", "SET", "CREATE"})
_EXPLAIN: Final = re.compile(r"^\s*explain(\s+analyze)?(\s*\([^)]*\))?\s", re.IGNORECASE)
_DROPPED: Final = ("latents", "run", "autoencoder", "corpus", "with_text", "contexts", "doc", "by_token")
# Which arguments of drop go together, as they are told.
_DROPS: Final = {
    frozenset({"latents"}): "--latents AUTOENCODER",
    frozenset({"latents", "run"}): "--latents AUTOENCODER --run CORPUS/NUMBER",
    frozenset({"latents", "corpus"}): "--latents AUTOENCODER --corpus CORPUS",
    frozenset({"latents", "by_token"}): "--latents AUTOENCODER --by-token",
    frozenset({"autoencoder"}): "--autoencoder AUTOENCODER",
    frozenset({"corpus"}): "--corpus CORPUS",
    frozenset({"corpus", "with_text"}): "--corpus CORPUS --with-text",
    frozenset({"contexts"}): "--contexts FIRST:LAST",
    frozenset({"doc"}): "--doc ID",
}

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
    dropped = list(_taken_out(snapshot))
    if dropped:
        print("\ndropped: " + "; ".join(dropped))
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


def _taken_out(snapshot: Snapshot) -> Iterator[str]:
    """What was dropped of corpora for good, and of their latents until they are encoded again."""
    for name, state in _named(snapshot, "corpus").items():
        if n_contexts := size((low, high) for low, high in state.get("dropped", [])):
            yield f"{n_contexts:,} contexts of {name}"
    marks = sorted(tuple(mark.split("/")) for mark in _named(snapshot, "dropped"))
    for (name, corpus), each in itertools.groupby(marks, key=lambda mark: mark[:2]):
        numbers = united((int(number), int(number)) for _, _, number in each)
        listed = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in numbers)
        yield f"runs {listed} of {corpus} by {name}"


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
            missing = [run for run in missing if runs.drop_mark(name, corpus, run) not in snapshot.properties]
            if missing:
                yield f"encode of {corpus} with {name} ({len(missing)} of {plan.n_runs} runs are missing)"
        if snapshot.select(by_token.TABLE, autoencoder=name) and (left := by_token.missing(snapshot, name)):
            yield f"copy by token of {name} ({len(left)} runs have none)"
        if moments and merged.get(name) != sorted(file.sha256 for file in moments):
            yield f"aggregate of {name}"
    for step, what in (("effects", "effects"), ("explain", "explanations")):
        for name, source in _named(snapshot, step).items():
            now = merged.get(name)
            if now is None or source["aggregate"] != digest(now):
                yield f"{what} of {name} (made of other examples)"


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
    lake = Lake(given.lake)
    bounds = views.bounds(given.atoms, given.contexts)
    connection = databases.connection(lake, lake.snapshot(given.version), bounds, shared=False)
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
    removed = lake.collect_garbage(given.older_than * 3600) + token_cache.remove_stale(lake)
    for path in removed:
        print(path)
    say(f"gc: {len(removed)} files removed")


def drop(given: Namespace) -> None:
    """Takes out of the newest version what the arguments name.

    Raises ConfigError where they don't fit together, LakeError where the lake does not hold it.
    """
    chosen = {key: value for key in _DROPPED if (value := vars(given).get(key)) not in (None, False)}
    if frozenset(chosen) not in _DROPS:
        flags = " ".join(f"--{key.replace('_', '-')}" for key in chosen) or "nothing"
        raise ConfigError(f"drop: got {flags}; give one of: {'; '.join(_DROPS.values())}")
    lake = Lake(given.lake)
    merged = _named(lake.snapshot(), "aggregate")
    what = _dropped(lake, chosen)
    write_views(lake)
    now = lake.snapshot()
    stale = [name for name in merged if name in _named(now, "encode") and name not in _named(now, "aggregate")]
    again = f"sae aggregate makes the atoms of {', '.join(stale)} anew, " if stale else ""
    say(f"drop: {what}; {again}sae gc {given.lake} frees the space")


def _dropped(lake: Lake, chosen: dict[str, Any]) -> str:
    """Takes it out; returns what it was."""
    # Torch and Ray come with it, and take seconds to import.
    from sae.jobs import drop as parts

    snapshot = lake.snapshot()
    match chosen:
        case {"autoencoder": name}:
            _check_known(snapshot, "autoencoder", "--autoencoder", "autoencoder", name)
            return f"autoencoder {name} ({_counted(parts.autoencoder(lake, name, whole=True))})"
        case {"latents": name, "by_token": True}:
            _check_known(snapshot, "encode", "--latents", "latents of", name)
            return f"the copy by token of {name} ({_counted(parts.by_token(lake, name))})"
        case {"latents": name, "run": run}:
            _check_known(snapshot, "encode", "--latents", "latents of", name)
            corpus, number = _run(snapshot, run)
            rows = parts.latents(lake, corpus, [name], number)
            return f"run {run} of {name} ({rows:,} rows); sae encode makes it again"
        case {"latents": name, "corpus": corpus}:
            _check_known(snapshot, "encode", "--latents", "latents of", name)
            return _latents_of_corpus(lake, corpus, [name])
        case {"latents": name}:
            _check_known(snapshot, "encode", "--latents", "latents of", name)
            return f"the latents of {name} ({_counted(parts.autoencoder(lake, name, whole=False))})"
        case {"corpus": corpus, "with_text": True}:
            _check_known(snapshot, "corpus", "--corpus", "corpus", corpus)
            return f"corpus {corpus} ({parts.whole_corpus(lake, corpus):,} rows of latents)"
        case {"corpus": corpus}:
            return _latents_of_corpus(lake, corpus, parts.encoders(snapshot, corpus))
    bounds = _contexts(chosen["contexts"]) if "contexts" in chosen else _of_document(lake, snapshot, chosen["doc"])
    n_contexts, rows = parts.text(lake, _corpus_of(snapshot, bounds), bounds)
    return f"{n_contexts:,} contexts ({rows:,} rows of latents), for good"


def _latents_of_corpus(lake: Lake, corpus: str, names: list[str]) -> str:
    from sae.jobs import drop as parts

    _check_known(lake.snapshot(), "corpus", "--corpus", "corpus", corpus)
    rows = parts.latents(lake, corpus, names)
    return f"the latents of {corpus} by {', '.join(names)} ({rows:,} rows); sae encode makes them again"


def _counted(files: list[DataFile]) -> str:
    return f"{len(files)} files, {sum(file.bytes for file in files):,} bytes"


def _check_known(snapshot: Snapshot, kind: str, flag: str, title: str, name: str) -> None:
    known = _named(snapshot, kind)
    if name not in known:
        raise LakeError(f"{flag}: no {title} {name} in this lake; it has: {', '.join(known) or 'none'}")


def _run(snapshot: Snapshot, given: str) -> tuple[str, int]:
    corpus, _, number = given.rpartition("/")
    if not (corpus and number.isdecimal()):
        raise ConfigError(f"--run: got {given}; expected CORPUS/NUMBER, select corpus, run from runs lists them")
    _check_known(snapshot, "corpus", "--run", "corpus", corpus)
    return corpus, int(number)


def _contexts(given: str) -> Range:
    first, _, last = given.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"--contexts: got {given}; expected FIRST:LAST, the ids of the first and the last that go")
    return int(first), int(last)


def _of_document(lake: Lake, snapshot: Snapshot, doc_id: int) -> Range:
    """The contexts of a document, which follow each other."""
    corpora = _named(snapshot, "corpus").items()
    corpus = next((name for name, state in corpora if state["number"] == doc_id >> CORPUS_SHIFT), None)
    files = snapshot.select("contexts", corpus=corpus) if corpus is not None else []
    ids = lake.read(files, ["context_id"], pc.field("doc_id") == doc_id)["context_id"].to_numpy() if files else []
    if not len(ids):
        raise LakeError(
            f"--doc: no contexts of a document {doc_id}; select doc_id, external_id from documents lists them"
        )
    return int(min(ids)), int(max(ids))


def _corpus_of(snapshot: Snapshot, bounds: Range) -> str:
    """The corpus that the contexts are a part of; raises where they are no part of one, or all of it."""
    for corpus, state in _named(snapshot, "corpus").items():
        files = snapshot.select("contexts", corpus=corpus)
        held = formats.widest(file.contexts for file in files)
        if held is None or held[0] >> CORPUS_SHIFT != bounds[0] >> CORPUS_SHIFT:
            continue
        if not state["complete"]:
            raise IncompleteError(f"drop: corpus {corpus} is not fully tokenized; run sae tokenize first")
        if bounds[0] <= held[0] and held[1] <= bounds[1]:
            raise ConfigError(f"drop: that is all of corpus {corpus}; give --corpus {corpus} --with-text")
        if held[0] <= bounds[0] and bounds[1] <= held[1]:
            return corpus
        raise ConfigError(
            f"--contexts: got {bounds[0]}:{bounds[1]}; corpus {corpus} has the contexts {held[0]}:{held[1]}"
        )
    raise ConfigError(f"--contexts: no corpus has context {bounds[0]}; select min(context_id) from contexts lists them")
