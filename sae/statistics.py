"""Per-atom statistics of one run of latents: exact, mergeable, computed from the stored values.

A run holds m rows (atom int32, context_id int64, pos uint16, act float32), sorted by (atom, context_id, pos).
All functions are deterministic: the same rows give the same bytes, whatever order they arrived in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from sae.schemas.errors import ConfigError

Array = npt.NDArray[Any]
Columns = dict[str, Array]

MANTISSA_DROPPED: Final = 13  # float32 has 23 mantissa bits; 10 are stored
ACT_CODES: Final = 1 << (31 - MANTISSA_DROPPED)  # rounded positive values
_BLOCK: Final = 16_384
_POWERS: Final = ("sum_act", "sum_act2", "sum_act3", "sum_act4")


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
    state = np.empty(len(atom), np.uint64)
    for block in _blocks(len(atom)):
        mixed = _mix(np.full(len(atom[block]), seed, np.uint64))
        for key in (atom, context_id, pos):
            mixed ^= key[block].astype(np.uint64)
            mixed = _mix(mixed)
        state[block] = mixed
    return state


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Fields:
    """Non-negative integers side by side in one of 63 bits, so that rows are sorted without a key beside them.

    To sort whole rows is several times faster than to find their order and to gather each column.
    """

    def __init__(self, *largest: int) -> None:
        """The largest value of each field, the first of which decides the order."""
        self.widths = [int(value).bit_length() for value in largest]
        self.below_first = sum(self.widths[1:])
        self.fits = self.below_first + self.widths[0] <= 63

    def pack(self, *fields: Array) -> Array:
        """int64 [m]; there must be room."""
        packed = np.empty(len(fields[0]), np.int64)
        for block in _blocks(len(packed)):
            mine = packed[block]
            mine[:] = fields[0][block]
            for width, field in zip(self.widths[1:], fields[1:], strict=True):
                mine <<= width
                mine |= field[block]
        return packed

    def unpack(self, packed: Array, *types: npt.DTypeLike) -> list[Array]:
        """The fields, each of its type."""
        found = [np.empty(len(packed), kind) for kind in types]
        for block in _blocks(len(packed)):
            left = packed[block].copy()
            for width, field in zip(reversed(self.widths[1:]), reversed(found[1:]), strict=True):
                field[block] = left & ((1 << width) - 1)
                left >>= width
            found[0][block] = left
        return found


def _blocks(m: int) -> Iterator[slice]:
    """Parts of m rows that stay in the cache while several things are done to them: fresh memory costs more."""
    return (slice(start, start + _BLOCK) for start in range(0, m, _BLOCK))


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
        first = int(context_id.min(initial=np.iinfo(np.int64).max))
        context, code = context_id - first, _code(round_act(act))
        # Keys are unique, so the order does not depend on arrival, nor on activations.
        largest = (int(column.max(initial=0)) for column in (atom, context, pos))
        fields = Fields(*largest, ACT_CODES - 1)
        if fields.fits:
            rows = fields.pack(atom, context, pos, code)
            rows.sort()
            atom, context, pos, code = fields.unpack(rows, np.int32, np.int64, np.uint16, np.int32)
        else:
            order = np.lexsort((pos, context, atom))
            atom, context, pos, code = (column[order] for column in (atom, context, pos, code))
        context += first
        return cls(atom.astype(np.int32, copy=False), context, pos.astype(np.uint16, copy=False), act_of(code))

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
        for name in _POWERS:
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
        atom, context_id = self.atom[starts], self.context_id[starts]
        # The largest of these is the highest activation's first position.
        last_pos = int(self.pos.max(initial=0))
        peaks = Fields(ACT_CODES - 1, last_pos)
        falling_pos = np.uint16(last_pos) - self.pos
        highest = _reduce(np.maximum, peaks.pack(_code(self.act), falling_pos), starts)
        code, falling_pos = peaks.unpack(highest, np.int32, np.int32)
        first = int(context_id.min(initial=0))
        context, falling, pos = context_id - first, ACT_CODES - 1 - code, last_pos - falling_pos
        largest = int(atom.max(initial=0)), ACT_CODES - 1, int(context.max(initial=0)), last_pos
        fields = Fields(*largest)
        if fields.fits:
            rows = fields.pack(atom, falling, context, pos)
            rows.sort()
            chosen = rows[_first_of_groups(_starts(rows >> fields.below_first), len(rows), n)]
            atom, falling, context, pos = fields.unpack(chosen, np.int32, np.int32, np.int64, np.uint16)
        else:
            order = np.lexsort((context, falling, atom))
            order = order[_first_of_groups(_starts(atom[order]), len(order), n)]
            atom, falling, context, pos = (column[order] for column in (atom, falling, context, pos))
        return {
            "atom": atom.astype(np.int32),
            "context_id": context + first,
            "pos": pos.astype(np.uint16),
            "act": act_of(ACT_CODES - 1 - falling),
        }

    def samples(self, n: int, seed: int) -> Columns:
        """Up to n rows per atom: the activations with the smallest priority, in the order of the run's rows."""
        hashed = priority(seed, self.atom, self.context_id, self.pos)
        chosen = self._candidates(hashed, n)
        first = _first(n, self.atom[chosen], hashed[chosen])
        rows = np.sort(chosen[first])
        return {name: column[rows] for name, column in self.rows().items()}

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


