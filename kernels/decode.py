"""Sparse latents times a dense dictionary.

Shapes: B rows, k latents per row, n latents in all, d features.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul


def decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return sum_j values[b, j] * weight[indices[b, j]] as [B, d].

    values [B, k], indices [B, k] int64, weight [n, d]. An index that occurs twice in a row counts twice.
    Differentiable once with respect to values and weight; the gradient of the weight is dense.

    Raises ValueError when the shapes disagree.
    """
    if values.ndim != 2 or values.shape != indices.shape:
        raise ValueError(
            f"decode expects values and indices of one shape [B, k], "
            f"received {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if weight.ndim != 2:
        raise ValueError(f"decode expects weight of shape [n, d], received {tuple(weight.shape)}")
    return cast(Tensor, _Decode.apply(values, indices, weight))  # type: ignore[no-untyped-call]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        return _decode_torch(values, indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, weight = ctx.saved_tensors
        grad_values = sampled_matmul(grad, weight, indices) if ctx.needs_input_grad[0] else None
        grad_weight = sparse_t_matmul(values, indices, grad, weight.shape[0]) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_weight


def _decode_torch(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    # A bag is summed by one thread in a fixed order: the same bits with any number of threads.
    weight = weight.contiguous()
    return F.embedding_bag(indices, weight, per_sample_weights=values.to(weight.dtype), mode="sum")
