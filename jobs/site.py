"""The Parquet files of schemas/site.py, each made from a lake version by one function of a range of atoms.

An export writes them all; a server makes one when it is asked for.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.jobs.atom_tables import AtomTables, Corpus, spans
from sae.jobs.lake import Range
from sae.schemas.site import ATOMS, ATOMS_PER_BLOCK, ATOMS_PER_GROUP, EFFECTS, METRICS, PAGES, SEQUENCES
from sae.schemas.tables import SCHEMAS as TABLES

Array = npt.NDArray[Any]

_STATISTICS: Final = ("n_active", "density", "mean_act", "mean_act_squared", "max_act", "skew", "kurtosis")
_PEAK_TOKENS: Final = 5
_LOGIT_TOKENS: Final = 5
_PATTERNS_IN_A_LINE: Final = 3
_SOURCES: Final = 20
_KEY: Final = ["atom", "context_id", "pos"]
_ORDER: Final = [("atom", "ascending"), ("kind", "ascending"), ("rank", "ascending")]


class SiteTables:
    """The tables of an autoencoder's site at one version of the lake, for inclusive ranges of atoms.

    Whatever is asked for is in memory, with the latents of its atoms: ask for few atoms at once. Not for use by several
    threads at once.
    """

    def __init__(self, tables: AtomTables) -> None:
        self._tables = tables
        self._documents = functools.cache(lambda number: _Documents.of(tables, number))

    def atoms(self, atoms: Range) -> pa.Table:
        columns = {**self._statistics(atoms), "peak_tokens": self._peak_tokens(atoms)}
        up = _first(self._ranked("logits", atoms, "up"), "atom", _LOGIT_TOKENS)
        columns |= _lists(atoms, up["atom"], logit_tokens=self._tokens(up["token_id"]))
        return _table(ATOMS, columns, atoms[1] + 1 - atoms[0])

    def pages(self, atoms: Range) -> pa.Table:
        hist = self._tables.histograms(atoms)
        source, share = self._sources(atoms)
        lists = {
            **_lists(atoms, hist["atom"], hist_bin=hist["bin"], hist_n=hist["n"]),
            **_lists(atoms, source["atom"], source=source["source"], source_share=share),
        }
        for kind in ("up", "down"):
            logits = self._ranked("logits", atoms, kind)
            named = {f"{kind}_tokens": self._tokens(logits["token_id"]), f"{kind}_logits": logits["value"]}
            lists |= _lists(atoms, logits["atom"], **named)
        for kind, value in (("near", "near_cosine"), ("coactive", "coactive_correlation")):
            others = self._ranked("neighbours", atoms, kind)
            lists |= _lists(atoms, others["atom"], **{kind: others["neighbour"], value: others["value"]})
        explained = self._tables.rows("explanations", atoms, ["atom", "patterns"]).sort_by("atom")
        each = np.repeat(explained["atom"].to_numpy(), _lengths(explained["patterns"]))
        lists |= _lists(atoms, each, patterns=explained["patterns"].combine_chunks().flatten())
        return _table(PAGES, {**self._statistics(atoms), **lists}, atoms[1] + 1 - atoms[0])

    def sequences(self, atoms: Range) -> pa.Table:
        found = self._tables.examples(atoms)
        kind = pa.array(found.kind, pa.string())
        parts = [SEQUENCES.empty_table()]
        for corpus, rows in self._tables.of_corpora(found.columns["context_id"]):
            columns: dict[str, Any] = {name: column[rows] for name, column in found.columns.items()}
            at, ends = spans(found.active.start[rows], found.active.stop[rows])
            offsets = np.concatenate([[0], ends])
            columns |= {
                "idx": columns["pos"],
                "kind": kind.take(pa.array(rows)),
                "pos": _list_array(offsets, found.active.pos[at]),
                "acts": _list_array(offsets, found.active.act[at]),
                "corpus": pa.array([corpus.name] * len(rows), pa.string()),
                **self._text(corpus, columns["context_id"]),
            }
            parts.append(_table(SEQUENCES, columns, len(rows)))
        return pa.concat_tables(parts).sort_by(_ORDER) if len(parts) > 2 else parts[-1]

    def effects(self, atoms: Range) -> pa.Table:
        """Of the examples whose effect is known."""
        made = self._tables.rows("effects", atoms, TABLES["effects"].names)
        if not len(made):
            return EFFECTS.empty_table()
        # Arrow joins no lists.
        keys = made.select(_KEY).append_column("row", pa.array(np.arange(len(made))))
        examples = self._tables.rows("examples", atoms, [*_KEY, "kind", "rank"])
        known = examples.join(keys, _KEY, join_type="inner").sort_by(_ORDER)
        made = made.take(known["row"]).combine_chunks()
        columns: dict[str, Any] = {name: known[name] for name in ("atom", "kind", "rank")}
        for field in EFFECTS:
            if pa.types.is_list(field.type):
                values = made[field.name].combine_chunks().flatten()
                flat = self._tokens(values) if field.type.value_type == pa.string() else values
                columns[field.name] = _list_array(np.append(0, np.cumsum(_lengths(made[field.name]))), flat)
        return _table(EFFECTS, columns, len(known))

    def metrics(self) -> pa.Table:
        found = self._tables.metrics().sort_by([(name, "ascending") for name in ("phase", "metric", "step")])
        return _table(METRICS, {name: found[name] for name in METRICS.names}, found.num_rows)

    def _statistics(self, atoms: Range) -> dict[str, Any]:
        found = self._tables.rows("atoms", atoms, ["atom", *_STATISTICS]).sort_by("atom")
        known = {name: found[name] for name in found.column_names}
        return known | self._mean_effects(atoms) | self._explanations(atoms)

    def _explanations(self, atoms: Range) -> dict[str, pa.Array]:
        """The strongest patterns of each atom in a line, and how their predictions correlate with its activations."""
        made = self._tables.rows("explanations", atoms, ["atom", "patterns", "correlation"])
        line: list[str | None] = [None] * (atoms[1] + 1 - atoms[0])
        score: list[float | None] = [None] * len(line)
        for row in made.to_pylist():
            if row["patterns"]:
                line[row["atom"] - atoms[0]] = " | ".join(row["patterns"][:_PATTERNS_IN_A_LINE])
                score[row["atom"] - atoms[0]] = row["correlation"]
        return {"explanation": pa.array(line, pa.string()), "explanation_score": pa.array(score, pa.float32())}

    def _mean_effects(self, atoms: Range) -> dict[str, pa.Array]:
        """Over the examples of each atom and their later tokens; null where no effect is known."""
        made = self._tables.rows("effects", atoms, ["atom", "loss_diff", "kl"])
        if not len(made):
            return {}
        row = np.repeat(made["atom"].to_numpy() - atoms[0], _lengths(made["kl"]))
        n = np.bincount(row, minlength=atoms[1] + 1 - atoms[0])
        means = {}
        for name, column in (("effect_loss", "loss_diff"), ("effect_kl", "kl")):
            total = np.bincount(row, made[column].combine_chunks().flatten().to_numpy(), len(n))
            means[name] = pa.array(total / np.maximum(n, 1), mask=n == 0)
        return means

    def _ranked(self, table: str, atoms: Range, kind: str) -> pa.Table:
        """Rows of a kind in order of atom and rank."""
        found = self._tables.rows(table, atoms, TABLES[table].names)
        return found.filter(pc.equal(found["kind"], kind)).sort_by([("atom", "ascending"), ("rank", "ascending")])

    def _tokens(self, token_ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        return self._tables.token_strings(token_ids.to_numpy()) if len(token_ids) else pa.array([], pa.string())

    def _peak_tokens(self, atoms: Range) -> pa.Array:
        """The most frequent tokens on which the top examples of each atom peak."""
        examples = self._tables.rows("examples", atoms, ["atom", "kind", "context_id", "pos", "act"])
        examples = examples.filter(pc.equal(examples["kind"], "top"))
        context_id, pos = examples["context_id"].to_numpy(), examples["pos"].to_numpy()
        parts = [pa.schema([("atom", pa.int32()), ("act", pa.float32()), ("token", pa.string())]).empty_table()]
        for corpus, rows in self._tables.of_corpora(context_id):
            tokens = corpus.vocabulary.take(pa.array(corpus.tokens.at(context_id[rows], pos[rows])))
            chosen = examples.take(pa.array(rows))
            parts.append(pa.table([chosen["atom"], chosen["act"], tokens], schema=parts[0].schema))
        counted = pa.concat_tables(parts).group_by(["atom", "token"]).aggregate([("act", "count"), ("act", "max")])
        order = {"atom": "ascending", "act_count": "descending", "act_max": "descending", "token": "ascending"}
        first = _first(counted.sort_by(list(order.items())), "atom", _PEAK_TOKENS)
        return _lists(atoms, first["atom"], token=first["token"])["token"]

    def _text(self, corpus: Corpus, context_id: Array) -> dict[str, pa.Array]:
        """The tokens of contexts [m], and their documents."""
        token_ids, ends, doc_id = corpus.tokens.of_each(context_id)
        documents = self._documents(corpus.number)
        rows = pa.array(np.searchsorted(documents.doc_id, doc_id))
        return {
            "tokens": _list_array(ends, corpus.vocabulary.take(pa.array(token_ids))),
            "doc_id": pa.array(doc_id),
            "source": documents.source.take(rows),
            "external_id": documents.external_id.take(rows),
        }

    def _sources(self, atoms: Range) -> tuple[pa.Table, Array]:
        """Rows of atom and source, the most frequent first, and what share of the atom's activations each has."""
        parts = [pa.schema([("atom", pa.int32()), ("source", pa.string()), ("n", pa.int64())]).empty_table()]
        for _, latents in self._tables.each("latents", atoms, ["atom", "context_id"]):
            context_id, atom = latents["context_id"].to_numpy(), latents["atom"].to_numpy()
            for corpus, rows in self._tables.of_corpora(context_id):
                documents = self._documents(corpus.number)
                of_context = documents.of_contexts[context_id[rows] - corpus.tokens.first_context]
                keys, n = np.unique((atom[rows].astype(np.int64) << 32) | of_context, return_counts=True)
                source = documents.sources.take(pa.array(keys & (2**32 - 1)))
                columns = [pa.array((keys >> 32).astype(np.int32)), source, pa.array(n)]
                parts.append(pa.table(columns, schema=parts[0].schema))
        counted = pa.concat_tables(parts).group_by(["atom", "source"]).aggregate([("n", "sum")])
        whole = np.zeros(atoms[1] + 1 - atoms[0])
        np.add.at(whole, counted["atom"].to_numpy() - atoms[0], counted["n_sum"].to_numpy())
        order = [("atom", "ascending"), ("n_sum", "descending"), ("source", "ascending")]
        first = _first(counted.sort_by(order), "atom", _SOURCES)
        return first, first["n_sum"].to_numpy() / whole[first["atom"].to_numpy() - atoms[0]]


