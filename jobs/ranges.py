"""Inclusive ranges of integers: of context ids, what was dropped and what is left."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Range = tuple[int, int]


def united(ranges: Iterable[Range]) -> list[Range]:
    """The same numbers in as few ranges as there can be, in order."""
    found: list[Range] = []
    for low, high in sorted((low, high) for low, high in ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found


def within(ranges: Iterable[Range], bounds: Range) -> list[Range]:
    """The parts of ranges that lie within the bounds."""
    cut = ((max(low, bounds[0]), min(high, bounds[1])) for low, high in ranges)
    return [(low, high) for low, high in cut if low <= high]


def without(bounds: Range, gone: Iterable[Range]) -> list[Range]:
    """What is left of the bounds."""
    left: list[Range] = []
    low, last = bounds
    for first, end in united(within(gone, bounds)):
        if low < first:
            left.append((low, first - 1))
        low = end + 1
    return [*left, (low, last)] if low <= last else left


def size(ranges: Iterable[Range]) -> int:
    """How many numbers disjoint ranges hold."""
    return sum(high - low + 1 for low, high in ranges)


def contains(ranges: Sequence[Range], numbers: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which numbers [m] lie in ranges that are united."""
    if not ranges:
        return np.zeros(len(numbers), bool)
    first, last = (np.array(ends, np.int64) for ends in zip(*ranges, strict=True))
    nearest = np.searchsorted(first, numbers, side="right") - 1
    inside: npt.NDArray[np.bool_] = (nearest >= 0) & (numbers <= last[nearest])
    return inside
