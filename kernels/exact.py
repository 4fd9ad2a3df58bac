"""The k largest pre-activations in float32 precision, found by a product in bfloat16.

Shapes: B rows, d features, n latents, k selected, c candidates.

What rounding a row x and a latent w to x~ and w~ may hide is bounded by

    |x . w - x~ . w~| <= |x - x~| |w| + |x~| |w - w~|,

the product of two more features of each. With them the product gives upper bounds, and the c largest are the
candidates. Their values are computed in float32; where the k-th of them is above every bound that was left out, no
other latent can belong to the k. The rows of which that is not so, for lack of margin or because they are not finite,
get their candidates from a product in float32, with a bound of its rounding; and where that does not tell them apart
either, all latents are candidates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.kernels._arguments import expect, expect_k, received
from sae.kernels.dispatch import use_triton
from sae.kernels.encode import encode_topk
from sae.kernels.sampled import sampled_matmul
from sae.kernels.topk import Selected, group_maxima, select, topk

REDO_ROWS = 1024
"""Rows that are selected in float32 at a time: all of a batch would take as much memory as the dense product."""
_WHOLE_ROWS = 64  # at a time, of which every latent is a candidate

_ROUNDED_UP = 1 + 2.0**-7  # rounding to bfloat16 takes away at most a factor of 1 - 2**-9
_STORED = 2.0**-8  # of a bound, which was rounded to bfloat16: twice what that can take away


def encode_exact(x: Tensor, weight: Tensor, bias: Tensor, k: int, rounded: Tensor | None = None) -> Selected:
    """Return the k largest pre-activations x @ weight.T + bias of each row, by ascending latent.

    x [B, d], weight [n, d] and bias [n] of one type. Computed and compared in that type; of equal ones the smaller
    latent wins, and NaN counts as -infinity. For float32 on a GPU nothing of size B x n is held in float32, a row's
    result does not depend on the other rows, and the host waits once, or twice where rows are selected again. rounded
    is `round_encoder(weight)`, where that is at hand. Not differentiable.

    Raises ValueError when shapes or types disagree, or k is not between 1 and n.

    Source: the bound is the triangle and the Cauchy-Schwarz inequality; the autoencoder is that of Gao et al. 2024,
    "Scaling and evaluating sparse autoencoders", section 2.3.
    """
    expect("encode_exact", "x [B, d] float, weight [n, d] float, bias [n] float", x, weight, bias)
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"encode_exact expects x, weight and bias of one type, received {received(x, weight, bias)}")
    n, wanted = len(weight), _width(weight.shape[1])
    expect_k("encode_exact", k, n)
    if rounded is not None and rounded.shape != (n, wanted):
        raise ValueError(f"encode_exact expects rounded [{n}, {wanted}], received {tuple(rounded.shape)}")
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if not takes_rounded(x, weight, bias):
        return _encode_exact_torch(x, weight, bias, k)
    found, sure = _encode_proven(x, weight, bias, k, round_encoder(weight) if rounded is None else rounded)
    for rows in (~sure).nonzero().squeeze(1).split(REDO_ROWS):
        again = _encode_in_float32(x[rows], weight, bias, k)
        for whole, part in zip(found, again, strict=True):
            whole[rows] = part
    return found


def takes_rounded(*tensors: Tensor) -> bool:
    """Whether `encode_exact` of these would use a rounded encoder."""
    return use_triton(*tensors) and all(t.dtype == torch.float32 for t in tensors)


def round_encoder(weight: Tensor) -> Tensor:
    """weight [n, d] in bfloat16 with the features that bound what rounding takes away: [n, d'], d' > d.

    Of use as long as weight does not change.
    """
    rounded = torch.empty(len(weight), _width(weight.shape[1]), dtype=_product_type(weight), device=weight.device)
    for part, out in zip(weight.detach().split(8192), rounded.split(8192), strict=True):
        near = part.to(torch.bfloat16)
        _fill(out, near, _norm(part), _norm(part - near))
    return rounded


def _round_rows(x: Tensor) -> Tensor:
    """x [B, d] as `round_encoder` has latents, the bounds in the order in which they meet those."""
    near = x.to(torch.bfloat16)
    rounded = torch.empty(len(x), _width(x.shape[1]), dtype=_product_type(x), device=x.device)
    return _fill(rounded, near, _norm(x - near) + _added(x.shape[1]) * _norm(x), _norm(near.float()))


def _added(d: int) -> float:
    """What the additions of a product of d features in float32 take away at most, as a part of |x| |w|."""
    return (d + 64) * 2.0**-24


def _fill(out: Tensor, near: Tensor, first: Tensor, second: Tensor) -> Tensor:
    d = near.shape[1]
    out[:, :d] = near
    out[:, d] = (first * _ROUNDED_UP).to(torch.bfloat16)
    out[:, d + 1] = (second * _ROUNDED_UP).to(torch.bfloat16)
    out[:, d + 2 :] = 0
    return out


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm


def _width(d: int) -> int:
    """Features with the two bounds, to a multiple of 8: the rows of a product start at 16 bytes."""
    return (d + 2 + 7) // 8 * 8


def _product_type(x: Tensor) -> torch.dtype:
    """Triton's interpreter has no products in bfloat16; there the rounded numbers are held in float32."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def _encode_exact_torch(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selected:
    values, indices = topk(F.linear(x, weight, bias), k)
    indices, order = indices.sort(dim=1)
    return Selected(values.gather(1, order), indices.to(torch.int32))


def _encode_proven(x: Tensor, weight: Tensor, bias: Tensor, k: int, rounded: Tensor) -> tuple[Selected, Tensor]:
    """The selection, and whether it is sure [B]."""
    n, d = weight.shape
    c = min(n, _candidates(k, d))
    bounds, candidates = encode_topk(_round_rows(x), rounded, bias, c)
    found = _best_of(x, weight, bias, k, candidates)
    if c == n:
        return found, torch.ones(len(x), dtype=torch.bool, device=x.device)
    left = bounds.amin(dim=1)
    return found, found.values.amin(dim=1) > left + left.abs() * _STORED  # false of NaN


def _candidates(k: int, d: int) -> int:
    """Enough for 99 of 100 rows of normal or sparse data: the bound grows with the norm of a row, and that with d."""
    return math.ceil(k * (1 + math.sqrt(d) / 40)) + 8


def _best_of(x: Tensor, weight: Tensor, bias: Tensor, k: int, candidates: Tensor) -> Selected:
    """The k largest of candidates [B, c], which ascend, by values that depend on row and latent alone."""
    values = sampled_matmul(x, weight, candidates) + bias[candidates]
    best, places = select(values, group_maxima(values), k, values.shape[1])
    return Selected(best, candidates.gather(1, places.long()))


def _encode_in_float32(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selected:
    # A product's last bits depend on the other rows: it gives candidates, a few to spare, and the last one bounds the
    # others.
    c = min(len(weight), k + 8)
    products, candidates = topk(F.linear(x, weight, bias), c)
    found = _best_of(x, weight, bias, k, candidates.sort(dim=1).values.int())
    if c == len(weight):
        return found
    left = products.amin(dim=1)
    slack = 2 * _added(x.shape[1]) * (_norm(x) * _norm(weight).amax() + left.abs())
    unsure = ~(found.values.amin(dim=1) > left + slack)
    every = torch.arange(len(weight), dtype=torch.int32, device=x.device)
    for rows in unsure.nonzero().squeeze(1).split(_WHOLE_ROWS):
        again = _best_of(x[rows], weight, bias, k, every.expand(len(rows), -1).contiguous())
        for whole, part in zip(found, again, strict=True):
            whole[rows] = part
    return found
