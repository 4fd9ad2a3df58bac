"""Encoder product and exact top-k in one: pre-activations are written once, and read again only where they matter.

Shapes: B rows, d features, n latents, k selected, G groups of 32 neighbouring latents.

The product's epilogue writes the maximum of each group beside the pre-activations; `topk.select` finds the k best
groups from the maxima and looks into those only.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae.kernels import tuning
from sae.kernels._arguments import expect, expect_contiguous, expect_k, received
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.launches import Settings
from sae.kernels.topk import GROUP, Selected, keep_topk, select, topk

SCRATCH_BYTES = 2**31
SCRATCH_ROWS = 8192
"""Pre-activations are held for so many rows at a time as fit in the first, and at most for the second: shards of an
autoencoder then need less."""


def encode_dense_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """The latents that `encode_topk` selects, behind a ReLU, among zeros: [B, n] in x's type.

    For few latents n and many selected, where products with a dense matrix are cheaper than sparse ones.

    Raises ValueError as `encode_topk` does.

    Source: as of `encode_topk`.
    """
    _check("encode_dense_topk", x, weight, bias, k)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    n = weight.shape[0]
    if use_triton(x, weight, bias):
        pre, maxima = pre_activations(x.contiguous(), weight.contiguous(), bias.float().contiguous())
        return keep_topk(pre, maxima, k)[:, :n]
    selected = _encode_topk_torch(x, weight, bias, k)
    return x.new_zeros(len(x), n).scatter_(1, selected.indices.long(), selected.values.relu().to(x.dtype))


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selected:
    """Return the k largest pre-activations x @ weight.T + bias of each row, by ascending latent.

    x [B, d] and weight [n, d] of one type, bias [n]. Pre-activations are summed in float32 and rounded to that
    type before they are compared; of equal ones the smaller latent wins, and NaN counts as -infinity. Values are
    float32 (float64 for float64 input). Not differentiable: see `sae.model.Autoencoder.attach`.

    Raises ValueError when shapes or types disagree, or k is not between 1 and n.

    Source: the TopK autoencoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """
    _check("encode_topk", x, weight, bias, k)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if use_triton(x, weight, bias):
        return _encode_topk_triton(x.contiguous(), weight.contiguous(), bias.float().contiguous(), k)
    return _encode_topk_torch(x, weight, bias, k)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> None:
    expect(op, "x [B, d] float, weight [n, d] float, bias [n] float", x, weight, bias)
    if x.dtype != weight.dtype:
        raise ValueError(f"{op} expects x and weight of one type, received {received(x, weight)}")
    expect_k(op, k, len(weight))


def _encode_topk_torch(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selected:
    values, indices = topk(torch.nn.functional.linear(x, weight, bias.to(x.dtype)), k)
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order)
    return Selected(values if values.dtype == torch.float64 else values.float(), indices.to(torch.int32))


def _encode_topk_triton(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selected:
    n = weight.shape[0]
    width = triton.cdiv(n, 128) * 128
    parts = [
        select(*pre_activations(part, weight, bias), k, n) for part in x.split(scratch_rows(width * x.element_size()))
    ]
    if len(parts) == 1:
        return parts[0]
    return Selected(*(torch.cat(column) for column in zip(*parts, strict=True)))


def scratch_rows(row_bytes: int) -> int:
    """How many rows of pre-activations are held at a time."""
    rows = max(1, min(SCRATCH_ROWS, SCRATCH_BYTES // row_bytes))
    return rows // 128 * 128 or rows


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations [B, n'] in x's type and their group maxima [B, n' / 32]; n' is n rounded up to 128s.

    Columns from n on hold -infinity.

    Raises ValueError when x, weight or bias are not contiguous.
    """
    expect_contiguous("pre_activations", "x, weight and bias", x, weight, bias)
    rows, width = len(x), triton.cdiv(len(weight), 128) * 128
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    maxima = torch.empty(rows, width // GROUP, dtype=x.dtype, device=x.device)
    if not rows:
        return out, maxima
    op = product_op(x, weight)
    launch = partial(_bulk if op == "bulk_product" else _by_pointers, x, weight, bias, out, maxima)
    launch(tuning.settings(op, x, (x.element_size(),), launch))
    return out, maxima


def product_op(x: Tensor, weight: Tensor) -> str:
    """Which of `launches.OPS` the product of these is."""
    return "bulk_product" if _has_tensor_copies(x, weight) else "product"


def _by_pointers(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, maxima: Tensor, settings: Settings) -> None:
    (rows, d), (n, width) = x.shape, (len(weight), out.shape[1])
    tiles = triton.cdiv(rows, settings["BM"]) * triton.cdiv(width, settings["BN"])
    _pre_activations_kernel[(tiles,)](
        x, weight, bias, out, maxima, rows, n, width, d, GROUP=GROUP, BK=_depth(x.element_size()), **settings
    )


def _depth(element_bytes: int) -> int:
    """Features of a tile: 128 bytes."""
    return 128 // element_bytes


def _has_tensor_copies(x: Tensor, weight: Tensor) -> bool:
    """Whether tiles can be moved by the bulk tensor copies of Hopper and later, whose rows start at 16 bytes."""
    aligned = x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    half = x.dtype in (torch.bfloat16, torch.float16)
    if not (x.is_cuda and half and aligned):
        return False
    # Consumer GPUs of later generations have the copies, but not the room for three stages of such tiles.
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _bulk(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, maxima: Tensor, settings: Settings) -> None:
    bm, bn, bk = settings["BM"], settings["BN"], _depth(x.element_size())
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _pre_activations_persistent_kernel[(programs,)](
        _described(x, [bm, bk]), _described(weight, [bn, bk]), bias, _described(out, [bm, bn]), maxima,
        len(x), len(weight), out.shape[1], x.shape[1],
        GROUP=GROUP, BK=bk, PROGRAMS=programs, **settings,
    )  # fmt: skip


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A contiguous matrix; one of a single row may say otherwise of its strides."""
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block)


@triton.jit
def _tile(number, rows, width, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """Row and column of a tile: bands of BAND rows of tiles are walked column by column, so that both fit in L2."""
    n_down = tl.cdiv(rows, BM)
    n_across = tl.cdiv(width, BN)
    per_band = BAND * n_across
    band = number // per_band
    first = band * BAND
    height = tl.minimum(n_down - first, BAND)
    return first + (number % per_band) % height, (number % per_band) // height


@triton.jit
def _finish(acc, bias_ptr, column, n, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr):
    """Pre-activations of a tile in the stored type, and the maxima of its groups."""
    bias = tl.load(bias_ptr + column, mask=column < n, other=-float("inf"))
    pre = acc + bias[None, :]
    # Rounding keeps the order, so the rounded maximum is the maximum of the rounded.
    maxima = tl.max(tl.reshape(pre, [BM, BN // GROUP, GROUP]), axis=2)
    return pre.to(dtype), maxima.to(dtype)


@triton.jit
def _pre_activations_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, max_ptr, rows, n, width, d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    down, across = _tile(tl.program_id(0), rows, width, BM, BN, BAND)
    row = (down * BM + tl.arange(0, BM)).to(tl.int64)
    column = across * BN + tl.arange(0, BN)
    feature = tl.arange(0, BK)
    x_ptrs = x_ptr + row[:, None] * d + feature[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * d + feature[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        x = tl.load(x_ptrs + start, mask=(row[:, None] < rows) & (start + feature[None, :] < d), other=0.0)
        weight = tl.load(weight_ptrs + start, mask=(column[None, :] < n) & (start + feature[:, None] < d), other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    pre, maxima = _finish(acc, bias_ptr, column, n, GROUP, BM, BN, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * width + column[None, :], pre, mask=row[:, None] < rows)
    group = across * (BN // GROUP) + tl.arange(0, BN // GROUP)
    tl.store(max_ptr + row[:, None] * (width // GROUP) + group[None, :], maxima, mask=row[:, None] < rows)


@triton.jit
def _pre_activations_persistent_kernel(
    x_desc, weight_desc, bias_ptr, out_desc, max_ptr, rows, n, width, d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same, by tensor descriptors, each program taking tile after tile."""
    n_tiles = tl.cdiv(rows, BM) * tl.cdiv(width, BN)
    # Flattened, the loads of the next tile begin before this one is finished.
    for number in tl.range(tl.program_id(0), n_tiles, PROGRAMS, flatten=True):
        down, across = _tile(number, rows, width, BM, BN, BAND)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, d, BK):
            acc = tl.dot(x_desc.load([down * BM, start]), weight_desc.load([across * BN, start]).T, acc)
        row = (down * BM + tl.arange(0, BM)).to(tl.int64)
        column = across * BN + tl.arange(0, BN)
        pre, maxima = _finish(acc, bias_ptr, column, n, GROUP, BM, BN, out_desc.dtype)
        out_desc.store([down * BM, across * BN], pre)
        group = across * (BN // GROUP) + tl.arange(0, BN // GROUP)
        wanted = (row[:, None] < rows) & (group[None, :] < width // GROUP)
        tl.store(max_ptr + row[:, None] * (width // GROUP) + group[None, :], maxima, mask=wanted)


def _compiled_product(dtype: str, settings: Settings, capabilities: tuple[int, ...]) -> Compiled:
    constants, launch = tuning.split(settings)
    return Compiled(
        _pre_activations_kernel,
        f"*{dtype}, *{dtype}, *fp32, *{dtype}, *{dtype}, i32:16, i32:16, i32:16, i32:16",
        {**constants, "GROUP": GROUP, "BK": _depth(4 if dtype == "fp32" else 2)},
        **launch,
        capabilities=capabilities,
    )


def _compiled_bulk(settings: Settings, capabilities: tuple[int, ...]) -> Compiled:
    constants, launch = tuning.split(settings)
    bm, bn, bk = settings["BM"], settings["BN"], _depth(2)
    return Compiled(
        _pre_activations_persistent_kernel,
        f"tensordesc<bf16[{bm}, {bk}]>, tensordesc<bf16[{bn}, {bk}]>, *fp32, tensordesc<bf16[{bm}, {bn}]>, *bf16, "
        "i32:16, i32:16, i32:16, i32:16",
        {**constants, "GROUP": GROUP, "BK": bk, "PROGRAMS": 132},
        **launch,
        capabilities=capabilities,
    )


COMPILED = [
    *(_compiled_product(dtype, *of) for dtype in ("bf16", "fp16", "fp32") for of in tuning.variants("product")),
    *(_compiled_bulk(*of) for of in tuning.variants("bulk_product")),
]
