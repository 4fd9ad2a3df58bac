"""Mean squared error with fp32 accumulation, one pass over memory each way.

Shapes: B rows, d features.
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

TILE_ROWS, TILE_COLUMNS = 8, 256


def mse(recons: Tensor, x: Tensor) -> Tensor:
    """Return the mean of (recons - x) ** 2 over all entries as an fp32 scalar (fp64 if an argument is).

    recons and x [B, d], of any float types and strides; each entry is read once and squared in fp32. Differentiable
    once with respect to both. The order of addition depends on the shape alone: the same input gives the same bits.
    NaN when there is no entry, as torch's mean.

    Raises ValueError when the shapes differ or are not [B, d], or a type is not of floats.

    Source: `mse` of the code of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """
    expect("mse", "recons [B, d] float, x [B, d] float", recons, x)
    return cast(Tensor, _MSE.apply(recons, x))  # type: ignore[no-untyped-call]


class _MSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recons: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(recons, x)
        return _mse_triton(recons, x) if use_triton(recons, x) else _mse_torch(recons, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        recons, x = ctx.saved_tensors
        difference = _gradient_triton if use_triton(recons, x) else _gradient_torch
        gradient = difference(recons, x, grad)
        return gradient.to(recons.dtype), -gradient.to(x.dtype) if ctx.needs_input_grad[1] else None


def _mse_torch(recons: Tensor, x: Tensor) -> Tensor:
    return _difference(recons, x).square().mean()


def _gradient_torch(recons: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return _difference(recons, x) * (2 * grad / recons.numel())


def _difference(recons: Tensor, x: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(recons.dtype, x.dtype), torch.float32)
    return recons.to(dtype) - x.to(dtype)


def _mse_triton(recons: Tensor, x: Tensor) -> Tensor:
    partial = torch.empty(_tiles(recons), dtype=torch.float32, device=recons.device)
    _launch(_mse_kernel, recons, x, partial)
    return partial.sum() / recons.numel()


def _gradient_triton(recons: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    # The scale stays on the device: reading it would wait for the forward pass.
    scale = (2 * grad.float() / recons.numel()).reshape(1)
    wider = torch.promote_types(recons.dtype, x.dtype)  # so that each input's gradient is rounded once, to its type
    out = torch.empty(recons.shape, dtype=wider, device=recons.device)
    _launch(_gradient_kernel, recons, x, out, scale)
    return out


def _tiles(x: Tensor) -> int:
    return int(triton.cdiv(x.shape[0], TILE_ROWS) * triton.cdiv(x.shape[1], TILE_COLUMNS))


def _launch(kernel: Any, recons: Tensor, x: Tensor, *others: Tensor) -> None:
    recons, x = with_rows_in_memory(recons), with_rows_in_memory(x)
    sizes = *recons.shape, recons.stride(0), x.stride(0)
    if recons.numel():
        tile = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS, "num_warps": 4}
        kernel[(_tiles(recons),)](recons, x, *others, *sizes, **tile)


@triton.jit
def _tile(batch, d, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Return this program's row ids [TILE_ROWS, 1] as int64, columns [1, TILE_COLUMNS] and which are in the matrix."""
    blocks = tl.cdiv(d, TILE_COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    columns = (tl.program_id(0) % blocks) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    return rows, columns, (rows < batch) & (columns < d)


@triton.jit
def _differences(recons_ptr, x_ptr, rows, columns, recons_stride, x_stride, mask):
    recons = tl.load(recons_ptr + rows * recons_stride + columns, mask=mask, other=0.0).to(tl.float32)
    return recons - tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mse_kernel(
    recons_ptr, x_ptr, partial_ptr, batch, d, recons_stride, x_stride,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(batch, d, TILE_ROWS, TILE_COLUMNS)
    error = _differences(recons_ptr, x_ptr, rows, columns, recons_stride, x_stride, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(error * error, axis=1), axis=0))


@triton.jit
def _gradient_kernel(
    recons_ptr, x_ptr, out_ptr, scale_ptr, batch, d, recons_stride, x_stride,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(batch, d, TILE_ROWS, TILE_COLUMNS)
    error = _differences(recons_ptr, x_ptr, rows, columns, recons_stride, x_stride, mask)
    out = (error * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * d + columns, out, mask=mask)


COMPILED = [
    Compiled(
        kernel,
        types.replace("T", dtype),
        {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS},
    )
    for kernel, types in (
        (_mse_kernel, "*T, *T, *fp32, i32, i32:16, i32:16, i32:16"),
        (_gradient_kernel, "*T, *T, *T, *fp32, i32, i32:16, i32:16, i32:16"),
    )
    for dtype in ("bf16", "fp32")
]
