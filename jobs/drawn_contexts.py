"""Contexts that are drawn from all that an autoencoder encoded, with their tokens, and what atoms do on them.

The lake holds every activation above zero, so that those of these contexts are exact and nothing is run again.

Shapes: c contexts, t tokens of all of them.
"""

from dataclasses import dataclass

import numpy as np

from sae.jobs import formats, ranges
from sae.jobs.atom_units import token_ids
from sae.jobs.contexts import Array
from sae.jobs.lake import Lake, Range, Snapshot
from sae.n2g.compiled import Sparse
from sae.schemas.tables import LATENTS


def draw(snapshot: Snapshot, name: str, n: int, seed: int) -> Array:
    """Ascending ids of n of the contexts that an autoencoder encoded, or of all where there are fewer."""
    encoded = ranges.united(file.contexts for file in snapshot.select("moments", autoencoder=name) if file.contexts)
    dropped = [
        (low, high)
        for key, state in snapshot.properties.items()
        if key.startswith("corpus/")
        for low, high in state.get("dropped", [])
    ]
    left = [part for bounds in encoded for part in ranges.without(bounds, dropped)]
    total = ranges.size(left)
    ordinals = np.random.default_rng(seed).choice(total, min(n, total), replace=False, shuffle=False)
    first = np.array([low for low, _ in left], np.int64)
    ends = np.cumsum([high - low + 1 for low, high in left], dtype=np.int64)
    part = np.searchsorted(ends, ordinals, side="right")
    return np.sort(first[part] + ordinals - np.concatenate([[0], ends])[part])


@dataclass(frozen=True)
class Drawn:
    """ids [c]; tokens [t], with offsets [c + 1] of each context and the last one's end; counted [t]: not masked."""

    ids: Array
    tokens: Array
    offsets: Array
    counted: Array

    @classmethod
    def load(cls, lake: Lake, snapshot: Snapshot, ids: Array, masked_positions: tuple[int, ...]) -> "Drawn":
        """Of ascending ids."""
        found = token_ids(lake, snapshot, ids)
        lengths = np.array([len(tokens) for tokens in found], np.int64)
        offsets = np.concatenate([[0], lengths.cumsum()])
        pos = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return cls(ids, np.concatenate([np.empty(0, np.int64), *found]), offsets, ~np.isin(pos, masked_positions))

    def acts(self, lake: Lake, snapshot: Snapshot, name: str, atoms: Range) -> Sparse:
        """Activations of a range of atoms, the first of which is 0 here."""
        parts = [Sparse(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        for file in snapshot.select("latents", autoencoder=name):
            if file.atoms is None or not ranges.within([file.atoms], atoms):
                continue
            (path,) = lake.verified([file])
            for rows in formats.rows_of_atoms(path, formats.parquet(path), LATENTS.names, atoms):
                atom, context_id, pos, act = (rows[key].to_numpy() for key in LATENTS.names)
                row, known = self._rows(context_id)
                at = self.offsets[row[known]] + pos[known]
                parts.append(Sparse(atom[known].astype(np.int64) - atoms[0], at, act[known]))
        return Sparse(*map(np.concatenate, zip(*parts, strict=True)))

    def without(self, found: Sparse, atom: Array, context_id: Array) -> Sparse:
        """What was found at tokens that count, but for some contexts [m] of some atoms [m]."""
        row, known = self._rows(context_id)
        gone = atom[known] * len(self.ids) + row[known]
        own = np.searchsorted(self.offsets, found.at, side="right") - 1
        kept = self.counted[found.at] & ~np.isin(found.atom * len(self.ids) + own, gone)
        return Sparse(*(column[kept] for column in found))

    def n_tokens(self, n_atoms: int, atom: Array, context_id: Array) -> Array:
        """Tokens that count [n_atoms] but for those of some contexts [m] of some atoms [m]."""
        counted = np.concatenate([[0], self.counted.cumsum()])
        of_context = np.diff(counted[self.offsets])
        row, known = self._rows(context_id)
        gone = np.unique(atom[known] * len(self.ids) + row[known])
        taken = np.bincount(gone // len(self.ids), of_context[gone % len(self.ids)], n_atoms)
        left: Array = int(self.counted.sum()) - taken.astype(np.int64)
        return left

    def _rows(self, context_id: Array) -> tuple[Array, Array]:
        """Of contexts [m] the row here, and whether there is one."""
        row = np.minimum(np.searchsorted(self.ids, context_id), len(self.ids) - 1)
        return row, self.ids[row] == context_id
