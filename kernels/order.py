"""A latent-sorted index over the selected latents of a batch.

Shapes: B rows, k latents per row, n latents in all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.kernels._arguments import expect


class LatentIndex(NamedTuple):
    """Entries of [B, k], numbered row by row, in order of (latent, row).

    latents: [B*k] the latent of each, ascending, in the smallest type that holds them; n: of none
    entries: [B*k] int64 its number; the row is number // k
    starts: [n+1] int64 where each latent's entries start; those from starts[n] on are of no latent
    """

    latents: Tensor
    entries: Tensor
    starts: Tensor


def latent_index(indices: Tensor, n: int) -> LatentIndex:
    """Sort indices [B, k] in [0, n] by latent; those that are n are of no latent.

    Stable, so equal input gives an equal index; no host synchronisation.

    Raises ValueError when indices are not a matrix of int32 or int64.

    Source: transposition of a sparse matrix by sorting, Gustavson 1978, "Two fast algorithms for sparse matrices:
    multiplication and permuted transposition".
    """
    expect("latent_index", "indices [B, k] int", indices)
    # Radix sort takes a pass for each byte of the key.
    small = n <= torch.iinfo(torch.int16).max
    latents, entries = indices.flatten().to(torch.int16 if small else torch.int32).sort(stable=True)
    every = torch.arange(n + 1, dtype=latents.dtype, device=latents.device)
    return LatentIndex(latents, entries, torch.searchsorted(latents, every))


def segment_sums(rows: Tensor, weights: Tensor, starts: Tensor, dense: Tensor) -> Tensor:
    """Sum weights[e] * dense[rows[e]] over the entries starts[i] <= e < starts[i + 1] of each latent: [n, d].

    The plain twin of what the kernels do with an index. A bag of rows is summed by one thread in a fixed order: the
    same bits with any number of threads.
    """
    return F.embedding_bag(
        rows,
        dense.contiguous(),
        starts,
        per_sample_weights=weights.to(dense.dtype),
        mode="sum",
        include_last_offset=True,
    )