@dataclass(frozen=True)
class _Documents:
    """A corpus' documents [d] in order of doc_id, its distinct sources, and that of each context [c]."""

    doc_id: Array
    source: pa.Array
    external_id: pa.Array
    sources: pa.Array
    of_contexts: Array

    @classmethod
    def of(cls, tables: AtomTables, number: int) -> "_Documents":
        corpus = tables.corpus(number)
        files = tables.snapshot.select("documents", corpus=corpus.name)
        found = tables.lake.read(files, ["doc_id", "source", "external_id"]).sort_by("doc_id").combine_chunks()
        doc_id, coded = found["doc_id"].to_numpy(), found["source"].combine_chunks().dictionary_encode()
        # Dropped contexts have no document.
        row = np.minimum(np.searchsorted(doc_id, corpus.tokens.doc_id), len(doc_id) - 1)
        of_contexts = coded.indices.to_numpy()[row]
        external_id = found["external_id"].combine_chunks()
        return cls(doc_id, found["source"].combine_chunks(), external_id, coded.dictionary, of_contexts)


def block(number: int, atoms: Range) -> Range:
    """The atoms of a block that are in the range."""
    first = number * ATOMS_PER_BLOCK
    return max(first, atoms[0]), min(first + ATOMS_PER_BLOCK - 1, atoms[1])


