"""A training step of a TopK autoencoder whose gradients are written down, not recorded: on a GPU, kernel after kernel
in bfloat16 with float32 master weights, and nothing that the host waits for; elsewhere the kernels' plain twins.

Shapes: B rows, d features, n latents, k selected latents per row, m dead latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activations import ReLU, TopK
from sae.auxk import AuxK, Weights
from sae.collectives import Wait
from sae.dead_bound import DeadBound
from sae.graphs import Replay
from sae.kernels._rows import MAX_FEATURES
from sae.kernels.centre import centre
from sae.kernels.columns import column_sum, weighted_sum
from sae.kernels.dispatch import use_triton
from sae.kernels.encode import encode_topk
from sae.kernels.order import LatentIndex, latent_index
from sae.kernels.reconstruct import Reconstruction, partial, reconstruct
from sae.kernels.update import (
    DeadGradients,
    Gradients,
    Hyper,
    Latents,
    Parameter,
    SparseGradient,
    adam_,
    apply_gradients,
    follow_,
    gradients,
    project,
    update,
)
from sae.losses import ratio
from sae.model import NORMALIZE_EPS, Autoencoder, won
from sae.optimise import EMA, DeadLatents, Optimiser
from sae.sharded import Holdings

Metrics = dict[str, Tensor]

METRICS = ("loss", "normalized_mse", "fvu", "l0", "dead", "grad_norm")

MULTI = 4
"""How many times k latents Multi-TopK takes, so that its codes can be cut elsewhere than at k."""


@dataclass(frozen=True)
class StepConfig:
    """What a training step does besides reconstructing.

    mse_scale: factor of the TopK reconstruction loss, from `initialise`
    auxk, auxk_coef: dead latents that reconstruct the residual, at most; weight of that loss. auxk 0: none
    dead_after_tokens: tokens without firing after which a latent is dead
    sparsity_coef: weight of the activation's own loss: L1 of ReLU, L0 of JumpReLU
    clip: largest global gradient norm, or None
    ema_decay: decay of the weights' moving average per step, or None
    multi_topk_coef: weight of the loss with MULTI times k latents; TopK only
    graphs: launch the kernels of a step on a GPU at once; the bits are the same
    """

    mse_scale: float = 1.0
    auxk: int = 256
    auxk_coef: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    sparsity_coef: float = 0.0
    clip: float | None = None
    ema_decay: float | None = 0.999
    multi_topk_coef: float = 0.0
    graphs: bool = True


class _Part(NamedTuple):
    """A bucket of the held latents, and those in it that this rank moves."""

    bucket: slice
    latents: Latents


class SparseStep:
    """The step of an untied TopK autoencoder; see `TrainStep`, which keeps its state.

    On a mesh, x are the rows of this rank's dp index, and the metrics those of all rows.
    """

    @staticmethod
    def fits(autoencoder: Autoencoder) -> bool:
        """Whether an autoencoder's gradients are those written down here."""
        activation = autoencoder.activation
        known = isinstance(activation, TopK) and isinstance(activation.postact, ReLU)
        plain = type(autoencoder) is Autoencoder and not autoencoder.tied and not autoencoder.nested.sizes
        return known and plain

    def __init__(
        self, holdings: Holdings, config: StepConfig, optimiser: Optimiser, ema: EMA | None, dead: DeadLatents
    ) -> None:
        self._model, self._config, self._mesh = holdings.held, config, holdings.mesh
        assert isinstance(self._model.activation, TopK)
        self._k = self._model.activation.k
        self._optimiser, self._ema, self._dead = optimiser, ema, dead
        self._bound = DeadBound(dead, config.dead_after_tokens, self._mesh.tp)
        self._holdings = holdings
        master = self._model.encoder.weight
        self._dtype = torch.bfloat16 if use_triton(master) and master.is_cuda else master.dtype
        self._weights, self._parts = self._divided()
        self._pre_bias = self._parameter("pre_bias")
        self._auxk = AuxK(self._weights, self._pre_bias.weight, self._mesh.tp, config.auxk, config.auxk_coef)
        self._published: list[Wait] = []
        # The twins, to which wider rows go, wait for the device.
        by_kernels = self._dtype == torch.bfloat16 and master.shape[1] <= MAX_FEATURES
        recorded = config.graphs and by_kernels and self._mesh.everyone.recordable
        self._replay = Replay(self._recorded) if recorded else None
        self._run = self._replay if self._replay is not None else self._train
        self._scalars = torch.ones(3, dtype=master.dtype, device=master.device)
        self.refresh()

    def _divided(self) -> tuple[Weights, list[_Part]]:
        """The weights of products, and the parameters that this rank moves, bucket by bucket."""
        encoder, bias, decoder = (self._parameter(name) for name in ("encoder.weight", "latent_bias", "decoder.weight"))
        moved, model, own = Latents(encoder, bias, decoder.T), self._model, self._holdings.buckets
        rows = model.encoder.weight, model.latent_bias, model.decoder_rows
        types = self._dtype, model.latent_bias.dtype, self._dtype
        weights = Weights(*(tensor.detach().to(dtype) for tensor, dtype in zip(rows, types, strict=True)))
        if self._mesh.dp.size > 1:
            own = self._holdings.shares
            assert model.decoder is not None
            # The masters are elsewhere now.
            model.encoder.weight.data, model.latent_bias.data = weights.encoder, weights.bias
            model.decoder.weight.data, model.pre_bias.data = (
                weights.decoder.T,
                self._optimiser.autoencoder.pre_bias.data,
            )
        parts, start = [], 0
        for bucket, share in zip(self._holdings.buckets, own, strict=True):
            part = slice(start, start + share.stop - share.start)
            latents = (_shadowed(p.rows(part), w[share]) for p, w in zip(moved, weights, strict=True))
            parts.append(_Part(bucket, Latents(*latents)))
            start = part.stop
        return weights, parts

    def refresh(self, bound: Tensor | None = None) -> None:
        """Say that weights or statistics were changed from outside, with what `save_bound` wrote down of these."""
        for part in self._parts:
            for parameter in part.latents:
                if parameter.shadow is not None:
                    parameter.shadow.copy_(parameter.weight)
            self._publish(part)
        self.settle()
        self._bound = DeadBound(self._dead, self._config.dead_after_tokens, self._mesh.tp)
        if bound is not None:
            self._bound.load(bound)

    @torch.no_grad()
    def step(self, x: Tensor, lr: float) -> Metrics:
        """Train on raw activations x [B, d]; metrics as of `TrainStep.step`."""
        if not len(x):
            raise ValueError("a training step expects at least one row of activations, received none")
        rows = len(x) * self._mesh.dp.size
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            room = self._bound.next(rows) if self._config.auxk else 0
            self._scalars.copy_(self._optimiser.advance(lr))
            values = self._run(x, room)
            if self._config.auxk:
                self._bound.record(rows)
        if self._ema is not None:
            self._ema.count()
        return dict(zip(METRICS, values.unbind(), strict=True))

    def _recorded(self, x: Tensor, room: int) -> Tensor:
        """`_train` that leaves nothing under way: a graph can't wait for what another has begun."""
        metrics = self._train(x, room)
        self.settle()
        return metrics

    def _train(self, x: Tensor, room: int) -> Tensor:
        """Everything that is done on the device, if at most `room` latents of any rank are dead; gives METRICS."""
        config, mesh = self._config, self._mesh
        rows, d = len(x) * mesh.dp.size, x.shape[1]
        eps = NORMALIZE_EPS if self._model.normalize else None
        centred, power, centred_power = centre(x, self._pre_bias.weight, eps, self._dtype)
        self.settle()
        values, indices, more = self._selected(centred)
        # What is reconstructed is what is encoded: the bias is in both x and its reconstruction.
        found = self._reconstructed(values, indices, centred)
        self._dead.update(indices, values, rows, mesh.dp)
        mask = self._dead.mask(config.dead_after_tokens)
        aux = self._auxk(centred, found.error, mask, room, rows) if room else None
        scale = 2 * config.mse_scale / (rows * d)
        squared_error, dead = found.squared_error.sum(), aux.dead if aux is not None else None
        loss = squared_error * (config.mse_scale / (rows * d))
        if more is None:
            of = SparseGradient(
                self._index(values, indices), values, found.value_grads, found.error, centred, scale, dead
            )
        else:
            wider = self._reconstructed(more, indices, centred)
            loss += wider.squared_error.sum() * (config.multi_topk_coef * config.mse_scale / (rows * d))
            of = self._both(values, more, indices, found, wider, centred, scale, dead)
        direct, by_latents = column_sum(of.error) * scale, weighted_sum(of.bias, self._weights.encoder)
        if aux is not None:
            direct, by_latents = direct + aux.direct, by_latents + aux.by_latents
        n_dead = mask.sum(dtype=direct.dtype)
        active = (values > 0).sum(dtype=direct.dtype)
        if aux is not None:
            loss += aux.loss
        of_rows = (
            direct,
            column_sum(centred),
            squared_error,
            ratio(found.squared_error, power).sum(),
            centred_power.sum(),
            loss,
        )
        direct, total, squared, normalised, spread, loss, by_latents, active, n_dead = self._summed(
            of_rows, (by_latents, active), (n_dead,)
        )
        pre_bias = direct - by_latents
        norm = self._move(of, pre_bias)
        fvu = squared / (spread - total.square().sum() / rows)
        share_dead = n_dead / (self._model.n_latents * mesh.tp.size)
        return torch.stack([loss, normalised / rows, fvu, active / rows, share_dead, norm])

    def _summed(
        self, of_rows: tuple[Tensor, ...], of_both: tuple[Tensor, ...], of_latents: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """Sums over all ranks of what each has of its rows, of its rows and latents, and of its latents.

        In one message to all, so that every rank gets the same bits, and replicas stay replicas.
        """
        mesh = self._mesh
        if mesh.tp.rank > 0:
            of_rows = tuple(map(torch.zeros_like, of_rows))
        if mesh.dp.rank > 0:
            of_latents = tuple(map(torch.zeros_like, of_latents))
        return mesh.everyone.sum_all(*of_rows, *of_both, *of_latents)

    def _selected(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents [B, c], which they are, and the same with those that only Multi-TopK takes.

        Those that others have beaten, here or on other ranks, are zero.
        """
        several = self._config.multi_topk_coef > 0
        k = self._k * MULTI if several else self._k
        c = min(k, self._model.n_latents)
        values, indices = encode_topk(centred, self._weights.encoder, self._weights.bias, c)
        values = won(self._mesh.tp, values, k)
        if not several:
            return values.relu_(), indices, None
        return won(self._mesh.tp, values, self._k).relu(), indices, values.relu_()

    def _reconstructed(self, values: Tensor, indices: Tensor, centred: Tensor) -> Reconstruction:
        decoder, tp = self._weights.decoder, self._mesh.tp
        if tp.size == 1:
            return reconstruct(values, indices, decoder, centred)
        return reconstruct(values, indices, decoder, centred, tp.sum_(partial(values, indices, decoder)))

    def _index(self, values: Tensor, indices: Tensor) -> LatentIndex:
        n = self._model.n_latents
        if self._mesh.tp.size > 1 or self._config.multi_topk_coef > 0:  # many are beaten, and need no further look
            indices = torch.where(values == 0, n, indices)
        return latent_index(indices, n)

    def _both(
        self,
        values: Tensor,
        more: Tensor,
        indices: Tensor,
        found: Reconstruction,
        wider: Reconstruction,
        centred: Tensor,
        scale: float,
        dead: DeadGradients | None,
    ) -> SparseGradient:
        """Gradients of both reconstructions, as if of twice as many rows."""
        latents, coef = torch.cat([values, more]), self._config.multi_topk_coef
        return SparseGradient(
            self._index(latents, torch.cat([indices, indices])),
            latents,
            torch.cat([found.value_grads, wider.value_grads * coef]),
            torch.cat([found.error, wider.error * coef]),
            torch.cat([centred, centred]),
            scale,
            dead,
        )

    def _move(self, of: SparseGradient, pre_bias: Tensor) -> Tensor:
        """Move all parameters; returns the global norm of the gradients."""
        hyper = Hyper(self._scalars, 1 - self._ema.decay if self._ema is not None else 0.0)
        if self._optimiser.clip is None:
            squares = torch.zeros_like(pre_bias[0])
            for part, gradient in self._gradients(of):
                squares += update(part.latents, gradient, hyper).sum()
                self._publish(part)
            norm = self._norm(squares, pre_bias)
        else:
            found = [
                (part, gradients(of, part.bucket) if isinstance(gradient, SparseGradient) else gradient)
                for part, gradient in self._gradients(of)
            ]
            norm = self._norm(torch.stack([project(part.latents, g).sum() for part, g in found]).sum(), pre_bias)
            hyper = self._optimiser.clipped(hyper, norm)
            for part, gradient in found:
                apply_gradients(part.latents, gradient, hyper)
                self._publish(part)
        adam_(self._pre_bias, pre_bias, hyper)
        follow_(self._pre_bias, hyper)
        return norm

    def _norm(self, squares: Tensor, pre_bias: Tensor) -> Tensor:
        """Of all gradients, of which each rank knows the squares of those that it moves."""
        return (self._mesh.everyone.sum_(squares) + pre_bias.square().sum()).sqrt()

    def _gradients(self, of: SparseGradient) -> Iterator[tuple[_Part, SparseGradient | Gradients]]:
        """Gradients of what this rank moves, summed over dp: one bucket is under way while the next is computed."""
        if self._mesh.dp.size == 1:
            yield from ((part, of) for part in self._parts)
            return
        begun: deque[tuple[_Part, list[tuple[Tensor, Wait]]]] = deque()
        for part in [*self._parts, None]:
            if part is not None:
                exchanges = [self._mesh.dp.begin_sum_to_shares(g) for g in gradients(of, part.bucket)]
                begun.append((part, exchanges))
            if len(begun) > 1 or part is None:
                first, exchanges = begun.popleft()
                for _, wait in exchanges:
                    wait()
                yield first, Gradients(*(gradient for gradient, _ in exchanges))

    def _publish(self, part: _Part) -> None:
        """Begin to give the ranks of dp the new weights of a part."""
        if self._mesh.dp.size > 1:
            bias = part.latents.bias
            follow_(bias._replace(average=None), Hyper(self._scalars))  # kernels write no shadow of a bias
            self._published += [self._holdings.begin_gather(rows, part.bucket) for rows in self._weights]

    def settle(self) -> None:
        """Wait for the weights that others have moved."""
        for wait in self._published:
            wait()
        self._published.clear()

    def end(self) -> None:
        """Let go of recorded steps, which keep the communicators of a mesh, and record none from here on."""
        if self._replay is not None:
            self._replay.forget()
            self._run = self._train

    def _parameter(self, name: str) -> Parameter:
        return self._optimiser.parameter(name, self._ema.average(name) if self._ema is not None else None)

    def save_bound(self, into: Tensor) -> None:
        """Write down what is known of the number of dead latents, so that a resumed training takes the same bits."""
        into.copy_(self._bound.state())


def _shadowed(parameter: Parameter, copy: Tensor) -> Parameter:
    """The parameter with its copy for products, where that is another tensor."""
    return parameter if copy.data_ptr() == parameter.weight.data_ptr() else parameter._replace(shadow=copy)
