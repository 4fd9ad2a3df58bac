"""From the selected latents of a batch to new weights: gradients, projection, Adam, unit norm, average, shadow.

Shapes: B rows, k latents per row, n latents, d features, m dead latents.

A latent's gradient is a sum over its entries in the batch, in the order of `latent_index`. One program sums it in
float32, and goes on to the optimiser while it is in registers. Latents that fire often are summed beforehand in
aligned chunks of the index, each of which belongs to one latent, so that no program walks a long list alone; no
sum is atomic, so equal input gives equal bits.

Source: Kingma and Ba 2015, "Adam", algorithm 1; Gao et al. 2024, section 2.1 and appendix A (unit-norm decoder).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels import tuning
from sae.kernels._arguments import expect, expect_contiguous
from sae.kernels._rows import MAX_FEATURES, block_of
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.launches import Settings
from sae.kernels.order import LatentIndex, latent_index, segment_sums

CHUNK = 64
"""Entries summed beforehand where a whole aligned chunk is of one latent."""

BETAS = (0.9, 0.999)
EPS = 6.25e-10


class Parameter(NamedTuple):
    """A weight [n, d] or bias [n] with Adam's moments, its moving average, and its copy in the type of products."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    average: Tensor | None = None
    shadow: Tensor | None = None

    @property
    def T(self) -> "Parameter":
        """The same parameter, stored as [d, n], seen as [n, d]."""
        average, shadow = (None if t is None else t.T for t in (self.average, self.shadow))
        return Parameter(self.weight.T, self.exp_avg.T, self.exp_avg_sq.T, average, shadow)

    def rows(self, part: slice) -> "Parameter":
        """Of some latents."""
        average, shadow = (None if t is None else t[part] for t in (self.average, self.shadow))
        return Parameter(self.weight[part], self.exp_avg[part], self.exp_avg_sq[part], average, shadow)


class Latents(NamedTuple):
    """The parameters that have a row for each latent."""

    encoder: Parameter
    bias: Parameter
    decoder: Parameter


class DeadGradients(NamedTuple):
    """Of the dead latents, from AuxK: place [n] int32 in the others, or -1; encoder and decoder [m, d], bias [m]."""

    place: Tensor
    encoder: Tensor
    bias: Tensor
    decoder: Tensor


@dataclass(frozen=True)
class SparseGradient:
    """What the gradients of encoder, bias and decoder are made of.

    index: order of the entries; values [B, k]: latents; centred [B, d]: the encoder's input
    grads [B, k], error [B, d]: gradients of pre-activations and reconstructions are scale times these
    dead: further gradients, or None
    """

    index: LatentIndex
    values: Tensor
    grads: Tensor
    error: Tensor
    centred: Tensor
    scale: float
    dead: DeadGradients | None = None

    @property
    def bias(self) -> Tensor:
        """Gradient of the encoder's bias [n] from the selected latents alone."""
        return self.sums.bias * self.scale

    @cached_property
    def sums(self) -> "_Sums":
        if use_triton(self.grads, self.error) and self.error.shape[1] <= MAX_FEATURES:
            return _sums(self, _settings(self.error))
        return _Sums(bias=_bias_torch(self))


