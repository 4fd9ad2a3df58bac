"""The viewer's JSON of atoms, put together from the lake's files: many thousands of pages in a minute, or one at once.

The text is what `AtomFile` would be written as; whatever is the same in many sequences is written once: tokens,
contexts and numbers.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from sae.jobs import formats
from sae.jobs.lake import DataFile, Lake, Range, Snapshot
from sae.jobs.token_cache import Tokens, open_tokens
from sae.schemas.errors import LakeError
from sae.schemas.tables import CORPUS_SHIFT, LATENTS, SCHEMAS
from sae.schemas.viewer import AtomFile

Array = npt.NDArray[Any]

_TABLES: Final = ("atoms", "examples", "histograms", "latents")
_KEPT_TOKENS: Final = 4_000_000  # of contexts whose JSON is kept: about 100 MB
_KINDS: Final = ("top", "random")
_NO_KEYS: Final = np.zeros(0, np.int64)
_NO_ROWS: Final = LATENTS.empty_table().select(["pos", "act"])
_CONTEXT: Final = 2**53 - 1
_NO_SEQUENCES: Final = '"top":[],"random":[]}'


class _Numbers(dict[float, str]):
    """Activations as JSON, rounded to some decimals, half away from zero as SQL does it."""

    def __init__(self, decimals: int) -> None:
        self._scale = 10.0**decimals

    def __missing__(self, act: float) -> str:
        scaled = act * self._scale
        rounded = act
        if not math.isinf(scaled):
            whole = math.floor(scaled)
            rounded = (whole + (scaled - whole >= 0.5)) / self._scale
        self[act] = text = _json(rounded)
        return text


class _Contexts:
    """The token ids of a corpus' contexts and their strings, as JSON without the brackets."""

    def __init__(self, tokens: Tokens, vocabulary: Sequence[str], width: int) -> None:
        self._tokens = tokens
        self._strings = [_json(token) for token in vocabulary]
        self._numbers = [str(number) for number in range(len(vocabulary))]
        self.of = functools.lru_cache(max(1, _KEPT_TOKENS // width))(self._of)

    def _of(self, context_id: int) -> tuple[str, str, int, int]:
        """Strings, ids, how many there are, and the document."""
        token_ids, document = self._tokens.of(context_id)
        strings = ",".join([self._strings[token_id] for token_id in token_ids])
        return strings, ",".join([self._numbers[token_id] for token_id in token_ids]), len(token_ids), document


@dataclass(frozen=True)
class _Active:
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
        rows, ends = _spans(self.start, self.stop)
        lengths = self.stop - self.start
        same = (self.pos[rows] == np.repeat(pos, lengths)) & (self.act[rows] == np.repeat(act, lengths))
        counted = np.concatenate([[0], np.cumsum(same)])
        held: Array = counted[ends] > counted[ends - lengths]
        return held


class Pages:
    """The pages of an autoencoder at one version of the lake; what was read for one is kept for the next."""

    def __init__(self, lake: Lake, snapshot: Snapshot, autoencoder: str, decimals: int) -> None:
        self._lake, self._snapshot, self._name = lake, snapshot, autoencoder
        self._files = {table: snapshot.select(table, autoencoder=autoencoder) for table in _TABLES}
        lake.verified(file for files in self._files.values() for file in files)
        self._opened: dict[str, pq.ParquetFile] = {}
        self._corpora: dict[int, _Contexts] = {}
        self._numbers = _Numbers(decimals)
        self._shares: dict[tuple[int, int], str] = {}

    def of(self, atoms: Range) -> Iterator[tuple[int, bytes]]:
        """Atom and JSON of an inclusive range.

        All its rows are in memory: give few atoms at once. Raises LakeError where the examples are not of the latents.
        """
        heads = self._heads(atoms)
        sequences = self._sequences(atoms)
        for atom, head in heads:
            top, random = (",".join(sequences.get((atom, kind), ())) for kind in _KINDS)
            yield atom, f'{head.removesuffix(_NO_SEQUENCES)}"top":[{top}],"random":[{random}]}}'.encode()

    def _rows(self, table: str, atoms: Range, columns: Sequence[str]) -> pa.Table:
        none = pa.schema([SCHEMAS[table].field(column) for column in columns]).empty_table()
        return pa.concat_tables([none, *(rows.cast(none.schema) for _, rows in self._each(table, atoms, columns))])

    def _each(self, table: str, atoms: Range, columns: Sequence[str]) -> Iterator[tuple[DataFile, pa.Table]]:
        for file in self._files[table]:
            if file.atoms and file.atoms[0] <= atoms[1] and atoms[0] <= file.atoms[1]:
                path = self._lake.absolute(file)
                if path not in self._opened:
                    self._opened[path] = formats.parquet(path)
                for rows in formats.rows_of_atoms(path, self._opened[path], columns, atoms):
                    yield file, rows

    def _heads(self, atoms: Range) -> Iterator[tuple[int, str]]:
        """Each atom's page without sequences."""
        names = ["density", "mean_act", "mean_act_squared", "skew", "kurtosis"]
        statistics = self._rows("atoms", atoms, ["atom", *names]).to_pylist()
        bins = self._rows("histograms", atoms, ["atom", "bin", "n"])
        counted = (
            bins.group_by(["atom", "bin"])
            .aggregate([("n", "sum")])
            .sort_by([("atom", "ascending"), ("bin", "ascending")])
        )
        start = np.searchsorted(counted["atom"].to_numpy(), np.arange(atoms[0], atoms[1] + 2))
        every, counts = counted["bin"].to_pylist(), counted["n_sum"].to_pylist()
        for row in statistics:
            atom = row.pop("atom")
            mine = slice(start[atom - atoms[0]], start[atom - atoms[0] + 1])
            hist = {str(bin_): n for bin_, n in zip(every[mine], counts[mine], strict=True)}
            yield atom, AtomFile(**row, hist=hist, top=[], random=[]).model_dump_json(exclude_unset=True)

    def _sequences(self, atoms: Range) -> dict[tuple[int, str], list[str]]:
        """The JSON of sequences in order of rank, by atom and kind."""
        examples = self._rows("examples", atoms, ["atom", "kind", "context_id", "pos", "act"])
        columns = {name: examples[name].to_numpy() for name in ("atom", "context_id", "pos", "act")}
        active = self._active(atoms, columns)
        numbers = self._numbers
        positions, texts = active.pos.tolist(), [numbers[act] for act in active.act.tolist()]
        rows = (*columns.values(), active.start, active.stop)
        found: dict[tuple[int, str], list[str]] = {}
        for kind, *row in zip(examples["kind"].to_pylist(), *(column.tolist() for column in rows), strict=True):
            atom, context_id, idx, act, start, stop = row
            strings, token_ids, n, document = self._contexts(context_id).of(context_id)
            acts = _spread(positions[start:stop], texts[start:stop], n)
            found.setdefault((atom, kind), []).append(
                f'{{"tokens":[{strings}],"acts":[{acts}],"act":{numbers[act]},"idx":{idx},"doc_id":{document},'
                f'"density":{self._share(stop - start, n)},"token_ints":[{token_ids}]}}'
            )
        return found

    def _active(self, atoms: Range, examples: dict[str, Array]) -> _Active:
        """The activations in the contexts of the examples; raises LakeError where one's own is not among them."""
        keys = _keys(examples["atom"] - atoms[0], examples["context_id"])
        wanted, found = np.unique(keys), []
        for file, rows in self._each("latents", atoms, ["atom", "context_id", "pos", "act"]):
            mine = wanted
            if file.contexts:
                contexts = wanted & _CONTEXT
                mine = wanted[(contexts >= file.contexts[0]) & (contexts <= file.contexts[1])]
            of_rows = _keys(rows["atom"].to_numpy() - atoms[0], rows["context_id"].to_numpy())
            start, stop = (np.searchsorted(of_rows, mine, side) for side in ("left", "right"))
            found.append((np.repeat(mine, stop - start), rows.select(["pos", "act"]).take(_spans(start, stop)[0])))
        active = _Active.of(keys, found)
        missing = np.flatnonzero(~active.holds(examples["pos"], examples["act"]))
        if len(missing):
            raise LakeError(
                f"{self._lake.path}: an example of atom {examples['atom'][missing[0]]} of {self._name} is not among "
                "its latents; run sae aggregate, and if that does not help, sae verify"
            )
        return active

    def _contexts(self, context_id: int) -> _Contexts:
        number = context_id >> CORPUS_SHIFT
        found = self._corpora.get(number)
        if found is None:
            found = self._corpora[number] = self._opened_corpus(number)
        return found

    def _opened_corpus(self, number: int) -> _Contexts:
        ours = {key: value for key, value in self._snapshot.properties.items() if key.startswith("corpus/")}
        (key,) = (key for key, value in ours.items() if value["number"] == number)
        corpus = key.removeprefix("corpus/")
        words = self._lake.read(self._snapshot.select("vocabulary", corpus=corpus), ["token_id", "token"])
        vocabulary = words.sort_by("token_id")["token"].to_pylist()
        width = ours[key]["context_length"]
        return _Contexts(open_tokens(self._lake, self._snapshot, corpus), vocabulary, width)

    def _share(self, part: int, whole: int) -> str:
        found = self._shares.get((part, whole))
        if found is None:
            found = self._shares[part, whole] = _json(part / whole)
        return found


def _spread(positions: list[int], texts: list[str], n: int) -> str:
    """n numbers as JSON: the texts at their positions, in rising order, and zeros elsewhere."""
    parts: list[str] = []
    following = 0
    for position, text in zip(positions, texts, strict=True):
        parts += ("0.0," * (position - following), text, ",")
        following = position + 1
    return "".join((*parts, "0.0," * (n - following)))[:-1]


def _spans(start: Array, stop: Array) -> tuple[Array, Array]:
    """The numbers from each start to its stop, one span after the other, and where in them each span ends."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    return np.repeat(start - ends + lengths, lengths) + np.arange(lengths.sum()), ends


def _keys(atom: Array, context_id: Array) -> Array:
    """Sorted as (atom, context_id); atoms are below 2**10, contexts below 2**53."""
    return (atom.astype(np.int64) << 53) | context_id


def _json(value: Any) -> str:
    return to_json(value).decode()
