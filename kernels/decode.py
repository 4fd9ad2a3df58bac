"""Sparse latents times a dense dictionary.

Shapes: B rows, k latents per row, n latents in all, d features.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.kernels._arguments import expect
from sae.kernels._rows import WIDTHS, add_rows, block_width, with_rows_in_memory
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul

TILE = 4096  # entries of weight in flight at once, at most; more would cost occupancy
MAX_ROWS = 32


def decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return sum_j values[b, j] * weight[indices[b, j]] as [B, d], of weight's dtype, accumulated in fp32.

    values [B, k], indices [B, k] int64 or int32, weight [n, d]; any strides. An index that occurs twice in a row
    counts twice. Differentiable once with respect to values and weight; the gradient of the weight is dense.

    Raises ValueError when shapes or types disagree. An index outside [0, n) raises on CPU and gives a row of NaN on
    CUDA, where raising would stop the stream.

    Source: sparse decoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """
    expect("decode", "values [B, k] float, indices [B, k] int, weight [n, d] float", values, indices, weight)
    return cast(Tensor, _Decode.apply(values, indices, weight))  # type: ignore[no-untyped-call]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        if use_triton(values, indices, weight):
            return _decode_triton(values, indices, weight)
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


def _decode_triton(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    values, indices, weight = values.contiguous(), indices.contiguous(), with_rows_in_memory(weight)
    (batch, k), (n, d) = values.shape, weight.shape
    out = torch.empty(batch, d, dtype=weight.dtype, device=weight.device)
    width = block_width(d)
    grid = (batch * triton.cdiv(d, width),)
    if out.numel():
        rows = min(_rows(width), triton.next_power_of_2(max(k, 1)))
        _decode_kernel[grid](
            values, indices, weight, out, k, n, d, weight.stride(0), BLOCK_D=width, J=rows, num_warps=4
        )
    return out


def _rows(width: int) -> int:
    return min(MAX_ROWS, TILE // width)


@triton.jit
def _decode_kernel(
    values_ptr, indices_ptr, weight_ptr, out_ptr, k, n, d, stride, BLOCK_D: tl.constexpr, J: tl.constexpr
):
    """One block of columns of one row. Blocks of one row are neighbours: they share the ids and values in L2."""
    blocks = tl.cdiv(d, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([J, BLOCK_D], tl.float32)
    acc = add_rows(acc, indices_ptr, values_ptr, row * k, row * k + k, weight_ptr, n, stride, columns, d, J)
    total = tl.sum(acc, axis=0)
    tl.store(out_ptr + row * d + columns, total.to(out_ptr.dtype.element_ty), mask=columns < d)


COMPILED = [
    Compiled(
        _decode_kernel,
        f"*{dtype}, *i64, *{dtype}, *{dtype}, i32, i32, i32:16, i32:16",
        {"BLOCK_D": width, "J": _rows(width)},
    )
    for dtype in ("bf16", "fp32")
    for width in WIDTHS
]
