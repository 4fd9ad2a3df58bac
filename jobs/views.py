"""The SQL that opens a lake version: a view per table over exactly the files of that version, then the macros."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final, Protocol

import pyarrow as pa

from sae.jobs import ranges
from sae.schemas.errors import ConfigError
from sae.schemas.tables import SCHEMAS

# What a table's file is about but does not repeat in every row.
_PER_FILE: Final[dict[str, tuple[str, ...]]] = {
    "documents": ("corpus",),
    "contexts": ("corpus",),
    "vocabulary": ("corpus",),
    "latents": ("autoencoder",),
    "latents_by_token": ("autoencoder",),
    "moments": ("autoencoder", "corpus"),
    "histograms": ("autoencoder", "corpus"),
    "top": ("autoencoder", "corpus"),
    "samples": ("autoencoder", "corpus"),
    "atoms": ("autoencoder",),
    "examples": ("autoencoder",),
    "decoders": ("autoencoder",),
    "effects": ("autoencoder",),
    "logits": ("autoencoder",),
    "neighbours": ("autoencoder",),
    "explanations": ("autoencoder",),
    "metrics": ("autoencoder", "corpus"),
    "distributions": ("autoencoder", "corpus"),
}
TABLES: Final = frozenset(_PER_FILE)

Range = tuple[int, int]
Bounds = Mapping[str, Range]
"""Of the rows that are shown, first and last value of a key: atom or context_id."""
# Which attribute of a file says what values of the key are in it.
_RANGES: Final = {"atom": "atoms", "context_id": "contexts"}
_KEYS: Final = {table: [key for key in _RANGES if key in SCHEMAS[table].names] for table in _PER_FILE}
_EVERY_ID: Final = (0, 2**63 - 1)
_EVERY: Final = {"atom": (0, 2**31 - 1), "context_id": _EVERY_ID}

_RUNS: Final = {
    "autoencoder": "VARCHAR",
    "corpus": "VARCHAR",
    "run": "INTEGER",
    "n_tokens": "BIGINT",
    "first_context": "BIGINT",
    "last_context": "BIGINT",
}
_AUTOENCODERS: Final = {
    "autoencoder": "VARCHAR",
    "model": "VARCHAR",
    "hook": "VARCHAR",
    "d_model": "INTEGER",
    "n_latents": "INTEGER",
    "k": "INTEGER",
    "corpus": "VARCHAR",
    "step": "BIGINT",
    "tokens": "BIGINT",
    "complete": "BOOLEAN",
    "bin_width": "DOUBLE",
}
_CORPORA: Final = {
    "corpus": "VARCHAR",
    "number": "INTEGER",
    "context_length": "INTEGER",
    "n_documents": "BIGINT",
    "n_contexts": "BIGINT",
    "n_tokens": "BIGINT",
    "complete": "BOOLEAN",
}


class File(Protocol):
    """What a view needs to know of a file."""

    @property
    def path(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def corpus(self) -> str | None: ...
    @property
    def autoencoder(self) -> str | None: ...
    @property
    def run(self) -> int | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def atoms(self) -> Range | None: ...
    @property
    def contexts(self) -> Range | None: ...


def query(name: str) -> str:
    """The text of schemas/sql/NAME.sql."""
    return resources.files("sae.schemas").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def bounds(atoms: Range | None = None, contexts: Range | None = None) -> Bounds:
    """Of the ranges that are given; raises ConfigError where one ends before it begins."""
    given = {key: bound for key, bound in (("atom", atoms), ("context_id", contexts)) if bound is not None}
    for key, (first, last) in given.items():
        if first > last:
            raise ConfigError(f"{key}: got {first} to {last}; give the first and the last that you want, in this order")
    return given


def may_show(file: File, bounds: Bounds) -> bool:
    """Whether any row of a table's file can lie within the bounds, as the manifest has it."""
    for key in _keys(file.table, bounds):
        held, (low, high) = getattr(file, _RANGES[key]), bounds[key]
        if held is not None and not (held[0] <= high and low <= held[1]):
            return False
    return True