class Gradients(NamedTuple):
    """Dense: encoder and decoder [n, d], bias [n]."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor


class Hyper(NamedTuple):
    """Of one step: scalars [3] on the device (learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), clip factor), and
    by how much the average moves towards the weights.
    """

    scalars: Tensor
    blend: float = 0.0


def gradients(of: SparseGradient, latents: slice) -> Gradients:
    """Dense gradients of consecutive latents, the decoder's not projected: what replicas can add up.

    Raises ValueError when there are no such latents, and where a kernel is used when shapes or types disagree, or a
    tensor of `of` is not contiguous.
    """
    n = len(of.index.starts) - 1
    if not 0 <= latents.start <= latents.stop <= n:
        raise ValueError(f"gradients expects a slice of latents within 0..{n}, received {latents}")
    if use_triton(of.grads, of.error) and of.error.shape[1] <= MAX_FEATURES:
        return _gradients_triton(of, latents)
    return _gradients_torch(of, latents)


def project(latents: Latents, grads: Gradients) -> Tensor:
    """Project the decoder's gradient in place; returns the sum of squares of all three for each latent [n].

    Raises ValueError as `update` does.
    """
    if _on_gpu(latents):
        return _launch(latents, None, grads, None, project=True)
    project_(grads.decoder, latents.decoder.weight)
    return grads.encoder.square().sum(dim=1) + grads.decoder.square().sum(dim=1) + grads.bias.square()


def apply_gradients(latents: Latents, grads: Gradients, hyper: Hyper) -> None:
    """Adam on all three, unit norm for the decoder's rows, averages and shadows; in place, and grads are used up.

    Raises ValueError as `update` does.
    """
    if _on_gpu(latents):
        _launch(latents, None, grads, hyper)
    else:
        _apply_torch(latents, grads, hyper)


def update(latents: Latents, of: SparseGradient | Gradients, hyper: Hyper) -> Tensor:
    """`gradients`, unless they are given, `project` and `apply_gradients` in one pass; returns the squares [n].

    The gradients are not written. The clip factor must be 1, as the norm is not known beforehand.

    Raises ValueError when a parameter, a moment, an average or a shadow is not contiguous; where a kernel is used, also
    when shapes or types disagree, or a gradient or what it is made of is not contiguous.
    """
    if _on_gpu(latents):
        given = of if isinstance(of, Gradients) else None
        return _launch(latents, None if isinstance(of, Gradients) else of, given, hyper, project=True)
    grads = of if isinstance(of, Gradients) else _gradients_torch(of, slice(0, len(latents.bias.weight)))
    squares = project(latents, grads)
    _apply_torch(latents, grads, hyper)
    return squares


def project_(gradient: Tensor, rows: Tensor) -> None:
    """Remove from gradient [n, d] what would only change the length of unit rows [n, d]; in place."""
    gradient.addcmul_(rows, (rows * gradient).sum(dim=1, keepdim=True), value=-1)


@torch.no_grad()
def adam_(parameter: Parameter, gradient: Tensor, hyper: Hyper) -> None:
    """One step of Adam on one parameter of any shape, in plain torch; in place, and gradient is used up."""
    step_size, inverse_root, factor = hyper.scalars.unbind()
    gradient = gradient.mul_(factor)
    parameter.exp_avg.lerp_(gradient, 1 - BETAS[0])
    parameter.exp_avg_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = torch.sqrt(parameter.exp_avg_sq, out=gradient).mul_(inverse_root).add_(EPS).div_(step_size)
    parameter.weight.addcdiv_(parameter.exp_avg, denominator, value=-1)


@torch.no_grad()
def follow_(parameter: Parameter, hyper: Hyper) -> None:
    """Move the average towards the weight and copy the weight to its shadow."""
    if parameter.average is not None:
        parameter.average.lerp_(parameter.weight, hyper.blend)
    if parameter.shadow is not None:
        parameter.shadow.copy_(parameter.weight)


@torch.no_grad()
def normalise_rows_(rows: Tensor) -> None:
    """Scale each row of [n, d] to unit norm in place; a zero row stays zero."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny))


def _on_gpu(latents: Latents) -> bool:
    for parameter in latents:
        expect_contiguous("update", "parameters, moments, averages and shadows, in rows for latents", *parameter)
    return use_triton(latents.encoder.weight) and latents.encoder.weight.shape[1] <= MAX_FEATURES


def _sum_torch(of: SparseGradient, weights: Tensor, dense: Tensor, latents: slice) -> Tensor:
    """For each of the latents, the sum over its entries of weights [B, k] times rows of dense [B, c]: [n, c]."""
    starts = of.index.starts[latents.start : latents.stop + 1]
    entries = of.index.entries[int(starts[0]) : int(starts[-1])]
    rows, dense = entries // weights.shape[1], dense.to(weights.dtype)
    return segment_sums(rows, weights.flatten()[entries], starts - starts[0], dense)


