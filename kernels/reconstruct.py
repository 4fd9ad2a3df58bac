"""Sparse decoding, its error, and the gradient of the squared error, in one pass over the selected rows.

Shapes: B rows, k latents per row, n latents in all, d features.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels import tuning
from sae.kernels._arguments import expect
from sae.kernels._rows import MAX_FEATURES
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.launches import Settings
from sae.kernels.sampled import sampled_matmul


class Reconstruction(NamedTuple):
    """error: [B, d] reconstruction minus target, in the dictionary's type
    value_grads: [B, k] error[b] . weight[indices[b, j]], zero where the value is zero; float32 or float64
    squared_error: [B] sum over features of the squared error, in value_grads' type
    """

    error: Tensor
    value_grads: Tensor
    squared_error: Tensor


def partial(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return sum_j values[b, j] * weight[indices[b, j]] as [B, d] in float32 (float64 for float64 weights).

    Arguments as of `reconstruct`; what several holders of latents add up to a reconstruction. An index outside [0, n)
    raises on CPU and gives a row of NaN on CUDA, where raising would stop the stream.

    Raises ValueError when shapes or types disagree.

    Source: sparse decoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """
    expect("partial", "values [B, k] float, indices [B, k] int, weight [n, d] float", values, indices, weight)
    if use_triton(values, weight) and weight.shape[1] <= MAX_FEATURES:
        recons = torch.empty(len(values), weight.shape[1], dtype=torch.float32, device=weight.device)
        _launch(values, indices, weight.contiguous(), recons, out=None)
        return recons
    return _partial_torch(values, indices, weight).to(torch.promote_types(weight.dtype, torch.float32))


def reconstruct(
    values: Tensor, indices: Tensor, weight: Tensor, target: Tensor, recons: Tensor | None = None
) -> Reconstruction:
    """Compare recons [B, d], by default sum_j values[b, j] * weight[indices[b, j]], with target.

    values [B, k] >= 0 (latents after the post-activation), indices [B, k] integer in [0, n), weight [n, d], target
    [B, d] (where the reconstruction has a bias, the target is without it). The gradients are those of half the
    squared error; a latent of value zero gets none, as behind a ReLU. Not differentiable: these are the gradients. An
    index outside [0, n) raises on CPU and gives a row of NaN on CUDA, where raising would stop the stream.

    Raises ValueError when shapes or types disagree.

    Source: sparse decoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", and its gradients.
    """
    expect(
        "reconstruct",
        "values [B, k] float, indices [B, k] int, weight [n, d] float, target [B, d] float, recons [B, d] float",
        values, indices, weight, target, recons,
    )  # fmt: skip
    floats = (t for t in (values, weight, target, recons) if t is not None)
    if use_triton(*floats) and weight.shape[1] <= MAX_FEATURES:
        return _reconstruct_triton(values, indices, weight.contiguous(), target, recons)
    return _reconstruct_torch(values, indices, weight, target, recons)


