"""Per-atom statistics of one run of latents where the latents were found: the tables of sae.statistics, by torch.

Shapes: m rows. Rows, histograms, top and samples equal those of SortedRun bit for bit; sums of powers differ from its
only in the order of the additions (about 1e-15 relative). There are no atomics: the same rows give the same bytes.
"""

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from sae.statistics import MANTISSA_DROPPED, Columns, RunStatistics, SortedRun, check_bin_width

# Device memory that a row and its statistics take at most: 1.1 GB for a run of 262,144 tokens with 32 latents each.
BYTES_PER_ROW: Final = 128

_ACT_BITS: Final = 31 - MANTISSA_DROPPED  # of a rounded positive float32: the sign and the rounded digits say nothing
_SIGN: Final = -(2**63)


def room(device: torch.device) -> int:
    """Rows that a run may have to be sorted on a device: those of a quarter of its free memory, none on a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + cached) // 4 // BYTES_PER_ROW


class RunBuilder:
    """Gathers the rows of a run on their device, or in host memory once there are more than `room`."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._n_rows = 0
        self._n_on_host = 0  # parts, not rows
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, atom: Tensor, context_id: Tensor, pos: Tensor, act: Tensor) -> None:
        """Rows [m] in any order, no (atom, context_id, pos) twice; see DeviceRun.from_rows."""
        self._parts.append((atom.int(), context_id, pos.int(), act.float()))
        self._n_rows += len(atom)
        if self._n_rows > self._room:
            late = self._parts[self._n_on_host :]
            self._parts[self._n_on_host :] = [tuple(column.cpu() for column in part) for part in late]
            self._n_on_host = len(self._parts)

    def sorted(self) -> RunStatistics:
        """The run of all rows that were added, at least one batch of them; to be called once."""
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        self._parts.clear()
        if self._n_on_host:
            return SortedRun.from_rows(*(column.numpy() for column in columns))
        return DeviceRun.from_rows(*columns)