def blocks(atoms: Range) -> range:
    """The numbers of the blocks that hold some of the atoms."""
    return range(atoms[0] // ATOMS_PER_BLOCK, atoms[1] // ATOMS_PER_BLOCK + 1)


def parquet(table: pa.Table) -> bytes:
    """A file of few row groups."""
    return _written(
        table.schema, (table.slice(at, ATOMS_PER_GROUP) for at in range(0, max(1, len(table)), ATOMS_PER_GROUP))
    )


def parquet_of_atoms(table: pa.Table, number: int) -> bytes:
    """A file with a row group for each atom of the block, in its place; it is empty where there are no rows."""
    first = number * ATOMS_PER_BLOCK
    ends = np.searchsorted(table["atom"].to_numpy(), np.arange(first, first + ATOMS_PER_BLOCK + 1)).tolist()
    groups = itertools.pairwise(ends)
    return _written(table.schema, (table.slice(start, stop - start) for start, stop in groups))


def _written(schema: pa.Schema, groups: Iterator[pa.Table]) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"compression": "snappy", "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(sink, schema.remove_metadata(), **options, use_dictionary=_repeated(schema)) as writer:
        for group in groups:
            writer.write_table(group)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _repeated(schema: pa.Schema) -> list[str]:
    """Columns of which most values occur again: strings, and positions."""
    lists = {field.name: f"{field.name}.list.element" for field in schema if pa.types.is_list(field.type)}
    kinds = {field.name: field.type.value_type if field.name in lists else field.type for field in schema}
    return [
        lists.get(name, name) for name, kind in kinds.items() if kind == pa.string() or name in ("pos", "atom", "rank")
    ]


def _table(schema: pa.Schema, columns: dict[str, Any], rows: int) -> pa.Table:
    """Columns as the schema has them; those that are not given are null or, of lists, empty."""
    return pa.table([_column(field, columns.get(field.name), rows) for field in schema], schema=schema)


def _column(field: pa.Field, given: Any, rows: int) -> Any:
    if given is not None:
        return (
            given.cast(field.type)
            if isinstance(given, pa.Array | pa.ChunkedArray)
            else pa.array(given).cast(field.type)
        )
    if pa.types.is_list(field.type):
        return _empty_lists(field.type, rows)
    return pa.nulls(rows, field.type)


def _empty_lists(kind: pa.DataType, rows: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0] * (rows + 1), pa.int32()), pa.nulls(0, kind.value_type), type=kind)


def _lists(atoms: Range, of_atom: pa.ChunkedArray | Array, **columns: Any) -> dict[str, pa.Array]:
    """The values of each atom of the range as a list; they are in order of atom."""
    ends = np.searchsorted(np.asarray(of_atom), np.arange(atoms[0], atoms[1] + 2))
    return {name: _list_array(ends, values) for name, values in columns.items()}


def _list_array(offsets: Array, values: Any) -> pa.ListArray:
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values)
    kind = pa.list_(pa.field("item", flat.type, nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)


def _lengths(lists: pa.ChunkedArray) -> Array:
    """Of each list [m]."""
    found: Array = pc.list_value_length(lists).to_numpy()
    return found


def _first(table: pa.Table, key: str, n: int) -> pa.Table:
    """The first n rows of each value of a sorted key."""
    values = table[key].to_numpy()
    rank = np.arange(len(values)) - np.searchsorted(values, values)
    return table.filter(pa.array(rank < n))