def _bias_torch(of: SparseGradient) -> Tensor:
    every = slice(0, len(of.index.starts) - 1)
    return _sum_torch(of, of.grads, of.grads.new_ones(len(of.grads), 1), every).squeeze(1)


def _gradients_torch(of: SparseGradient, latents: slice) -> Gradients:
    decoder = _sum_torch(of, of.values, of.error, latents).mul_(of.scale)
    encoder = _sum_torch(of, of.grads, of.centred, latents).mul_(of.scale)
    bias = of.bias[latents].clone()
    if of.dead is not None:
        place = of.dead.place[latents]
        known = place >= 0
        for total, extra in ((decoder, of.dead.decoder), (encoder, of.dead.encoder), (bias, of.dead.bias)):
            total[known] += extra[place[known].long()]
    return Gradients(encoder, bias, decoder)


def _apply_torch(latents: Latents, grads: Gradients, hyper: Hyper) -> None:
    for parameter, gradient in zip(latents, grads, strict=True):
        adam_(parameter, gradient, hyper)
    normalise_rows_(latents.decoder.weight)
    for parameter in latents:
        follow_(parameter, hyper)


class _Sums(NamedTuple):
    """Unscaled: the bias's gradient [n]; over whole chunks [c, d], the encoder's and decoder's gradients."""

    bias: Tensor
    encoder: Tensor | None = None
    decoder: Tensor | None = None


def _sums(of: SparseGradient, settings: Mapping[str, int]) -> _Sums:
    given = of.values, of.grads, of.error, of.centred
    expect("update", "values [B, k] float, grads [B, k] float, error [B, d] float, centred [B, d] float", *given)
    expect_contiguous("update", "values, grads, error and centred", *given)
    (rows, k), d = of.values.shape, of.error.shape[1]
    n, n_chunks = len(of.index.starts) - 1, rows * k // CHUNK
    device = of.error.device
    encoder = torch.empty(n_chunks, d, device=device)
    decoder = torch.empty(n_chunks, d, device=device)
    chunk_bias = torch.empty(n_chunks, device=device)
    bias = torch.empty(n, device=device)
    if n_chunks:
        _chunks_kernel[(n_chunks,)](
            of.index.latents, of.index.entries, of.values, of.grads, of.error, of.centred,
            encoder, decoder, chunk_bias, n, d, k, CHUNK=CHUNK, BLOCK=block_of(d), **settings,
        )  # fmt: skip
    _bias_kernel[(n,)](of.index.starts, of.index.entries, of.grads, chunk_bias, bias, CHUNK, 128, num_warps=1)
    return _Sums(bias, encoder, decoder)


def _gradients_triton(of: SparseGradient, latents: slice) -> Gradients:
    n, d = latents.stop - latents.start, of.error.shape[1]
    encoder, decoder = (torch.empty(n, d, device=of.error.device) for _ in range(2))
    grads = Gradients(encoder, torch.empty(n, device=of.error.device), decoder)
    _launch(None, of, grads, None, first=latents.start)
    return grads


