"""A training step of a TopK autoencoder whose gradients are written down, not recorded: on a GPU, kernel after kernel
in bfloat16 with float32 master weights, and nothing that the host waits for; elsewhere the kernels' plain twins.

Shapes: B rows, d features, n latents, k selected latents per row, m dead latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
"""

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activations import ReLU, TopK
from sae.kernels.aux_error import aux_error
from sae.kernels.centre import centre
from sae.kernels.columns import column_sum, weighted_sum
from sae.kernels.dispatch import use_triton
from sae.kernels.encode import encode_dense_topk, encode_topk
from sae.kernels.order import latent_index
from sae.kernels.reconstruct import reconstruct
from sae.kernels.update import (
    DeadGradients,
    Hyper,
    Latents,
    Parameter,
    SparseGradient,
    adam_,
    apply_gradients,
    follow_,
    gradients,
    update,
)
from sae.model import NORMALIZE_EPS, Autoencoder
from sae.optimise import EMA, DeadLatents, Optimiser

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class StepConfig:
    """What a training step does besides reconstructing.

    mse_scale: factor of the TopK reconstruction loss, from `initialise`
    auxk, auxk_coef: dead latents that reconstruct the residual, at most; weight of that loss. auxk 0: none
    dead_after_tokens: tokens without firing after which a latent is dead
    l1_coef: weight of the normalised L1 loss; dense activations only
    clip: largest global gradient norm, or None
    ema_decay: decay of the weights' moving average per step, or None
    """

    mse_scale: float = 1.0
    auxk: int = 256
    auxk_coef: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    l1_coef: float = 0.0
    clip: float | None = None
    ema_decay: float | None = 0.999


class Aux(NamedTuple):
    """What AuxK adds: its loss, and gradients of the dead latents and of the decoder's bias [d]."""

    loss: Tensor
    dead: DeadGradients
    pre_bias: Tensor


class SparseStep:
    """The step of an untied TopK autoencoder; see `TrainStep`, which keeps its state."""

    @staticmethod
    def fits(autoencoder: Autoencoder) -> bool:
        """Whether an autoencoder's gradients are those written down here."""
        activation = autoencoder.activation
        return isinstance(activation, TopK) and isinstance(activation.postact, ReLU) and not autoencoder.tied

    def __init__(
        self, autoencoder: Autoencoder, config: StepConfig, optimiser: Optimiser, ema: EMA | None, dead: DeadLatents
    ) -> None:
        assert isinstance(autoencoder.activation, TopK)
        self._model, self._config, self._k = autoencoder, config, autoencoder.activation.k
        self._optimiser, self._ema, self._dead = optimiser, ema, dead
        self._bound = DeadBound(dead, config.dead_after_tokens)
        master = autoencoder.encoder.weight
        self._dtype = torch.bfloat16 if use_triton(master) and master.is_cuda else master.dtype
        self._latents = Latents(
            self._parameter("encoder.weight", shadowed=True),
            self._parameter("latent_bias"),
            self._parameter("decoder.weight", shadowed=True).T,
        )
        self._pre_bias = self._parameter("pre_bias")
        self._scalars = torch.ones(3, dtype=master.dtype, device=master.device)

    def refresh(self) -> None:
        """Say that weights or statistics were changed from outside."""
        for parameter in (self._latents.encoder, self._latents.decoder):
            if parameter.shadow is not None:
                parameter.shadow.copy_(parameter.weight)
        self._bound = DeadBound(self._dead, self._config.dead_after_tokens)

    @torch.no_grad()
    def step(self, x: Tensor, lr: float) -> Metrics:
        """Train on raw activations x [B, d]; metrics as of `TrainStep.step`."""
        if not len(x):
            raise ValueError("a training step expects at least one row of activations, received none")
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            room = self._bound.next(len(x)) if self._config.auxk else 0
            self._scalars.copy_(self._optimiser.advance(lr))
            metrics = self._train(x, room)
            if self._config.auxk:
                self._bound.record(len(x))
        if self._ema is not None:
            self._ema.count()
        return metrics

    def _train(self, x: Tensor, room: int) -> Metrics:
        """Everything that is done on the device; at most `room` latents are dead."""
        (rows, d), config = x.shape, self._config
        encoder, bias, decoder = self._latents
        eps = NORMALIZE_EPS if self._model.normalize else None
        centred, power, centred_power = centre(x, self._pre_bias.weight, eps, self._dtype)
        selected = encode_topk(centred, _product(encoder), bias.weight, self._k)
        values = selected.values.relu_()
        # What is reconstructed is what is encoded: the bias is in both x and its reconstruction.
        found = reconstruct(values, selected.indices, _product(decoder), centred)
        index = latent_index(selected.indices, self._model.n_latents)
        self._dead.update(selected.indices, values, rows)
        aux = self._auxk(centred, found.error, room) if room else None
        scale = 2 * config.mse_scale / (rows * d)
        dead = aux.dead if aux is not None else None
        of = SparseGradient(index, values, found.value_grads, found.error, centred, scale, dead)
        pre_bias = column_sum(found.error) * scale - weighted_sum(of.bias, _product(encoder))
        if aux is not None:
            pre_bias += aux.pre_bias
        norm = self._update(of, pre_bias)
        squared = found.squared_error.sum()
        loss = squared * (config.mse_scale / (rows * d))
        return {
            "loss": loss if aux is None else loss + aux.loss,
            "normalized_mse": (found.squared_error / power).mean(),
            "fvu": squared / (centred_power.sum() - column_sum(centred).square().sum() / rows),
            "l0": (values > 0).sum() / rows,
            "dead": self._dead.mask(config.dead_after_tokens).float().mean(),
            "grad_norm": norm,
        }

    def _update(self, of: SparseGradient, pre_bias: Tensor) -> Tensor:
        """Move all parameters; returns the global norm of the gradients."""
        hyper = Hyper(self._scalars, 1 - self._ema.decay if self._ema is not None else 0.0)
        squares = pre_bias.square().sum()
        if self._optimiser.clip is None:
            norm = (update(self._latents, of, hyper).sum() + squares).sqrt()
        else:
            dense, by_latent = gradients(self._latents, of)
            norm = (by_latent.sum() + squares).sqrt()
            hyper = self._optimiser.clipped(hyper, norm)
            apply_gradients(self._latents, dense, hyper)
        adam_(self._pre_bias, pre_bias, hyper)
        follow_(self._pre_bias, hyper)
        return norm

    def _auxk(self, centred: Tensor, error: Tensor, room: int) -> Aux:
        """Let dead latents reconstruct what is left, x - recons + pre_bias, which gets no gradient."""
        config, n = self._config, self._model.n_latents
        mask = self._dead.mask(config.dead_after_tokens)
        # Every dead latent gets a place below room; what is left of it holds latent 0, with a bias that never wins.
        place = torch.where(mask, mask.cumsum(0) - 1, room)
        every = torch.arange(n, device=mask.device)
        ids = torch.zeros(room + 1, dtype=every.dtype, device=mask.device).scatter_(0, place, every)[:room]
        real = torch.arange(room, device=mask.device) < mask.sum()
        encoder, decoder = _product(self._latents.encoder)[ids], _product(self._latents.decoder)[ids]
        bias = torch.where(real, self._latents.bias.weight[ids], -torch.inf)
        dense = encode_dense_topk(centred, encoder, bias, min(config.auxk, room))
        loss, grad = aux_error(dense @ decoder, error, self._pre_bias.weight)
        # The bound may have been too careful: then there is no loss either.
        coef = mask.any().to(loss.dtype) * (config.auxk_coef / len(centred))
        pre_act_grads: Tensor = torch.ops.aten.threshold_backward.default(grad @ decoder.T, dense, 0)
        bias_grad = column_sum(pre_act_grads) * (2 * coef)
        dead = DeadGradients(
            torch.where(mask, place, -1).to(torch.int32),
            _wide_product(pre_act_grads.T, centred).mul_(2 * coef),
            bias_grad,
            _wide_product(dense.T, grad).mul_(2 * coef),
        )
        return Aux(loss.sum() * coef, dead, column_sum(grad) * (2 * coef) - weighted_sum(bias_grad, encoder))

    def _parameter(self, name: str, *, shadowed: bool = False) -> Parameter:
        parameter = self._optimiser.parameter(name, self._ema.average(name) if self._ema is not None else None)
        if shadowed and self._dtype != parameter.weight.dtype:
            parameter = parameter._replace(shadow=parameter.weight.to(self._dtype))
        return parameter


