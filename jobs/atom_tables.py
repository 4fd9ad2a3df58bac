"""What a lake version holds of ranges of an autoencoder's atoms, read straight from its files.

A writer of pages, in whatever format, asks this for rows and for examples with all activations of their contexts.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.jobs import formats
from sae.jobs.lake import DataFile, Lake, Range, Snapshot
from sae.jobs.token_cache import Tokens, open_tokens
from sae.schemas.errors import LakeError
from sae.schemas.tables import CORPUS_SHIFT, LATENTS, SCHEMAS

Array = npt.NDArray[Any]

_TABLES: Final = (
    "atoms",
    "examples",
    "histograms",
    "latents",
    "metrics",
    "effects",
    "logits",
    "neighbours",
    "explanations",
    "decoders",
)
_NO_KEYS: Final = np.zeros(0, np.int64)
_NO_ROWS: Final = LATENTS.empty_table().select(["pos", "act"])
_CONTEXT: Final = 2**53 - 1
_ORDER: Final = [("atom", "ascending"), ("kind", "ascending"), ("rank", "ascending")]


@dataclass(frozen=True)
class Active:
    """The activations [p] in the contexts of examples [m], with their positions; those from start to stop are one's."""

    start: Array
    stop: Array
    pos: Array
    act: Array

    @classmethod
    def of(cls, keys: Array, found: Sequence[tuple[Array, pa.Table]]) -> Self:
        """From the rows of each key, which may be parted, in order of position."""
        key, rows = (
            np.concatenate([_NO_KEYS, *(each for each, _ in found)]),
            pa.concat_tables([_NO_ROWS, *(each for _, each in found)]),
        )
        order = np.argsort(key, kind="stable")
        start, stop = (np.searchsorted(key[order], keys, side) for side in ("left", "right"))
        return cls(start, stop, rows["pos"].to_numpy()[order], rows["act"].to_numpy()[order])

    def holds(self, pos: Array, act: Array) -> Array:
        """Whether each example [m] is one of its activations, bool [m]."""
        rows, ends = spans(self.start, self.stop)
        lengths = self.stop - self.start
        same = (self.pos[rows] == np.repeat(pos, lengths)) & (self.act[rows] == np.repeat(act, lengths))
        counted = np.concatenate([[0], np.cumsum(same)])
        held: Array = counted[ends] > counted[ends - lengths]
        return held


@dataclass(frozen=True)
class Examples:
    """Examples [m] of a range of atoms, in order of atom, kind and rank, with the activations in their contexts."""

    kind: list[str]
    columns: dict[str, Array]  # atom, rank, context_id, pos, act: [m] each
    active: Active


@dataclass(frozen=True)
class Corpus:
    """A corpus' text: `vocabulary` holds the string of each token id, `width` is its context length."""

    name: str
    number: int
    width: int
    tokens: Tokens
    vocabulary: pa.Array