def _keys(table: str, bounds: Bounds) -> list[str]:
    """The bounded keys that the table has."""
    return [key for key in _KEYS[table] if key in bounds]


def statements(root: str, files: Collection[File], properties: Mapping[str, Any], bounds: Bounds | None = None) -> str:
    """CREATE statements for all views and macros of a lake version at `root`, of rows within the bounds."""
    views = _table_views(root, files, bounds or {}, TABLES)
    views.append(_values_view("runs", _RUNS, _runs([file for file in files if file.table == "moments"])))
    views.append(_values_view("autoencoders", _AUTOENCODERS, _autoencoders(properties)))
    views.append(_values_view("corpora", _CORPORA, _properties(properties, "corpus")))
    views.append(query("example_contexts"))
    return "\n".join([*views, *_macros()])


def limited_statements() -> str:
    """CREATE statements for a schema of views that hide those of `statements` and show what lies within a connection's
    bounds: variables that `within` sets.
    """
    views = [
        f"create view limited.{table} as select * from main.{table} where {_within(_limits(table))};"
        for table in sorted(TABLES)
        if _KEYS[table]
    ]
    return "\n".join(["create schema limited;", *views])


def _limits(table: str) -> dict[str, tuple[str, str]]:
    return {key: (f"getvariable('first_{key}')", f"getvariable('last_{key}')") for key in _KEYS[table]}


def _within(limits: Mapping[str, tuple[Any, Any]]) -> str:
    return " and ".join(f"{key} between {low} and {high}" for key, (low, high) in limits.items())


def within(root: str, files: Collection[File], bounds: Bounds) -> str:
    """What has a connection's views show the rows within the bounds: variables, and views of fewer files.

    DuckDB opens every file that a view names, be it only to see from its footer that it is not needed.
    """
    limits = {key: bounds.get(key, _EVERY[key]) for key in _RANGES}
    variables = [
        f"set variable {name}_{key} = {value}::bigint;"
        for key, bound in limits.items()
        for name, value in zip(("first", "last"), bound, strict=True)
    ]
    fewer = {file.table for file in files if not may_show(file, bounds)}
    # It shows the latents of which there is no copy by token.
    fewer |= {"latents_by_token"} if "latents" in fewer else set()
    return "\n".join([*variables, *_table_views(root, files, bounds, fewer)])


def _table_views(root: str, files: Iterable[File], bounds: Bounds, tables: Collection[str]) -> list[str]:
    by_table: dict[str, list[File]] = {table: [] for table in _PER_FILE}
    for file in files:
        if file.table in by_table:
            by_table[file.table].append(file)
    branches = {table: _branches(root, table, by_table[table], bounds) for table in _PER_FILE if table in tables}
    if "latents_by_token" in tables:
        branches["latents_by_token"] += _not_by_token(root, by_table, bounds)
    return [_table_view(table, each) for table, each in branches.items()]


def _macros() -> list[str]:
    folder = resources.files("sae.schemas").joinpath("sql", "macros")
    return [
        entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".sql")
    ]


def _table_view(table: str, branches: list[str]) -> str:
    body = "\nunion all ".join(branches) if branches else _empty(table)
    return f"create or replace view {table} as {body};"