def merged_top(rows: Columns, n: int) -> Columns:
    """SortedRun.top of all runs, ranked, from that of each: any number of rows in any order."""
    falling = (ACT_CODES - 1 - _code(rows["act"])).astype(np.uint64)
    below = 65 - ACT_CODES.bit_length()
    # The contexts' first bits beside it, so that few rows have equal keys.
    context = rows["context_id"] - int(rows["context_id"].min(initial=np.iinfo(np.int64).max))
    spare = below - int(context.max(initial=0)).bit_length()
    context = context << spare if spare >= 0 else context >> -spare
    key = (falling << np.uint64(below)) | context.astype(np.uint64)
    return _taken(rows, _first(n, rows["atom"], key, rows["context_id"]))


def merged_samples(rows: Columns, n: int, seed: int) -> Columns:
    """SortedRun.samples of all runs, by priority, from those of each: any number of rows in any order."""
    keys = rows["context_id"], rows["pos"]
    return _taken(rows, _first(n, rows["atom"], priority(seed, rows["atom"], *keys), *keys))


def _taken(columns: Columns, rows: Array) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def atoms(partials: Iterable[Columns], numbers: range, n_tokens: int) -> Columns:
    """One row per atom from the moments of runs, over all n_tokens, zeros included; skew and kurtosis are NaN where it
    never fired.

    mean_act = E[a], skew = E[a^3] / E[a^2]^1.5, kurtosis = E[a^4] / E[a^2]^2. Addition of floats is not associative:
    the same runs must come in the same order.
    """
    n_atoms = len(numbers)
    n_active, max_act = np.zeros(n_atoms, np.int64), np.zeros(n_atoms)
    means = [np.zeros(n_atoms) for _ in _POWERS]
    for run in partials:
        atom = run["atom"] - numbers.start
        n_active[atom] += run["n_active"]
        max_act[atom] = np.maximum(max_act[atom], run["max_act"])
        for total, name in zip(means, _POWERS, strict=True):
            total[atom] += run[name]
    for total in means:
        total /= n_tokens
    mean, square, cube, fourth = means
    with np.errstate(divide="ignore", invalid="ignore"):
        skew, kurtosis = cube / (square * np.sqrt(square)), fourth / (square * square)
    return {
        "atom": np.arange(numbers.start, numbers.stop, dtype=np.int32),
        "n_active": n_active,
        "n_tokens": np.full(n_atoms, n_tokens),
        "density": n_active / n_tokens,
        "mean_act": mean,
        "mean_act_squared": square,
        "skew": skew,
        "kurtosis": kurtosis,
        "max_act": max_act,
    }


def _first(n: int, atom: Array, key: Array, *ties: Array) -> Array:
    """Indices of up to n rows of each atom, by atom and smallest key (uint64), where equal by `ties`, then by row."""
    order = _order(atom, key, *ties)
    return order[_first_of_groups(_starts(atom[order]), len(order), n)]


def _order(atom: Array, key: Array, *ties: Array) -> Array:
    """Order of rows by (atom, key, ties, row)."""
    atom = atom - int(atom.min(initial=np.iinfo(atom.dtype).max))
    room = 63 - int(atom.max(initial=0)).bit_length() - len(atom).bit_length()
    if room < 1:
        return np.lexsort((*reversed(ties), key, atom))
    cut = (key >> np.uint64(64 - room)).astype(np.int64)
    fields = Fields(int(atom.max(initial=0)), (1 << room) - 1, len(atom))
    keys = fields.pack(atom, cut, np.arange(len(atom)))
    keys.sort()
    known, row = np.divmod(keys, 1 << len(atom).bit_length())
    # Where the first bits of two keys are equal, the rest decides.
    same = np.append(False, known[1:] == known[:-1])
    tied = np.flatnonzero(same | np.append(same[1:], False))
    deciding = (column[row[tied]] for column in (*reversed(ties), key))
    row[tied] = row[tied][np.lexsort((*deciding, known[tied]))]
    return row


def _first_of_groups(starts: Array, m: int, n: int) -> Array:
    """Up to n first rows of each group, in m rows of which `starts` are the first of each."""
    lengths = np.minimum(np.diff(np.append(starts, m)), n)
    ends = np.cumsum(lengths)
    rows = np.repeat(starts - (ends - lengths), lengths)
    rows += np.arange(len(rows))
    return rows


def _code(act: Array) -> Array:
    """Rounded positive activations as integers of the same order."""
    code: Array = act.view(np.int32) >> MANTISSA_DROPPED
    return code


def act_of(code: Array) -> Array:
    """The activations of codes, which are used up."""
    bits = code.astype(np.int32, copy=False)
    bits <<= MANTISSA_DROPPED
    return bits.view(np.float32)


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
