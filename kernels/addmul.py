"""a + b * c in one pass.

Shapes: m rows, n columns.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.kernels._arguments import FLOATS, received
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton

TILE_ROWS, TILE_COLUMNS = 16, 128


def add_mul(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b * c as [m, n] of a's dtype, computed in fp32 (fp64 if an argument is).

    a [m, n]; b and c [m, n], or anything that broadcasts to it, such as a row [n] or a column [m, 1]; of any float
    types and strides. Differentiable once with respect to all three.

    Raises ValueError when a is not a matrix, b or c does not broadcast to its shape, or a type is not of floats.

    Source: `triton_add_mul_` of the code of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", which
    removes from a gradient its part along the dictionary: add_mul(grad, -dot, weight); out of place here.
    """
    floats = all(x.dtype in FLOATS for x in (a, b, c))
    if a.ndim != 2 or not floats or any(not _broadcasts(x.shape, a.shape) for x in (b, c)):
        raise ValueError(
            f"add_mul expects floats, a [m, n], and b and c that broadcast to it, received {received(a, b, c)}"
        )
    return cast(Tensor, _AddMul.apply(a, b, c))  # type: ignore[no-untyped-call]


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(x in (1, y) for x, y in zip(shape[::-1], to[::-1], strict=False))


class _AddMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(b, c)
        return _add_mul_triton(a, b, c) if use_triton(a, b, c) else _add_mul_torch(a, b, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, c = ctx.saved_tensors
        needs_a, needs_b, needs_c = ctx.needs_input_grad
        return (
            grad if needs_a else None,
            _summed_product(grad, c, b) if needs_b else None,
            _summed_product(grad, b, c) if needs_c else None,
        )


def _summed_product(grad: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """Return grad * factor summed over what `like` was broadcast along; rounded once, after the sum."""
    dtype = _wide(grad, factor)
    return (grad.to(dtype) * factor.to(dtype)).sum_to_size(like.shape).to(like.dtype)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _add_mul_torch(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    dtype = _wide(a, b, c)
    return (a.to(dtype) + b.to(dtype) * c.to(dtype)).to(a.dtype)


def _add_mul_triton(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    m, n = a.shape
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    # Along a broadcast dimension the stride is zero: nothing is copied.
    strides = [s for x in (a, b.expand(m, n), c.expand(m, n)) for s in x.stride()]
    grid = (triton.cdiv(m, TILE_ROWS) * triton.cdiv(n, TILE_COLUMNS),)
    if out.numel():
        _add_mul_kernel[grid](a, b, c, out, m, n, *strides, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=4)
    return out


@triton.jit
def _load(x_ptr, rows, columns, row_stride, column_stride, mask):
    return tl.load(x_ptr + rows * row_stride + columns * column_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_mul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    m,
    n,
    a_row,
    a_column,
    b_row,
    b_column,
    c_row,
    c_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(n, TILE_COLUMNS)
    rows = ((tl.program_id(0) // blocks).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    columns = ((tl.program_id(0) % blocks).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
    mask = (rows < m) & (columns < n)
    a = _load(a_ptr, rows, columns, a_row, a_column, mask)
    b = _load(b_ptr, rows, columns, b_row, b_column, mask)
    c = _load(c_ptr, rows, columns, c_row, c_column, mask)
    tl.store(out_ptr + rows * n + columns, (a + b * c).to(out_ptr.dtype.element_ty), mask=mask)


COMPILED = [
    Compiled(
        _add_mul_kernel,
        f"*{dtype}, *{dtype}, *{dtype}, *{dtype}, i32, i32:16, i32:16, i32, i32:16, i32, i32:16, i32",
        {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS},
    )
    for dtype in ("bf16", "fp32")
]
