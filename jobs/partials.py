"""Partial statistics of an autoencoder's runs, merged by ranges of atoms, so that their number costs no memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae import statistics
from sae.jobs import formats
from sae.jobs.lake import DataFile, Lake
from sae.schemas.tables import ATOMS, EXAMPLES
from sae.statistics import Columns

_ATOMS_AT_ONCE: Final = 1 << 18
_ROWS_AT_ONCE: Final = 1 << 18
_RANKED: Final = ("atom", "context_id", "pos", "act")


def atoms(lake: Lake, moments: Sequence[DataFile], n_latents: int) -> Iterator[pa.Table]:
    """The table `atoms` from the moments of runs, in parts."""
    names = ["atom", "n_active", "sum_act", "sum_act2", "sum_act3", "sum_act4", "max_act"]
    # Sums of floats depend on their order.
    in_order = sorted(moments, key=lambda file: (file.corpus or "", file.run or 0))
    files = [_Rows(path, names) for path in lake.verified(in_order)]
    n_tokens = max(1, sum(file.tokens for file in moments))
    for numbers in _parts(n_latents, _ATOMS_AT_ONCE):
        columns = statistics.atoms((file.up_to(numbers[-1]) for file in files), numbers, n_tokens)
        arrays = [pa.array(columns[field.name], from_pandas=field.nullable) for field in ATOMS]
        yield pa.table(arrays, names=ATOMS.names).cast(ATOMS)


def examples(
    lake: Lake,
    top: Sequence[DataFile],
    samples: Sequence[DataFile],
    before: Sequence[DataFile],
    n_latents: int,
    n: int,
    seed: int,
) -> Iterator[pa.Table]:
    """The table `examples`, at most n a kind, from those of runs and from `before`, the examples of other runs."""
    kinds: list[tuple[str, list[_Rows], Callable[[Columns], Columns]]] = [
        ("random", _ranked(lake, samples, before, "random"), lambda rows: statistics.merged_samples(rows, n, seed)),
        ("top", _ranked(lake, top, before, "top"), lambda rows: statistics.merged_top(rows, n)),
    ]
    at_once = _ROWS_AT_ONCE // (n * max(1, len(top) + len(before)))
    for numbers in _parts(n_latents, max(1, at_once)):
        parts = [merged(_together([file.up_to(numbers[-1]) for file in files])) for _, files, merged in kinds]
        yield _interleaved([kind for kind, _, _ in kinds], parts)


def _interleaved(kinds: Sequence[str], parts: Sequence[Columns]) -> pa.Table:
    """The rows of all kinds, each by atom and rank, in order of (atom, kind, rank)."""
    columns = {**_together(parts), "rank": np.concatenate([_ranks(rows["atom"]) for rows in parts])}
    order = np.argsort(columns["atom"], kind="stable")
    kind = pa.chunked_array([pa.repeat(kind, len(rows["atom"])) for kind, rows in zip(kinds, parts, strict=True)])
    table = pa.table({name: column[order] for name, column in columns.items()})
    return table.append_column("kind", kind.take(pa.array(order))).select(EXAMPLES.names).cast(EXAMPLES)


def _ranks(atom: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of rows that are ordered by atom and rank."""
    starts = np.flatnonzero(np.diff(atom, prepend=-1))
    return np.arange(len(atom)) - np.repeat(starts, np.diff(np.append(starts, len(atom))))


def _parts(n_latents: int, at_once: int) -> Iterator[range]:
    return (range(first, min(first + at_once, n_latents)) for first in range(0, n_latents, at_once))


def _ranked(lake: Lake, partials: Sequence[DataFile], before: Sequence[DataFile], kind: str) -> list["_Rows"]:
    merged = [_Rows(path, [*_RANKED, "kind"], kind) for path in lake.verified(before)]
    return [*merged, *(_Rows(path, list(_RANKED)) for path in lake.verified(partials))]


def _together(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in _RANKED}


class _Rows:
    """A file of rows in order of atoms, read on row group by row group; of a kind, if there are several."""

    def __init__(self, path: str, names: list[str], kind: str | None = None) -> None:
        self._path, self._names, self._kind = path, names, kind
        self._file = formats.parquet(path)
        self._left = iter(range(self._file.metadata.num_row_groups))
        self._held: Columns | None = self._read()

    def up_to(self, last: int) -> Columns:
        """The rows up to an atom, that one included, that no call has given before."""
        taken: list[Columns] = []
        while self._held is not None:
            end = int(np.searchsorted(self._held["atom"], last, side="right"))
            taken.append({name: column[:end] for name, column in self._held.items()})
            if end < len(self._held["atom"]):
                self._held = {name: column[end:] for name, column in self._held.items()}
                break
            self._held = self._read()
        return {name: _joined([part[name] for part in taken]) for name in taken[0]} if taken else self._none()

    def _none(self) -> Columns:
        schema = self._file.schema_arrow
        return {name: np.empty(0, schema.field(name).type.to_pandas_dtype()) for name in self._names if name != "kind"}

    def _read(self) -> Columns | None:
        number = next(self._left, None)
        if number is None:
            return None
        found = formats.columns(self._path, self._file, number, self._names)
        if self._kind is None:
            return found
        kept = found.pop("kind") == self._kind
        return {name: column[kept] for name, column in found.items()}


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
