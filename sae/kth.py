"""The k-th largest of the positive numbers that several ranks hold, exactly, for a few messages of counts.

Positive floating-point numbers are ordered as their bits are: sixteen of these are found at a time, the highest first.
The k-th largest maximum of groups is no larger than the k-th largest of all, and leaves few to look at.
"""

import torch
from torch import Tensor

from sae.collectives import Group

_BITS, _GROUP = 16, 32
_AS_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(values: Tensor, k: int, group: Group) -> Tensor:
    """Scalar: the k-th largest positive one of all ranks' values (float32 or float64); 0 where there are fewer.

    Every rank gives as many.
    """
    if values.numel() % _GROUP == 0 and values.numel() * group.size > k * _GROUP:
        least = _counted(values.reshape(-1, _GROUP).amax(dim=1), k, group)
        values = values[values >= least]
    return _counted(values, k, group)


def _counted(values: Tensor, k: int, group: Group) -> Tensor:
    """The same, by counts of all."""
    kind = _AS_INTEGER[values.dtype]
    bits = values[values > 0].view(kind)
    left, found = torch.tensor(k, device=values.device), torch.zeros((), dtype=kind, device=values.device)
    enough = group.sum_(torch.tensor(len(bits), device=values.device)) >= k
    for shift in range(kind.itemsize * 8 - _BITS, -1, -_BITS):
        digits = (bits >> shift) & (2**_BITS - 1)
        counts = group.sum_(torch.bincount(digits, minlength=2**_BITS))
        # How many have this digit or a larger one.
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = (at_least >= left).sum() - 1
        digit = digit.clamp(min=0)
        left = left - (at_least[digit] - counts[digit])
        found = found + (digit << shift).to(kind)
        bits = bits[digits == digit]
    return torch.where(enough, found.view(values.dtype), 0)
