"""Transposed sparse times dense: the weight gradient of a sparse layer.

Shapes: B rows, k latents per row, n latents in all, d features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_t_matmul(values: Tensor, indices: Tensor, dense: Tensor, n: int) -> Tensor:
    """Return out[i] = sum of values[b, j] * dense[b] over all (b, j) with indices[b, j] == i, as [n, d].

    values [B, k], indices [B, k] int64 in [0, n), dense [B, d]. Not differentiable. Each row of the
    result is summed in the order of b, so the bits depend neither on the run nor on the number of threads.

    Raises ValueError when the shapes disagree or an index is outside [0, n).
    """
    if values.ndim != 2 or values.shape != indices.shape:
        raise ValueError(
            f"sparse_t_matmul expects values and indices of one shape [B, k], "
            f"received {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if dense.ndim != 2 or dense.shape[0] != values.shape[0]:
        raise ValueError(
            f"sparse_t_matmul expects dense [B, d] with B={values.shape[0]}, received {tuple(dense.shape)}"
        )
    return _sparse_t_matmul_torch(values.detach(), indices, dense.detach(), n)


def _sparse_t_matmul_torch(values: Tensor, indices: Tensor, dense: Tensor, n: int) -> Tensor:
    # Sorting by latent turns atomic additions into one bag of rows per latent.
    ids, order = indices.flatten().to(torch.int32).sort(stable=True)
    if ids.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < n:
        found = f"{int(ids[0])}..{int(ids[-1])}"
        raise ValueError(f"sparse_t_matmul expects indices in [0, {n}), received {found}")
    starts = torch.searchsorted(ids, torch.arange(n + 1, dtype=torch.int32, device=ids.device))
    return F.embedding_bag(
        order // indices.shape[1],
        dense.contiguous(),
        starts,
        per_sample_weights=values.flatten()[order].to(dense.dtype),
        mode="sum",
        include_last_offset=True,
    )
