"""Per-atom statistics of one run of latents: exact, mergeable, computed from the stored values.

A run holds m rows (atom int32, context_id int64, pos uint16, act float32), sorted by (atom, context_id, pos).
All functions are deterministic: the same rows give the same bytes, whatever order they arrived in.
"""

from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from sae.schemas.errors import ConfigError

Array = npt.NDArray[Any]
Columns = dict[str, Array]

MANTISSA_DROPPED: Final = 13  # float32 has 23 mantissa bits; 10 are stored


def round_act(act: Array) -> Array:
    """float32 values rounded to 10 mantissa bits, half to even; relative error at most 2**-11."""
    bits = act.astype(np.float32).view(np.uint32)
    half = (1 << (MANTISSA_DROPPED - 1)) - 1
    rounded = bits + half + ((bits >> MANTISSA_DROPPED) & 1)
    return (rounded >> MANTISSA_DROPPED << MANTISSA_DROPPED).view(np.float32)


def priority(seed: int, atom: Array, context_id: Array, pos: Array) -> Array:
    """uint64 [m]: a hash of (seed, atom, context_id, pos); the smallest ones are a uniform random sample.

    Each key goes through the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    state = _mix(np.full(len(atom), seed, np.uint64))
    for key in (atom, context_id, pos):
        state = _mix(state ^ key.astype(np.uint64))
    return state


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_bin_width(bin_width: float, max_act: float) -> None:
    """Raises ConfigError where the bin of the largest activation has no number."""
    if max_act / bin_width >= 2**31 - 1:
        raise ConfigError(
            f"encode.bin_width: got {bin_width}, too narrow for an activation of {max_act:.4g}: bins are numbered "
            "with 31 bits; widen it"
        )


class RunStatistics(Protocol):
    """A run and its tables, computed by numpy (SortedRun) or on a device (sae.device_statistics.DeviceRun)."""

    def __len__(self) -> int: ...
    def rows(self) -> Columns: ...
    def moments(self) -> Columns: ...
    def histogram(self, bin_width: float) -> Columns: ...
    def top(self, n: int) -> Columns: ...
    def samples(self, n: int, seed: int) -> Columns: ...


@dataclass(frozen=True)
class SortedRun:
    """The rows of a run in (atom, context_id, pos) order."""

    atom: Array
    context_id: Array
    pos: Array
    act: Array

    @classmethod
    def from_rows(cls, atom: Array, context_id: Array, pos: Array, act: Array) -> Self:
        """Sorts rows that arrive in any order; activations must be > 0 and are rounded for storage."""
        first = context_id.min(initial=np.iinfo(np.int64).max)
        token = (context_id - first) * (int(pos.max(initial=0)) + 1) + pos
        # One packed key sorts several times faster than three; it is unique, so the order does not depend on arrival.
        token_bits = int(token.max(initial=1)).bit_length()
        order = np.argsort((atom.astype(np.int64) << token_bits) | token)
        return cls(
            atom[order].astype(np.int32),
            context_id[order].astype(np.int64),
            pos[order].astype(np.uint16),
            round_act(act[order]),
        )

    def __len__(self) -> int:
        return len(self.atom)

    def rows(self) -> Columns:
        return {"atom": self.atom, "context_id": self.context_id, "pos": self.pos, "act": self.act}

    def moments(self) -> Columns:
        """One row per atom: n_active, sums of powers 1 to 4 of the activations, the maximum."""
        starts = _starts(self.atom)
        act = self.act.astype(np.float64)
        columns = {
            "atom": self.atom[starts],
            "n_active": np.diff(np.append(starts, len(self))).astype(np.int64),
        }
        power = np.ones_like(act)
        for name in ("sum_act", "sum_act2", "sum_act3", "sum_act4"):
            power = power * act
            columns[name] = _reduce(np.add, power, starts)
        columns["max_act"] = _reduce(np.maximum, self.act, starts)
        return columns

    def histogram(self, bin_width: float) -> Columns:
        """One row per (atom, bin) with bin = ceil(act / bin_width), in double precision."""
        check_bin_width(bin_width, float(self.act.max(initial=0)))
        bins = np.ceil(self.act.astype(np.float64) / bin_width).astype(np.int64)
        packed = np.sort((self.atom.astype(np.int64) << 32) | bins)
        starts = _starts(packed)
        return {
            "atom": (packed[starts] >> 32).astype(np.int32),
            "bin": (packed[starts] & 0xFFFFFFFF).astype(np.int32),
            "n": np.diff(np.append(starts, len(packed))).astype(np.int64),
        }

    def top(self, n: int) -> Columns:
        """Up to n rows per atom: contexts by highest activation, ties by context_id; pos is its first position."""
        starts = _starts(self.atom, self.context_id)
        peak = _reduce(np.maximum, self.act, starts)
        lengths = np.diff(np.append(starts, len(self)))
        at_peak = np.flatnonzero(self.act == np.repeat(peak, lengths))
        first = at_peak[np.searchsorted(at_peak, starts)]
        return self._best(first, -self.act[first].astype(np.float64), n)

    def samples(self, n: int, seed: int) -> Columns:
        """Up to n rows per atom: the activations with the smallest priority."""
        hashed = priority(seed, self.atom, self.context_id, self.pos)
        chosen = self._candidates(hashed, n)
        columns = self._best(chosen, hashed[chosen], n)
        columns["priority"] = priority(seed, columns["atom"], columns["context_id"], columns["pos"])
        return columns

    def _candidates(self, hashed: Array, n: int) -> Array:
        """Rows that can be among the n smallest of their atom: hot atoms keep a thin, still sufficient, slice."""
        starts = _starts(self.atom)
        counts = np.diff(np.append(starts, len(self)))
        share = np.minimum(4.0 * n / np.maximum(counts, 1), 1.0)
        limit = np.where(share < 1.0, share * 2.0**64, 0).astype(np.uint64)
        keep = (hashed < np.repeat(limit, counts)) | np.repeat(share >= 1.0, counts)
        kept = np.add.reduceat(keep, starts) if len(starts) else counts
        keep |= np.repeat(kept < np.minimum(counts, n), counts)
        return np.flatnonzero(keep)

    def _best(self, rows: Array, key: Array, n: int) -> Columns:
        """The first n of the given rows of each atom by (key, row)."""
        rows = rows[np.lexsort((rows, key, self.atom[rows]))]
        starts = _starts(self.atom[rows])
        rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
        rows = rows[rank < n]
        return {name: column[rows] for name, column in self.rows().items()}


def _starts(*keys: Array) -> Array:
    """Index of the first row of each group of equal keys, in rows sorted by them."""
    if len(keys[0]) == 0:
        return np.zeros(0, np.int64)
    changed = np.zeros(len(keys[0]), bool)
    changed[0] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changed)


def _reduce(ufunc: np.ufunc, values: Array, starts: Array) -> Array:
    return np.asarray(ufunc.reduceat(values, starts)) if len(starts) else values[:0]
