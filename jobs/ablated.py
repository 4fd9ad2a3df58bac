"""The fields of a sequence in the viewer's JSON that say what ablating the atom changes."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sae.jobs.atom_tables import AtomTables
from sae.jobs.lake import Range
from sae.schemas.tables import EFFECTS

# By what is given of the tokens that are voted on, the names of the viewer's fields and the columns of the table.
_VOTES: Final = {
    f"top_{direction}votes_{by}": f"{direction}_by_{by}" for by in ("logits", "probs") for direction in ("up", "down")
}
_TOKENS: Final = {
    f"top_{direction}vote_tokens_{by}": f"{direction}_tokens_by_{by}"
    for by in ("logits", "probs")
    for direction in ("up", "down")
}

Key = tuple[int, int, int]
"""Atom, context_id and position of an example."""


class Ablated:
    """Effects of a range of atoms, of which each is made into text when it is asked for."""

    def __init__(self, tables: AtomTables, atoms: Range, decimals: int) -> None:
        rows = tables.rows("effects", atoms, EFFECTS.names).combine_chunks()
        keys = zip(*(rows[name].to_pylist() for name in ("atom", "context_id", "pos")), strict=True)
        self._at: dict[Key, int] = {key: at for at, key in enumerate(keys)}
        self.atoms = {atom for atom, _, _ in self._at}
        self._rows, self._decimals = rows, decimals

    def fields(self, key: Key, strings: list[str]) -> str:
        """JSON to go behind the other fields of a sequence, given the JSON of every token of the vocabulary; may be "".

        Entry j is about token j + 1: those before the position are 0 or null.
        """
        at = self._at.get(key)
        if at is None:
            return ""
        pos = key[2]
        loss_diff, kl = (self._numbers(name, at) for name in ("loss_diff", "kl"))
        n_later = len(loss_diff)
        found = {"ablate_loss_diff": ["0.0"] * pos + loss_diff, "kl": ["null"] * pos + kl}
        for name, column in _VOTES.items():
            found[name] = _listed(pos, n_later, self._numbers(column, at))
        for name, column in _TOKENS.items():
            found[name] = _listed(pos, n_later, [strings[token] for token in self._values(column, at).tolist()])
        return "".join(f',"{name}":[{",".join(entries)}]' for name, entries in found.items())

    def _values(self, column: str, at: int) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._rows[column][at].values.to_numpy()
        return values

    def _numbers(self, column: str, at: int) -> list[str]:
        # Adding zero turns a rounded -0.0 into 0.0.
        return list(map(repr, (np.round(self._values(column, at).astype(np.float64), self._decimals) + 0.0).tolist()))


def _listed(before: int, n_later: int, values: list[str]) -> list[str]:
    """A list of equally many values for each later token, null for those before."""
    width = len(values) // max(1, n_later)
    lists = (values[start : start + width] for start in range(0, n_later * width, width or 1))
    return ["null"] * before + [f"[{','.join(each)}]" for each in lists]
