"""A latent-sorted index over the selected latents of a batch.

Shapes: B rows, k latents per row, n latents in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LatentIndex(NamedTuple):
    """Entries of [B, k], numbered row by row, in order of (latent, row).

    latents: [B*k] the latent of each, ascending, in the smallest type that holds them
    entries: [B*k] int64 its number; the row is number // k
    starts: [n+1] int64 where each latent's entries start
    """

    latents: Tensor
    entries: Tensor
    starts: Tensor


def latent_index(indices: Tensor, n: int) -> LatentIndex:
    """Sort indices [B, k] in [0, n) by latent. Stable, so equal input gives an equal index; no host synchronisation."""
    # Radix sort takes a pass for each byte of the key.
    small = n <= torch.iinfo(torch.int16).max
    latents, entries = indices.flatten().to(torch.int16 if small else torch.int32).sort(stable=True)
    every = torch.arange(n + 1, dtype=latents.dtype, device=latents.device)
    return LatentIndex(latents, entries, torch.searchsorted(latents, every))