@dataclass(frozen=True)
class DeviceRun:
    """The rows of a run in (atom, context_id, pos) order, on one device: int32, int64, int32 and float32, all [m]."""

    atom: Tensor
    context_id: Tensor
    pos: Tensor
    act: Tensor

    @classmethod
    def from_rows(cls, atom: Tensor, context_id: Tensor, pos: Tensor, act: Tensor) -> Self:
        """Sorts rows that arrive in any order: atom and pos integers, context_id int64, act float, all [m].

        Activations must be > 0, positions below 2**16, and bits(atom) + bits(tokens from the first context to the
        last) at most 63.
        """
        first, width = _least(context_id), _largest(pos) + 1
        token = (context_id - first) * width + pos
        token_bits = _largest(token).bit_length()
        key, order = ((atom.long() << token_bits) | token).sort(stable=True)
        token = key & ((1 << token_bits) - 1)
        return cls(
            (key >> token_bits).int(),
            torch.div(token, width, rounding_mode="floor") + first,
            (token % width).int(),
            _rounded(act[order].float()),
        )

    def __len__(self) -> int:
        return len(self.atom)

    def rows(self) -> Columns:
        """See SortedRun, as for all that follows."""
        return _on_host(self._columns(slice(None)))

    def moments(self) -> Columns:
        starts = _changed(self.atom).nonzero().squeeze(1)
        lengths = _lengths(starts, len(self))
        act = self.act.double()
        columns = {"atom": self.atom[starts], "n_active": lengths}
        power = torch.ones_like(act)
        for name in ("sum_act", "sum_act2", "sum_act3", "sum_act4"):
            power = power * act
            columns[name] = _reduce("sum", power, lengths)
        columns["max_act"] = _reduce("max", self.act, lengths)
        return _on_host(columns)

    def histogram(self, bin_width: float) -> Columns:
        check_bin_width(bin_width, float(self.act.max()) if len(self) else 0.0)
        # On a GPU a divisor in host memory becomes a product with its reciprocal, which rounds otherwise.
        divisor = torch.tensor(bin_width, dtype=torch.float64, device=self.act.device)
        bins = (self.act.double() / divisor).ceil().long()
        packed = ((self.atom.long() << 32) | bins).sort().values
        starts = _changed(packed).nonzero().squeeze(1)
        packed = packed[starts]
        n = _lengths(starts, len(self))
        return _on_host({"atom": (packed >> 32).int(), "bin": (packed & 0xFFFFFFFF).int(), "n": n})

    def top(self, n: int) -> Columns:
        # A stable sort of each context's rows by falling activation leaves its peak's first position at its start.
        changed = _changed(self.atom, self.context_id)
        falling = (1 << _ACT_BITS) - 1 - (self.act.view(torch.int32) >> MANTISSA_DROPPED)
        by_peak = ((changed.cumsum(0) << _ACT_BITS) | falling).sort(stable=True).indices
        peaks = by_peak[changed.nonzero().squeeze(1)]
        best = ((self.atom[peaks].long() << _ACT_BITS) | falling[peaks]).sort(stable=True).indices
        return _on_host(self._columns(self._first_of_atoms(peaks[best], n)))

    def samples(self, n: int, seed: int) -> Columns:
        hashed = _priority(seed, self.atom, self.context_id, self.pos)
        by_hash = (hashed ^ _SIGN).sort(stable=True).indices
        order = by_hash[self.atom[by_hash].sort(stable=True).indices]
        return _on_host(self._columns(self._first_of_atoms(order, n).sort().values))

    def _first_of_atoms(self, rows: Tensor, n: int) -> Tensor:
        """The first n of each atom's rows, of some rows that are ordered by atom."""
        starts = _changed(self.atom[rows]).nonzero().squeeze(1)
        rank = torch.arange(len(rows), device=rows.device)
        rank -= starts.repeat_interleave(_lengths(starts, len(rows)), output_size=len(rows))
        return rows[rank < n]

    def _columns(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """The stored columns of some rows; torch has few operations on unsigned integers, so pos becomes one last."""
        pos = self.pos[rows].to(torch.int16).view(torch.uint16)
        return {"atom": self.atom[rows], "context_id": self.context_id[rows], "pos": pos, "act": self.act[rows]}


def _on_host(columns: dict[str, Tensor]) -> Columns:
    """Copies of columns [m] as numpy arrays; those from a GPU lie in pinned memory, and are waited for once."""
    copies = {name: column.to("cpu", non_blocking=True) for name, column in columns.items()}
    if columns["atom"].is_cuda:
        torch.cuda.current_stream(columns["atom"].device).synchronize()
    return {name: copy.numpy() for name, copy in copies.items()}


def _rounded(act: Tensor) -> Tensor:
    """See sae.statistics.round_act; positive float32 values have bits that compare and add up as int32."""
    bits = act.view(torch.int32)
    half = (1 << (MANTISSA_DROPPED - 1)) - 1
    rounded = bits + half + ((bits >> MANTISSA_DROPPED) & 1)
    return (rounded >> MANTISSA_DROPPED << MANTISSA_DROPPED).view(torch.float32)


def _priority(seed: int, *keys: Tensor) -> Tensor:
    """The bits of sae.statistics.priority as int64 [m]: sums and products wrap around as those of uint64 do."""
    state = _mix(torch.full_like(keys[0], seed, dtype=torch.int64))
    for key in keys:
        state = _mix(state ^ key)
    return state


def _mix(x: Tensor) -> Tensor:
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _logical_shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _changed(*keys: Tensor) -> Tensor:
    """Whether a row is the first of its group of equal keys, in rows sorted by them: bool [m]."""
    changed = torch.zeros(len(keys[0]), dtype=torch.bool, device=keys[0].device)
    changed[:1] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return changed


def _lengths(starts: Tensor, m: int) -> Tensor:
    """Rows of each group, given the first row of each and the number of rows in all."""
    return torch.diff(starts, append=starts.new_full((1,), m))


def _reduce(op: str, values: Tensor, lengths: Tensor) -> Tensor:
    # The sum of a group is a tree of fixed shape; lengths are right by construction.
    return torch.segment_reduce(values, op, lengths=lengths, unsafe=True) if len(values) else values


def _least(x: Tensor) -> int:
    return int(x.min()) if len(x) else 0


def _largest(x: Tensor) -> int:
    return int(x.max()) if len(x) else 0
