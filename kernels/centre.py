"""What the encoder and the loss see of a batch of activations: normalised rows minus the bias.

Shapes: B rows, d features.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels._arguments import FLOATS, expect
from sae.kernels._rows import MAX_FEATURES, whole_row
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton


class Centred(NamedTuple):
    """centred [B, d]: rows minus the bias; power, centred_power [B]: sums of squares of the rows before and after the
    subtraction, in float32 or float64.
    """

    centred: Tensor
    power: Tensor
    centred_power: Tensor


def centre(x: Tensor, bias: Tensor, eps: float | None, dtype: torch.dtype) -> Centred:
    """Normalise rows of x [B, d] (unless eps is None) and subtract bias [d], rounding to dtype at the end.

    A normalised row has mean zero and is divided by its standard deviation (unbiased) plus eps.

    Raises ValueError when the shapes disagree, or a type is not of floats.

    Source: `LN` and `pre_bias` of the code of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """
    expect("centre", "x [B, d] float, bias [d] float", x, bias)
    if dtype not in FLOATS:
        raise ValueError(f"centre expects a dtype of floats, received {dtype}")
    x, bias = x.detach(), bias.detach()
    if use_triton(x, bias, torch.empty(0, dtype=dtype, device=x.device)) and x.shape[1] <= MAX_FEATURES:
        return _centre_triton(x.contiguous(), bias.contiguous(), eps, dtype)
    return _centre_torch(x, bias, eps, dtype)


def _centre_torch(x: Tensor, bias: Tensor, eps: float | None, dtype: torch.dtype) -> Centred:
    x = x.to(torch.promote_types(dtype, torch.float32))
    if eps is not None:
        x = x - x.mean(dim=1, keepdim=True)
        # The standard deviation of centred rows, in a sixth of the time that std takes.
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) / (x.shape[1] - 1) ** 0.5 + eps)
    centred = x - bias
    return Centred(centred.to(dtype), x.square().sum(dim=1), centred.square().sum(dim=1))


def _centre_triton(x: Tensor, bias: Tensor, eps: float | None, dtype: torch.dtype) -> Centred:
    rows, d = x.shape
    centred = torch.empty(rows, d, dtype=dtype, device=x.device)
    power, centred_power = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        block, warps = whole_row(d)
        _centre_kernel[(rows,)](
            x, bias, centred, power, centred_power, d, eps or 0.0, eps is not None, block,
            num_warps=warps,
        )  # fmt: skip
    return Centred(centred, power, centred_power)


@triton.jit
def _centre_kernel(
    x_ptr, bias_ptr, centred_ptr, power_ptr, centred_power_ptr, d, eps, NORMALISE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < d
    x = tl.load(x_ptr + row * d + feature, mask=inside, other=0.0).to(tl.float32)
    if NORMALISE:
        x = tl.where(inside, x - tl.sum(x, axis=0) / d, 0.0)
        x = x / (tl.sqrt(tl.sum(x * x, axis=0) / (d - 1)) + eps)
    tl.store(power_ptr + row, tl.sum(x * x, axis=0))
    x = x - tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(centred_power_ptr + row, tl.sum(x * x, axis=0))
    tl.store(centred_ptr + row * d + feature, x.to(centred_ptr.dtype.element_ty), mask=inside)


COMPILED = [
    Compiled(
        _centre_kernel,
        f"*{given}, *fp32, *{dtype}, *fp32, *fp32, i32:16, fp32",
        {"NORMALISE": True, "BLOCK": block},
        num_warps=whole_row(block)[1],
    )
    for given, dtype in (("bf16", "bf16"), ("fp32", "fp32"))
    for block in (1024, 4096)
]
