"""Sorted files of latents as one stream of rows in the same order, of which a bounded part is in memory.

Files of disjoint atoms that follow each other form a chain; a chain is read row group by row group. A row is held as
one integer that sorts as the row does. What is not after the last row held of any chain is complete: it is sorted and
handed over, and the rest waits for the next row groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae.jobs import formats, ranges
from sae.jobs.formats import RowGroup
from sae.jobs.ranges import Range
from sae.schemas.errors import LakeError
from sae.schemas.tables import CORPUS_SHIFT, LATENTS
from sae.statistics import ACT_CODES, MANTISSA_DROPPED, Fields, act_of

CHAIN_BYTES: Final = 12 << 20
"""Memory that a chain takes at most: a row group that is held, sorted and written. Measured."""

_ORDINAL: Final = (1 << CORPUS_SHIFT) - 1
Chain = Sequence[str]
"""Paths in order of their atoms."""
Keys = npt.NDArray[np.int64]
Rows = dict[str, npt.NDArray[Any]]


def merged(chains: Sequence[Chain], atoms: Range, contexts: Sequence[Range] | None = None) -> Iterator[pa.Table]:
    """The rows of an inclusive range of atoms in order of (atom, context_id, pos).

    Of contexts, all or those of the given ranges, which are united. Tables come in multiples of the Parquet row group,
    but for the last.
    Raises LakeError where a file is damaged or was not written by encode or compact.
    """
    groups = [[group for group in row_groups(chain) if group.overlaps(atoms)] for chain in chains]
    groups = [each for each in groups if each]
    for part in _packable([group for each in groups for group in each], atoms):
        within = [[group for group in each if group.overlaps(part.atoms)] for each in groups]
        sources = [_Source(each, part, contexts) for each in within]
        for keys in _in_row_groups(_rounds(sources)):
            yield part.unpack(keys)


def act_codes(act: npt.NDArray[np.float32], path: str) -> npt.NDArray[np.int32]:
    """Stored activations [m] of a file as integers of the same order; raises LakeError where encode wrote no such."""
    found = act.view(np.int32)
    bits = int(np.bitwise_or.reduce(found)) if len(found) else 0
    if bits < 0 or bits & ((1 << MANTISSA_DROPPED) - 1):
        raise LakeError(
            f"{path}: holds activations that are not positive and rounded to 10 bits; encode writes such, "
            "restore the file from a copy"
        )
    return found >> MANTISSA_DROPPED


def row_groups(chain: Chain) -> Iterator[RowGroup]:
    """Of every file, from its footer alone."""
    for path in chain:
        yield from formats.row_groups(path)


@dataclass(frozen=True)
class _Packing:
    """Rows as integers: atom, corpus, ordinal of the context in its corpus, position and activation."""

    atoms: tuple[int, int]
    first_corpus: int
    fields: Fields

    @classmethod
    def of(cls, groups: Sequence[RowGroup], atoms: tuple[int, int]) -> "_Packing":
        corpora = [each >> CORPUS_SHIFT for group in groups for each in group.contexts] or [0]
        # A row group of several corpora may hold any ordinal of the first.
        alone = all(group.contexts[0] >> CORPUS_SHIFT == group.contexts[1] >> CORPUS_SHIFT for group in groups)
        ordinal = max((group.contexts[1] & _ORDINAL for group in groups), default=0) if alone else _ORDINAL
        last_pos = max((group.last_pos for group in groups), default=0)
        largest = atoms[1] - atoms[0], max(corpora) - min(corpora), ordinal, last_pos, ACT_CODES - 1
        return cls(atoms, min(corpora), Fields(*largest))

    def pack(self, rows: Rows, path: str) -> Keys:
        code = act_codes(rows["act"], path)
        context = rows["context_id"]
        corpus = (context >> CORPUS_SHIFT) - self.first_corpus
        atom = rows["atom"] - np.int32(self.atoms[0])
        return self.fields.pack(atom, corpus, context & _ORDINAL, rows["pos"], code)

    def unpack(self, keys: Keys) -> pa.Table:
        atom, corpus, context, pos, code = self.fields.unpack(keys, np.int32, np.int16, np.int64, np.uint16, np.int32)
        atom += np.int32(self.atoms[0])
        if self.fields.widths[1] or self.first_corpus:
            context |= (corpus.astype(np.int64) + self.first_corpus) << CORPUS_SHIFT
        return pa.table([atom, context, pos, act_of(code)], schema=LATENTS)


def _packable(groups: Sequence[RowGroup], atoms: tuple[int, int]) -> Iterator[_Packing]:
    """Packings of ranges of atoms, one after the other: a single one, unless it has too many bits."""
    packing = _Packing.of(groups, atoms)
    if packing.fields.fits:
        yield packing
        return
    if atoms[0] == atoms[1]:
        raise LakeError(f"atom {atoms[0]}: its contexts and positions don't fit 63 bits; encode shorter contexts")
    middle = sum(atoms) // 2
    for part in ((atoms[0], middle), (middle + 1, atoms[1])):
        yield from _packable([group for group in groups if group.overlaps(part)], part)


class _Source:
    """A chain being read."""

    def __init__(self, groups: Sequence[RowGroup], packing: _Packing, contexts: Sequence[Range] | None) -> None:
        self._left, self._packing, self._contexts = list(reversed(groups)), packing, contexts
        self._open: tuple[str, pq.ParquetFile] | None = None
        self._held: Keys = np.empty(0, np.int64)

    def fill(self) -> None:
        """Read on if nothing is held."""
        # Little at a time: fresh memory costs more than sorting does.
        while self._left and not len(self._held):
            self._held = self._read(self._left.pop())

    @property
    def last(self) -> int | None:
        """The last key held where there are more to come."""
        return int(self._held[-1]) if self._left else None

    def take(self, last: int | None) -> Keys:
        """Hand over the keys up to the given one."""
        cut = len(self._held) if last is None else int(np.searchsorted(self._held, last, side="right"))
        taken, self._held = self._held[:cut], self._held[cut:]
        return taken

    def _read(self, group: RowGroup) -> Keys:
        if self._open is None or self._open[0] != group.path:
            self._open = group.path, formats.parquet(group.path)
        rows = formats.columns(*self._open, group.number, LATENTS.names)
        low, high = self._packing.atoms
        start, end = np.searchsorted(rows["atom"], [low, high + 1])
        rows = {name: column[start:end] for name, column in rows.items()}
        if self._contexts is not None:
            kept = ranges.contains(self._contexts, rows["context_id"])
            rows = {name: column[kept] for name, column in rows.items()}
        return self._packing.pack(rows, group.path)


def _rounds(sources: list[_Source]) -> Iterator[Keys]:
    more = bool(sources)
    while more:
        for source in sources:
            source.fill()
        lasts = [last for source in sources if (last := source.last) is not None]
        last = min(lasts, default=None)
        keys = np.concatenate([source.take(last) for source in sources])
        keys.sort()
        yield keys
        more = last is not None


def _in_row_groups(rounds: Iterable[Keys]) -> Iterator[Keys]:
    waiting = np.empty(0, np.int64)
    for keys in rounds:
        together = np.concatenate([waiting, keys]) if len(waiting) else keys
        whole = len(together) - len(together) % formats.LATENTS_ROW_GROUP
        if whole:
            yield together[:whole]
        waiting = together[whole:].copy()
    if len(waiting):
        yield waiting