def _launch(
    latents: Latents | None,
    of: SparseGradient | None,
    grads: Gradients | None,
    hyper: Hyper | None,
    *,
    project: bool = False,
    first: int = 0,
    settings: Mapping[str, int] | None = None,
) -> Tensor:
    """Gradients from `of`, of as many latents from `first` on, or from grads; projected, and with hyper applied."""
    rows = latents.encoder.weight if latents is not None else cast(Gradients, grads).encoder
    n, d = rows.shape
    squares = torch.empty(n, device=rows.device)
    unused = squares  # a pointer for what a variant does not touch
    dead = of.dead if of is not None else None
    if dead is not None:
        form = "place [n] int, encoder [m, d] float, bias [m] float and decoder [m, d] float of dead latents"
        expect("update", form, *dead)
        expect_contiguous("update", "gradients of dead latents", *dead)
    if grads is not None:
        form = "weights [n, d] float, and gradients encoder [n, d] float, bias [n] float and decoder [n, d] float"
        expect("update", form, rows, *grads)
        expect_contiguous("update", "gradients", *grads)
    if of is not None:
        index, sums = of.index, of.sums if settings is None else _sums(of, settings)
        gather: tuple[Any, ...] = (
            index.starts[first:], index.entries, of.values, of.grads, of.error, of.centred,
            sums.encoder, sums.decoder, sums.bias[first:], of.values.shape[1], of.scale,
        )  # fmt: skip
    else:
        gather = (*(unused,) * 9, 1, 1.0)
    extra = (dead.place[first:], dead.encoder, dead.decoder, dead.bias) if dead is not None else (unused,) * 4
    given = (grads.encoder, grads.decoder, grads.bias) if grads is not None else (unused,) * 3
    moved = _pointers(latents, unused) if latents is not None else [unused] * 14
    _update_kernel[(n,)](
        *gather, *extra, *given, squares, hyper.scalars if hyper is not None else unused, *moved,
        d, hyper.blend if hyper is not None else 0.0, 1 - BETAS[0], 1 - BETAS[1], EPS,
        GATHER=of is not None, DEAD=dead is not None, PROJECT=project, APPLY=hyper is not None,
        AVERAGE=latents is not None and latents.encoder.average is not None,
        SHADOW=latents is not None and latents.encoder.shadow is not None,
        CHUNK=CHUNK, BLOCK=block_of(d), **(settings or _settings(rows)),
    )  # fmt: skip
    return squares


def _pointers(latents: Latents, unused: Tensor) -> list[Tensor]:
    """What the kernel moves, in its order; a bias has no shadow."""
    tensors = (*latents.encoder, *latents.decoder, *latents.bias[:-1])
    return [unused if tensor is None else tensor for tensor in tensors]


def update_op(d: int) -> str:
    """The op under which a row of d features has its launch settings."""
    block = block_of(d)
    return "update_narrow" if block < 512 else "update" if block <= 1024 else "update_wide"


def _settings(like: Tensor) -> dict[str, int]:
    """How to launch for rows of like [_, d]."""
    d = like.shape[1]
    made_up = cache(partial(_made_up, d, like.device))  # for as long as settings are tried

    def launch(settings: Settings) -> None:
        latents, of, hyper = made_up()
        _launch(latents, of, None, hyper, project=True, settings=_fitting(settings, d))

    return _fitting(tuning.settings(update_op(d), like, (block_of(d),), launch), d)