def _partial_torch(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


def _reconstruct_torch(
    values: Tensor, indices: Tensor, weight: Tensor, target: Tensor, recons: Tensor | None
) -> Reconstruction:
    if recons is None:
        recons = _partial_torch(values, indices, weight)
    error = (recons - target).to(weight.dtype)
    grads = torch.where(values > 0, sampled_matmul(error, weight, indices), 0)
    wide = values.dtype
    return Reconstruction(error, grads.to(wide), error.to(wide).square().sum(dim=1))


def _reconstruct_triton(
    values: Tensor, indices: Tensor, weight: Tensor, target: Tensor, recons: Tensor | None
) -> Reconstruction:
    (rows, k), d = values.shape, weight.shape[1]
    error = torch.empty(rows, d, dtype=weight.dtype, device=weight.device)
    grads = torch.empty(rows, k, dtype=torch.float32, device=weight.device)
    squared = torch.empty(rows, dtype=torch.float32, device=weight.device)
    out = Reconstruction(error, grads, squared)
    _launch(values, indices, weight, recons.contiguous() if recons is not None else None, out, target.contiguous())
    return out


def _launch(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    recons: Tensor | None,
    out: Reconstruction | None,
    target: Tensor | None = None,
) -> None:
    """Fill recons where there is nothing else to fill, else out, from recons where it is given."""
    (rows, k), (n, d) = values.shape, weight.shape
    if not rows:
        return
    unused = values
    filled = out if out is not None else (unused,) * 3
    values, indices, add = values.contiguous(), indices.contiguous(), out is None or recons is None

    def launch(settings: Settings) -> None:
        tile, block, warps = _shape(d, k, settings)
        _reconstruct_kernel[(rows,)](
            values, indices, weight, unused if target is None else target, unused if recons is None else recons,
            *filled, n, d, k, ADD=add, COMPARE=out is not None, TILE=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip

    launch(tuning.settings("reconstruct", values, (triton.next_power_of_2(d), weight.element_size()), launch))


def _shape(d: int, k: int, settings: Settings) -> tuple[int, int, int]:
    """Rows taken together, features of each, and warps."""
    # With one product a lane, the compiler fuses it into the sum over lanes: each then has other bits of that sum.
    block = max(64, int(triton.next_power_of_2(d)))
    tile = max(1, min(int(triton.next_power_of_2(k)), settings["ENTRIES"] // block))
    return tile, block, max(1, min(16, block // settings["FEATURES"]))


@triton.jit
def _gathered(
    values_ptr, indices_ptr, weight_ptr, row, first, n, d, k, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """From entry first on: where they are, which of them exist, their values [TILE] and rows [TILE, BLOCK].

    The value of an index outside [0, n) is NaN, and its row zeros, rather than a read of foreign memory.
    """
    feature = tl.arange(0, BLOCK)
    slot = first + tl.arange(0, TILE)
    at = row * k + slot
    given = slot < k
    value = tl.load(values_ptr + at, mask=given, other=0.0).to(tl.float32)
    latent = tl.load(indices_ptr + at, mask=given, other=0).to(tl.int64)
    known = (latent >= 0) & (latent < n)
    wanted = (given & known & (value != 0))[:, None] & (feature < d)[None, :]
    rows = tl.load(weight_ptr + latent[:, None] * d + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
    return at, given, tl.where(known, value, float("nan")), rows


@triton.jit
def _reconstruct_kernel(
    values_ptr, indices_ptr, weight_ptr, target_ptr, recons_ptr, error_ptr, grads_ptr, squared_ptr, n, d, k,
    ADD: tl.constexpr, COMPARE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the rows up, or take their sum from recons; compare it with the target, or put it into recons."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < d
    at_row = row * d + feature
    if ADD:
        recons = tl.zeros([BLOCK], tl.float32)
        for first in range(0, k, TILE):
            at, given, value, rows = _gathered(values_ptr, indices_ptr, weight_ptr, row, first, n, d, k, TILE, BLOCK)
            recons += tl.sum(value[:, None] * rows, axis=0)
    else:
        recons = tl.load(recons_ptr + at_row, mask=inside, other=0.0)
    if not COMPARE:
        tl.store(recons_ptr + at_row, recons, mask=inside)
    else:
        target = tl.load(target_ptr + at_row, mask=inside, other=0.0).to(tl.float32)
        error = tl.where(inside, recons - target, 0.0)
        tl.store(error_ptr + at_row, error.to(error_ptr.dtype.element_ty), mask=inside)
        tl.store(squared_ptr + row, tl.sum(error * error, axis=0))
        # The same rows again, now from the nearest cache.
        for first in range(0, k, TILE):
            at, given, value, rows = _gathered(values_ptr, indices_ptr, weight_ptr, row, first, n, d, k, TILE, BLOCK)
            grad = tl.sum(error[None, :] * rows, axis=1)
            tl.store(grads_ptr + at, tl.where(value > 0, grad, 0.0 * value), mask=given)  # NaN stays


def _compiled(dtype: str, d: int, settings: Settings, capabilities: tuple[int, ...]) -> list[Compiled]:
    tile, block, warps = _shape(d, d, settings)
    types = f"*fp32, *i32, *{dtype}, *{dtype}, *fp32, *{dtype}, *fp32, *fp32, i32, i32:16, i32:16"
    return [
        Compiled(
            _reconstruct_kernel,
            types,
            {"ADD": add, "COMPARE": compare, "TILE": tile, "BLOCK": block},
            num_warps=warps,
            capabilities=capabilities,
        )
        for add, compare in ((True, True), (True, False), (False, True))
    ]


COMPILED = [
    variant
    for dtype in ("bf16", "fp32")
    for d in (768, 4096)
    for of in tuning.variants("reconstruct")
    for variant in _compiled(dtype, d, *of)
]
