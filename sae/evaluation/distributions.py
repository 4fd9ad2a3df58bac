"""Histograms of what was measured. Of every bin lower <= value < upper; lower = upper = 0 are the zeros.

Shapes: n latents, b bins.
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sae.evaluation.reconstruction import Reconstruction

PER_DECADE: Final = 5
_BINS: Final = 50


class Histogram(NamedTuple):
    """lower, upper: float64 [b], ascending; n: int64 [b]."""

    lower: Tensor
    upper: Tensor
    n: Tensor


def of(measured: Reconstruction) -> dict[str, Histogram]:
    """density: latents by the fraction of rows on which they are active; max_act: those that are active at all, by
    their largest activation; l0: rows by how many latents are active.
    """
    active = measured.n_active > 0
    return {
        "density": by_logarithm(measured.density.cpu()),
        "max_act": in_equal_bins(measured.max_act[active].double().cpu()),
        "l0": by_number(measured.rows_by_l0.cpu()),
    }


def by_logarithm(values: Tensor) -> Histogram:
    """Of fractions [n], five bins a decade."""
    positive = values[values > 0]
    zeros = torch.tensor([len(values) - len(positive)])
    nothing = torch.zeros(1, dtype=torch.float64)
    if not len(positive):
        return Histogram(nothing, nothing, zeros)
    first = math.floor(math.log10(float(positive.min())) * PER_DECADE) - 1
    edges = 10 ** (torch.arange(first, 2, dtype=torch.float64) / PER_DECADE)
    n = _counted(positive, edges)
    used = int(n.nonzero()[0])  # the first of which rounding may leave empty
    lower, upper = edges[used:-1], edges[used + 1 :]
    return Histogram(torch.cat([nothing, lower]), torch.cat([nothing, upper]), torch.cat([zeros, n[used:]]))


def in_equal_bins(values: Tensor) -> Histogram:
    """Of positive values [n], from zero on."""
    largest = float(values.max()) if len(values) else 1.0
    edges = torch.arange(_BINS + 1, dtype=torch.float64) * (largest / _BINS)
    edges[-1] = math.nextafter(max(largest, float(edges[-1])), math.inf)
    return Histogram(edges[:-1], edges[1:], _counted(values, edges))


def by_number(counts: Tensor) -> Histogram:
    """Of counts [c], how often each number from 0 on occurs; several numbers share a bin where there are many."""
    occurring = counts.nonzero().squeeze(1)
    first, last = (int(occurring[0]), int(occurring[-1])) if len(occurring) else (0, 0)
    width = -(-(last + 1 - first) // _BINS)
    starts = torch.arange(first, last + 1, width)
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    n = sums[(starts + width).clamp(max=last + 1)] - sums[starts]
    return Histogram(starts.double(), (starts + width).double(), n)


def _counted(values: Tensor, edges: Tensor) -> Tensor:
    bins = torch.searchsorted(edges, values, right=True) - 1
    return torch.bincount(bins, minlength=len(edges) - 1)
