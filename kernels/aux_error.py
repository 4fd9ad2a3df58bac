"""AuxK's loss and its gradient: what dead latents make of the error that the others leave.

Shapes: B rows, d features.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels._arguments import expect
from sae.kernels._rows import MAX_FEATURES, whole_row
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton


def aux_error(recons: Tensor, error: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compare recons [B, d] with -error, where error [B, d] is reconstruction minus target of the main latents.

    Returns the squared differences' sum over the row's power [B], where a row's power is the sum of squares of
    bias - error (bias [d] is in both and cancels in the difference), and half that quotient's gradient by recons,
    [B, d] in recons' type. A row of power zero counts as zero in both.

    Raises ValueError when shapes or types disagree.
    """
    expect("aux_error", "recons [B, d] float, error [B, d] float, bias [d] float", recons, error, bias)
    recons, error, bias = recons.detach(), error.detach(), bias.detach()
    if use_triton(recons, error, bias) and recons.shape[1] <= MAX_FEATURES:
        return _aux_error_triton(recons.contiguous(), error.contiguous(), bias.contiguous())
    return _aux_error_torch(recons, error, bias)


def _aux_error_torch(recons: Tensor, error: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(recons.dtype, torch.float32)
    difference = recons.to(wide) + error.to(wide)
    power = (bias - error.to(wide)).square().sum(dim=1, keepdim=True)
    inverse = torch.where(power > 0, 1 / torch.where(power > 0, power, 1), 0)
    return (difference.square() * inverse).sum(dim=1), (difference * inverse).to(recons.dtype)


def _aux_error_triton(recons: Tensor, error: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    rows, d = recons.shape
    loss = torch.empty(rows, dtype=torch.float32, device=recons.device)
    grad = torch.empty_like(recons)
    if rows:
        block, warps = whole_row(d)
        _aux_error_kernel[(rows,)](recons, error, bias, loss, grad, d, block, num_warps=warps)
    return loss, grad


@triton.jit
def _aux_error_kernel(recons_ptr, error_ptr, bias_ptr, loss_ptr, grad_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < d
    at = row * d + feature
    error = tl.load(error_ptr + at, mask=inside, other=0.0).to(tl.float32)
    difference = tl.load(recons_ptr + at, mask=inside, other=0.0).to(tl.float32) + error
    residual = tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32) - error
    power = tl.sum(residual * residual, axis=0)
    inverse = tl.where(power > 0, 1.0 / tl.where(power > 0, power, 1.0), 0.0)
    tl.store(loss_ptr + row, tl.sum(difference * difference, axis=0) * inverse)
    tl.store(grad_ptr + at, (difference * inverse).to(grad_ptr.dtype.element_ty), mask=inside)


COMPILED = [
    Compiled(
        _aux_error_kernel,
        f"*{dtype}, *{dtype}, *fp32, *fp32, *{dtype}, i32:16",
        {"BLOCK": block},
        num_warps=whole_row(block)[1],
    )
    for dtype in ("bf16", "fp32")
    for block in (1024, 4096)
]