class AtomTables:
    """The tables of an autoencoder at one version of the lake; what was opened for one range is kept for the next."""

    def __init__(self, lake: Lake, snapshot: Snapshot, autoencoder: str) -> None:
        self.lake, self.snapshot, self.name = lake, snapshot, autoencoder
        self._files = {table: snapshot.select(table, autoencoder=autoencoder) for table in _TABLES}
        lake.verified(file for files in self._files.values() for file in files)
        self._opened: dict[str, pq.ParquetFile] = {}
        self.corpus = functools.cache(self._corpus)
        self._vocabulary = functools.cache(self._any_vocabulary)

    def rows(self, table: str, atoms: Range, columns: Sequence[str]) -> pa.Table:
        """Columns of the rows of an inclusive range of atoms, in the order of each file."""
        none = pa.schema([SCHEMAS[table].field(column) for column in columns]).empty_table()
        return pa.concat_tables([none, *(rows.cast(none.schema) for _, rows in self.each(table, atoms, columns))])

    def each(self, table: str, atoms: Range, columns: Sequence[str]) -> Iterator[tuple[DataFile, pa.Table]]:
        """The same, part by part, with the file that each is of."""
        for file in self._files[table]:
            if file.atoms and file.atoms[0] <= atoms[1] and atoms[0] <= file.atoms[1]:
                path = self.lake.absolute(file)
                if path not in self._opened:
                    self._opened[path] = formats.parquet(path)
                for rows in formats.rows_of_atoms(path, self._opened[path], columns, atoms):
                    yield file, rows

    def examples(self, atoms: Range) -> Examples:
        """Of an inclusive range of at most 1024 atoms, all in memory.

        Raises LakeError where an example is not among the latents.
        """
        names = ["atom", "rank", "context_id", "pos", "act"]
        found = self.rows("examples", atoms, ["kind", *names]).sort_by(_ORDER)
        columns = {name: found[name].to_numpy() for name in names}
        return Examples(found["kind"].to_pylist(), columns, self._active(atoms, columns))

    def _active(self, atoms: Range, examples: dict[str, Array]) -> Active:
        keys = _keys(examples["atom"] - atoms[0], examples["context_id"])
        wanted, found = np.unique(keys), []
        for file, rows in self.each("latents", atoms, ["atom", "context_id", "pos", "act"]):
            mine = wanted
            if file.contexts:
                contexts = wanted & _CONTEXT
                mine = wanted[(contexts >= file.contexts[0]) & (contexts <= file.contexts[1])]
            of_rows = _keys(rows["atom"].to_numpy() - atoms[0], rows["context_id"].to_numpy())
            start, stop = (np.searchsorted(of_rows, mine, side) for side in ("left", "right"))
            found.append((np.repeat(mine, stop - start), rows.select(["pos", "act"]).take(spans(start, stop)[0])))
        active = Active.of(keys, found)
        missing = np.flatnonzero(~active.holds(examples["pos"], examples["act"]))
        if len(missing):
            raise LakeError(
                f"{self.lake.path}: an example of atom {examples['atom'][missing[0]]} of {self.name} is not among "
                "its latents; run sae aggregate, and if that does not help, sae verify"
            )
        return active

    def histograms(self, atoms: Range) -> pa.Table:
        """Columns atom, bin and n, in order: of all runs together."""
        bins = self.rows("histograms", atoms, ["atom", "bin", "n"])
        counted = bins.group_by(["atom", "bin"]).aggregate([("n", "sum")])
        return counted.rename_columns(["atom", "bin", "n"]).sort_by([("atom", "ascending"), ("bin", "ascending")])

    def directions(self, atoms: Range) -> dict[int, list[float]]:
        """The decoder rows of the atoms, as far as the lake has them."""
        found = self.rows("decoders", atoms, ["atom", "direction"])
        return dict(zip(found["atom"].to_pylist(), found["direction"].to_pylist(), strict=True))

    def metrics(self) -> pa.Table:
        """The autoencoder's rows of table metrics."""
        return pa.concat_tables(
            [SCHEMAS["metrics"].empty_table(), *(self.lake.read([file]) for file in self._files["metrics"])]
        )

    def token_strings(self, token_ids: Array) -> pa.Array:
        """Strings of ids [m] that the subject predicts; its tokenizer need not have them all."""
        vocabulary = self._vocabulary()
        known = token_ids < len(vocabulary)
        found = vocabulary.take(pa.array(np.where(known, token_ids, 0)))
        if known.all():
            return found
        return pc.if_else(pa.array(known), found, pa.array([f"[token {number}]" for number in token_ids]))

    def of_corpora(self, context_id: Array) -> Iterator[tuple[Corpus, Array]]:
        """Each corpus of the contexts [m], and which of them are its own, as rows."""
        numbers = context_id >> CORPUS_SHIFT
        for number in np.unique(numbers).tolist():
            yield self.corpus(number), np.flatnonzero(numbers == number)

    def _any_vocabulary(self) -> pa.Array:
        """All corpora that an autoencoder encodes are of its subject's tokens."""
        moments = self.snapshot.select("moments", autoencoder=self.name)
        return self._strings(next(file.corpus for file in moments if file.corpus))

    def _strings(self, corpus: str) -> pa.Array:
        words = self.lake.read(self.snapshot.select("vocabulary", corpus=corpus), ["token_id", "token"])
        return words.sort_by("token_id")["token"].combine_chunks()

    def _corpus(self, number: int) -> Corpus:
        ours = {key: value for key, value in self.snapshot.properties.items() if key.startswith("corpus/")}
        (key,) = (key for key, value in ours.items() if value["number"] == number)
        corpus = key.removeprefix("corpus/")
        tokens = open_tokens(self.lake, self.snapshot, corpus)
        return Corpus(corpus, number, ours[key]["context_length"], tokens, self._strings(corpus))


def spans(start: Array, stop: Array) -> tuple[Array, Array]:
    """The numbers from each start to its stop, one span after the other, and where in them each span ends."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    return np.repeat(start - ends + lengths, lengths) + np.arange(lengths.sum()), ends


def _keys(atom: Array, context_id: Array) -> Array:
    """Sorted as (atom, context_id); atoms are below 2**10, contexts below 2**53."""
    return (atom.astype(np.int64) << 53) | context_id
