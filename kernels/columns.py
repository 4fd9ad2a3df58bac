"""Sums of the columns of a matrix, in fp32 whatever its type.

Shapes: B rows, d columns.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.kernels._arguments import expect
from sae.kernels._rows import with_rows_in_memory
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton

TILE_ROWS, TILE_COLUMNS = 32, 128
MAX_PARTS = 256  # partial sums per column: enough programs to fill a GPU at d = 128, few enough to add at once


def column_sum(x: Tensor) -> Tensor:
    """Return the sum of each column as fp32 [d] (fp64 if x is), whatever precision x [B, d] has.

    Any strides. Differentiable once. Two passes without atomics in an order that depends on the shape alone: the
    same input gives the same bits.

    Raises ValueError when x is not a matrix of floats.

    Source: the fp32 sum over dimension 0 of the code of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """
    expect("column_sum", "x [B, d] float", x)
    return cast(Tensor, _ColumnSum.apply(x))  # type: ignore[no-untyped-call]


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Return weights @ x as fp32 [d] (fp64 if x is) for weights [B] and x [B, d]; in the way of `column_sum`.

    Not differentiable.

    Raises ValueError when shapes or types disagree.

    Source: the gradient that latents pass on to the bias before the encoder, Gao et al. 2024, "Scaling and evaluating
    sparse autoencoders", section 2.1.
    """
    expect("weighted_sum", "weights [B] float, x [B, d] float", weights, x)
    if use_triton(weights, x):
        return _column_sum_triton(x.detach(), weights.detach().contiguous())
    wide = torch.promote_types(x.dtype, torch.float32)
    return weights.detach().to(wide) @ x.detach().to(wide)


class _ColumnSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return _column_sum_triton(x) if use_triton(x) else _column_sum_torch(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype).expand(ctx.shape)


def _column_sum_torch(x: Tensor) -> Tensor:
    return x.sum(dim=0, dtype=torch.promote_types(x.dtype, torch.float32))


def _column_sum_triton(x: Tensor, weights: Tensor | None = None) -> Tensor:
    x = with_rows_in_memory(x)
    # Whole tiles for each part, so that only the last one is masked.
    rows = triton.cdiv(max(triton.cdiv(x.shape[0], MAX_PARTS), 1), TILE_ROWS) * TILE_ROWS
    partial = _sum_parts(x, rows, weights)
    return (partial if partial.shape[0] == 1 else _sum_parts(partial, partial.shape[0]))[0]


def _sum_parts(x: Tensor, rows: int, weights: Tensor | None = None) -> Tensor:
    """Sum every `rows` rows of x, times weights: [ceil(B / rows), d], one row of zeros if x has none."""
    batch, d = x.shape
    parts, blocks = max(triton.cdiv(batch, rows), 1), triton.cdiv(d, TILE_COLUMNS)
    out = torch.empty(parts, d, dtype=torch.float32, device=x.device)
    if out.numel():
        _sum_kernel[(parts * blocks,)](
            x, out, weights if weights is not None else out, batch, d, x.stride(0), rows,
            TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, WEIGHTED=weights is not None, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _sum_kernel(
    x_ptr, out_ptr, weights_ptr, batch, d, stride, rows,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d, TILE_COLUMNS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    acc = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for first in range(part * rows, tl.minimum(part * rows + rows, batch), TILE_ROWS):
        ids = first + tl.arange(0, TILE_ROWS)
        mask = (ids < batch)[:, None] & (columns < d)[None, :]
        x = tl.load(x_ptr + ids[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights_ptr + ids, mask=ids < batch, other=0.0).to(tl.float32)[:, None]
        acc += x
    tl.store(out_ptr + part * d + columns, tl.sum(acc, axis=0), mask=columns < d)


COMPILED = [
    Compiled(
        _sum_kernel,
        f"*{dtype}, *fp32, *fp32, i32, i32:16, i32:16, i32:16",
        {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS, "WEIGHTED": weighted},
    )
    for dtype in ("bf16", "fp32")
    for weighted in (False, True)
]