def _fitting(chosen: Settings, d: int) -> dict[str, int]:
    """Settings with no more entries taken together than there are registers for."""
    return {**chosen, "TILE": max(1, min(chosen["TILE"], MAX_FEATURES // block_of(d)))}


def _made_up(d: int, device: torch.device) -> tuple[Latents, SparseGradient, Hyper]:
    """An update to measure with: each of 2,048 latents fires 32 times."""
    n, rows, k = 2048, 2048, 32
    encoder, decoder = (Parameter(*(torch.ones(n, d, device=device) for _ in range(4))) for _ in range(2))
    bias = Parameter(*(torch.ones(n, device=device) for _ in range(4)))
    index = latent_index(torch.arange(rows * k, dtype=torch.int32, device=device).view(rows, k) * 17 % n, n)
    values, x = torch.ones(rows, k, device=device), torch.ones(rows, d, dtype=torch.bfloat16, device=device)
    return Latents(encoder, bias, decoder), SparseGradient(index, values, values, x, x, 1.0), Hyper(values[0])


@triton.jit
def _sum_entries(
    encoder, decoder, start, end, entries_ptr, values_ptr, grads_ptr, error_ptr, centred_ptr, d, k, feature,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add the entries start..end to both sums [TILE, BLOCK].

    They are added over TILE at the end: lanes of a warp that hold the same sum would else disagree in its last bit
    where the compiler fuses a product into it.
    """
    slot = tl.arange(0, TILE)
    for first in range(start, end, TILE):
        given = first + slot < end
        entry = tl.load(entries_ptr + first + slot, mask=given, other=0)
        value = tl.load(values_ptr + entry, mask=given, other=0.0).to(tl.float32)
        grad = tl.load(grads_ptr + entry, mask=given, other=0.0).to(tl.float32)
        at = (entry // k)[:, None] * d + feature[None, :]
        wanted = given[:, None] & (feature < d)[None, :]
        error = tl.load(error_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        centred = tl.load(centred_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        decoder += value[:, None] * error
        encoder += grad[:, None] * centred
    return encoder, decoder


@triton.jit
def _chunks_kernel(
    latents_ptr, entries_ptr, values_ptr, grads_ptr, error_ptr, centred_ptr,
    encoder_ptr, decoder_ptr, bias_ptr, n, d, k, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum each chunk that belongs to one latent below n; the others are left as they are, and never read."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    latent = tl.load(latents_ptr + start)
    if (latent == tl.load(latents_ptr + start + CHUNK - 1)) & (latent < n):
        feature = tl.arange(0, BLOCK)
        zero = tl.zeros([TILE, BLOCK], tl.float32)
        encoder, decoder = _sum_entries(
            zero, zero, start, start + CHUNK, entries_ptr, values_ptr, grads_ptr, error_ptr, centred_ptr, d, k,
            feature, TILE,
        )  # fmt: skip
        tl.store(encoder_ptr + chunk * d + feature, tl.sum(encoder, axis=0), mask=feature < d)
        tl.store(decoder_ptr + chunk * d + feature, tl.sum(decoder, axis=0), mask=feature < d)
        entry = tl.load(entries_ptr + start + tl.arange(0, CHUNK))
        tl.store(bias_ptr + chunk, tl.sum(tl.load(grads_ptr + entry).to(tl.float32), axis=0))


@triton.jit
def _segment(starts_ptr, latent, CHUNK: tl.constexpr):
    """A latent's entries start..end, of which whole chunks first..last are summed already: start..head and tail..end
    are left.
    """
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    first = (start + CHUNK - 1) // CHUNK
    last = tl.maximum(end // CHUNK, first)
    some = last > first
    head = tl.where(some, first * CHUNK, end)
    tail = tl.where(some, last * CHUNK, end)
    return start, head, first, last, tail, end


@triton.jit
def _bias_kernel(
    starts_ptr, entries_ptr, grads_ptr, chunk_bias_ptr, bias_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    start, head, first, last, tail, end = _segment(starts_ptr, latent, CHUNK)
    slot = tl.arange(0, BLOCK)  # at least CHUNK
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(start, head, BLOCK):
        entry = tl.load(entries_ptr + at + slot, mask=at + slot < head, other=0)
        sums += tl.load(grads_ptr + entry, mask=at + slot < head, other=0.0)
    for at in range(first, last, BLOCK):
        sums += tl.load(chunk_bias_ptr + at + slot, mask=at + slot < last, other=0.0)
    for at in range(tail, end, BLOCK):
        entry = tl.load(entries_ptr + at + slot, mask=at + slot < end, other=0)
        sums += tl.load(grads_ptr + entry, mask=at + slot < end, other=0.0)
    tl.store(bias_ptr + latent, tl.sum(sums, axis=0))


@triton.jit
def _adam(
    weight, gradient, exp_avg_ptr, exp_avg_sq_ptr, at, inside, scalars_ptr, one_minus_beta1, one_minus_beta2, eps
):
    """The weight after one step; the moments are written."""
    step_size = tl.load(scalars_ptr)
    inverse_root = tl.load(scalars_ptr + 1)
    gradient = gradient * tl.load(scalars_ptr + 2)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = exp_avg_sq * (1 - one_minus_beta2) + one_minus_beta2 * gradient * gradient
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    return weight - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root + eps)


@triton.jit
def _store(weight, weight_ptr, average_ptr, shadow_ptr, at, inside, blend, AVERAGE: tl.constexpr, SHADOW: tl.constexpr):
    tl.store(weight_ptr + at, weight, mask=inside)
    if AVERAGE:
        average = tl.load(average_ptr + at, mask=inside, other=0.0)
        tl.store(average_ptr + at, average + blend * (weight - average), mask=inside)
    if SHADOW:
        # Read back: the compiler may compute a value anew for each store, in another order of summation, and a
        # shadow that is not exactly the rounded weight would make a resumed training differ.
        tl.debug_barrier()
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        tl.store(shadow_ptr + at, weight.to(shadow_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update_kernel(
    starts_ptr, entries_ptr, values_ptr, value_grads_ptr, error_ptr, centred_ptr,
    chunk_encoder_ptr, chunk_decoder_ptr, bias_sum_ptr, k, scale,
    place_ptr, dead_encoder_ptr, dead_decoder_ptr, dead_bias_ptr,
    encoder_grad_ptr, decoder_grad_ptr, bias_grad_ptr, squares_ptr, scalars_ptr,
    encoder_ptr, encoder_m_ptr, encoder_v_ptr, encoder_average_ptr, encoder_shadow_ptr,
    decoder_ptr, decoder_m_ptr, decoder_v_ptr, decoder_average_ptr, decoder_shadow_ptr,
    bias_ptr, bias_m_ptr, bias_v_ptr, bias_average_ptr,
    d, blend, one_minus_beta1, one_minus_beta2, eps,
    GATHER: tl.constexpr, DEAD: tl.constexpr, PROJECT: tl.constexpr, APPLY: tl.constexpr,
    AVERAGE: tl.constexpr, SHADOW: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < d
    at = latent * d + feature
    one = tl.full([], 1, tl.int1)
    if GATHER:
        start, head, first, last, tail, end = _segment(starts_ptr, latent, CHUNK)
        encoder = tl.zeros([TILE, BLOCK], tl.float32)
        decoder = tl.zeros([TILE, BLOCK], tl.float32)
        encoder, decoder = _sum_entries(
            encoder, decoder, start, head, entries_ptr, values_ptr, value_grads_ptr, error_ptr, centred_ptr, d, k,
            feature, TILE,
        )  # fmt: skip
        slot = tl.arange(0, TILE)
        for chunk in range(first, last, TILE):
            wanted = (chunk + slot < last)[:, None] & inside[None, :]
            where = (chunk + slot)[:, None] * d + feature[None, :]
            encoder += tl.load(chunk_encoder_ptr + where, mask=wanted, other=0.0)
            decoder += tl.load(chunk_decoder_ptr + where, mask=wanted, other=0.0)
        encoder, decoder = _sum_entries(
            encoder, decoder, tail, end, entries_ptr, values_ptr, value_grads_ptr, error_ptr, centred_ptr, d, k,
            feature, TILE,
        )  # fmt: skip
        encoder = tl.sum(encoder, axis=0) * scale
        decoder = tl.sum(decoder, axis=0) * scale
        bias = tl.load(bias_sum_ptr + latent) * scale
        if DEAD:
            place = tl.load(place_ptr + latent).to(tl.int64)
            if place >= 0:
                encoder += tl.load(dead_encoder_ptr + place * d + feature, mask=inside, other=0.0)
                decoder += tl.load(dead_decoder_ptr + place * d + feature, mask=inside, other=0.0)
                bias += tl.load(dead_bias_ptr + place)
        if not APPLY:
            tl.store(encoder_grad_ptr + at, encoder, mask=inside)
            tl.store(bias_grad_ptr + latent, bias)
    else:
        encoder = tl.load(encoder_grad_ptr + at, mask=inside, other=0.0)
        decoder = tl.load(decoder_grad_ptr + at, mask=inside, other=0.0)
        bias = tl.load(bias_grad_ptr + latent)
    if PROJECT or APPLY:
        decoder_row = tl.load(decoder_ptr + at, mask=inside, other=0.0)
    if PROJECT:
        decoder -= tl.sum(decoder * decoder_row, axis=0) * decoder_row
        squares = tl.sum(encoder * encoder + decoder * decoder, axis=0) + bias * bias
        tl.store(squares_ptr + latent, squares)
    if not APPLY:
        tl.store(decoder_grad_ptr + at, decoder, mask=inside)
    if APPLY:
        encoder_row = tl.load(encoder_ptr + at, mask=inside, other=0.0)
        encoder_row = _adam(
            encoder_row, encoder, encoder_m_ptr, encoder_v_ptr, at, inside, scalars_ptr,
            one_minus_beta1, one_minus_beta2, eps,
        )  # fmt: skip
        _store(encoder_row, encoder_ptr, encoder_average_ptr, encoder_shadow_ptr, at, inside, blend, AVERAGE, SHADOW)
        decoder_row = _adam(
            decoder_row, decoder, decoder_m_ptr, decoder_v_ptr, at, inside, scalars_ptr,
            one_minus_beta1, one_minus_beta2, eps,
        )  # fmt: skip
        norm = tl.sqrt(tl.sum(tl.where(inside, decoder_row * decoder_row, 0.0), axis=0))
        decoder_row = decoder_row / tl.maximum(norm, 1.17549435e-38)
        _store(decoder_row, decoder_ptr, decoder_average_ptr, decoder_shadow_ptr, at, inside, blend, AVERAGE, SHADOW)
        weight = tl.load(bias_ptr + latent)
        weight = _adam(
            weight, bias, bias_m_ptr, bias_v_ptr, latent, one, scalars_ptr, one_minus_beta1, one_minus_beta2, eps
        )
        _store(weight, bias_ptr, bias_average_ptr, bias_ptr, latent, one, blend, AVERAGE, False)


_GATHER, _GIVEN, _PROJECT, _APPLY = True, False, True, True
_VARIANTS = (
    (_GATHER, _PROJECT, _APPLY),
    (_GATHER, not _PROJECT, not _APPLY),
    (_GIVEN, _PROJECT, not _APPLY),
    (_GIVEN, not _PROJECT, _APPLY),
    (_GIVEN, _PROJECT, _APPLY),
)


def _compiled(dtype: str, d: int, chosen: Settings, capabilities: tuple[int, ...]) -> list[Compiled]:
    gathered = f"*i64, *i64, *fp32, *fp32, *{dtype}, *{dtype}, *fp32, *fp32, *fp32, i32, fp32"
    row = f"*fp32, *fp32, *fp32, *fp32, *{dtype}"
    rest = f"*i32, {', '.join(['*fp32'] * 8)}, {row}, {row}, *fp32, *fp32, *fp32, *fp32, i32:16, fp32, fp32, fp32, fp32"
    constants, options = tuning.split(_fitting(chosen, d))
    shape = {"CHUNK": CHUNK, "BLOCK": block_of(d), **constants}
    found = [
        Compiled(
            _chunks_kernel,
            f"*{latents}, *i64, *fp32, *fp32, *{dtype}, *{dtype}, *fp32, *fp32, *fp32, i32:16, i32:16, i32",
            shape,
            **options,
            capabilities=capabilities,
        )
        for latents in ("i16", "i32")
    ]
    for gather, project, apply in _VARIANTS:
        flags = {"GATHER": gather, "DEAD": gather, "PROJECT": project, "APPLY": apply}
        kept = {"AVERAGE": apply, "SHADOW": apply and dtype == "bf16"}
        constants = {**flags, **kept, **shape}
        found.append(Compiled(_update_kernel, f"{gathered}, {rest}", constants, **options, capabilities=capabilities))
    return found


COMPILED = [
    *(
        variant
        for dtype, widths in (("bf16", (64, 768, 4096)), ("fp32", (768,)))
        for d in widths
        for of in tuning.variants(update_op(d))
        for variant in _compiled(dtype, d, *of)
    ),
    Compiled(_bias_kernel, "*i64, *i64, *fp32, *fp32, *fp32", {"CHUNK": CHUNK, "BLOCK": 128}, num_warps=1),
]