class _Count(NamedTuple):
    """A number on its way to the host, and the number of tokens up to which it is a bound."""

    latents: Tensor
    copied: torch.cuda.Event
    holds_until: int


class DeadBound:
    """How many latents may be dead in the coming step, without waiting for a GPU to count them.

    On a GPU the count made two steps before is read, of the latents that can be dead by then.
    """

    LAG = 2

    def __init__(self, dead: DeadLatents, threshold: int) -> None:
        self._dead, self._threshold = dead, threshold
        self._tokens = 0
        self._counts: deque[_Count] = deque()

    def next(self, rows: int) -> int:
        """A bound for the dead latents after a step on so many rows."""
        since = self._dead.tokens_since
        known = self._counts.popleft() if len(self._counts) >= self.LAG else None
        if known is None or self._tokens + rows > known.holds_until:  # the first steps, and larger ones, wait
            bound = int(self._within(rows))
        else:
            known.copied.synchronize()
            bound = int(known.latents)
        if not since.is_cuda:
            return bound
        # Rounded up, by at most an eighth where there are many, so that shapes are few.
        unit = max(256, (1 << bound.bit_length()) // 16)
        return min(-(-bound // unit) * unit, len(since))

    def record(self, rows: int) -> None:
        """Count after a step on so many rows, for a later one."""
        self._tokens += rows
        if not self._dead.tokens_since.is_cuda:
            return
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_(self._within(self.LAG * rows), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._counts.append(_Count(count, copied, self._tokens + self.LAG * rows))

    def _within(self, tokens: int) -> Tensor:
        """How many latents are dead after so many tokens more, if none of them fires."""
        return (self._dead.tokens_since > self._threshold - tokens).sum()


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two tensors of the type of products, in that of master weights."""
    if a.is_cuda and a.dtype != torch.float64:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _product(parameter: Parameter) -> Tensor:
    """The weight in the type of products."""
    return parameter.weight if parameter.shadow is None else parameter.shadow