def _branches(
    root: str, table: str, files: list[File], bounds: Bounds, contexts: Sequence[Range] = (_EVERY_ID,)
) -> list[str]:
    """A SELECT for each autoencoder or corpus, over the files that can hold rows within the bounds."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    # DuckDB opens every file that a view names, be it only to see from its footer that it is not needed.
    for file in (file for file in files if may_show(file, bounds)):
        key = tuple(getattr(file, column) for column in _PER_FILE[table])
        groups.setdefault(key, []).append(f"{root}/{file.path}")
    conditions = [f"{key} between {bounds[key][0]} and {bounds[key][1]}" for key in _keys(table, bounds)]
    if contexts != (_EVERY_ID,):
        conditions.append(f"({' or '.join(f'context_id between {low} and {high}' for low, high in contexts)})")
    where = f" where {' and '.join(conditions)}" if conditions else ""
    return [
        f"select {_constants(table, key)}, * from read_parquet([{', '.join(map(quote, sorted(paths)))}]){where}"
        for key, paths in sorted(groups.items(), key=lambda item: str(item[0]))
    ]


def _not_by_token(root: str, by_table: Mapping[str, list[File]], bounds: Bounds) -> Iterator[str]:
    """SELECTs of the latents of which there is no copy by token."""
    for name in sorted({str(file.autoencoder) for file in by_table["latents"]}):
        files, copies, moments = (
            [file for file in by_table[table] if file.autoencoder == name]
            for table in ("latents", "latents_by_token", "moments")
        )
        left = _without_copy(copies, moments)
        files = [file for file in files if ranges.within(left, file.contexts or _EVERY_ID)]
        yield from _branches(root, "latents", files, bounds, left)


def _without_copy(copies: list[File], moments: list[File]) -> Sequence[Range]:
    """The contexts of an autoencoder's runs that have no copy by token."""
    if not copies:
        return (_EVERY_ID,)
    copied = {(file.corpus, file.run) for file in copies}
    runs = [file for file in moments if file.rows and (file.corpus, file.run) not in copied]
    held = [file.contexts or _EVERY_ID for file in copies]
    return ranges.united(part for run in runs for part in ranges.without(run.contexts or _EVERY_ID, held))


def _constants(table: str, values: tuple[str | None, ...]) -> str:
    return ", ".join(
        f"{quote(value)}::varchar as {column}" for column, value in zip(_PER_FILE[table], values, strict=True)
    )


def _empty(table: str) -> str:
    constants = [f"null::varchar as {column}" for column in _PER_FILE[table]]
    columns = [f'null::{_duckdb_type(field.type)} as "{field.name}"' for field in SCHEMAS[table]]
    return f"select {', '.join(constants + columns)} where false"


def _duckdb_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return _duckdb_type(kind.value_type) + "[]"
    names = {pa.int64(): "bigint", pa.int32(): "integer", pa.uint16(): "usmallint", pa.uint64(): "ubigint"}
    names |= {pa.float32(): "float", pa.float64(): "double", pa.string(): "varchar"}
    return names[kind]


def _runs(moments: list[File]) -> list[dict[str, Any]]:
    return [
        {
            "autoencoder": file.autoencoder,
            "corpus": file.corpus,
            "run": file.run,
            "n_tokens": file.tokens,
            "first_context": file.contexts[0] if file.contexts else None,
            "last_context": file.contexts[1] if file.contexts else None,
        }
        for file in moments
    ]


def _autoencoders(properties: Mapping[str, Any]) -> list[dict[str, Any]]:
    widths = {row["autoencoder"]: row["bin_width"] for row in _properties(properties, "encode", "autoencoder")}
    return [
        {**row, "bin_width": widths.get(row["autoencoder"])}
        for row in _properties(properties, "autoencoder", "autoencoder")
    ]


def _properties(properties: Mapping[str, Any], kind: str, name: str | None = None) -> list[dict[str, Any]]:
    prefix = f"{kind}/"
    return [
        {**value, name or kind: key.removeprefix(prefix)}
        for key, value in sorted(properties.items())
        if key.startswith(prefix)
    ]


def _values_view(name: str, columns: Mapping[str, str], rows: list[dict[str, Any]]) -> str:
    selects = [
        "select " + ", ".join(f"{_literal(row.get(key))}::{kind} as {key}" for key, kind in columns.items())
        for row in rows
    ]
    empty = "select " + ", ".join(f"null::{kind} as {key}" for key, kind in columns.items()) + " where false"
    body = "\nunion all ".join(selects) if selects else empty
    return f"create or replace view {name} as {body};"


def _literal(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else quote(str(value))


def quote(text: str | None) -> str:
    """A SQL string literal."""
    return "null" if text is None else "'" + text.replace("'", "''") + "'"
