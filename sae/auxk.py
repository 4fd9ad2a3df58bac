"""AuxK: dead latents reconstruct what the others leave, so that they come alive again.

Shapes: B rows, d features, n latents, m places for dead latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.collectives import Group
from sae.kernels.aux_error import aux_error
from sae.kernels.columns import column_sum, weighted_sum
from sae.kernels.encode import encode_dense_topk, encode_topk, scratch_rows
from sae.kernels.update import DeadGradients
from sae.model import won
from sae.products import wide


class Weights(NamedTuple):
    """Of the latents that this rank holds, in the type of products; the bias in that of master weights."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor


class Aux(NamedTuple):
    """What AuxK adds: its loss, and gradients of the dead latents and, in two parts, of the decoder's bias [d]."""

    loss: Tensor
    dead: DeadGradients
    direct: Tensor
    by_latents: Tensor


@dataclass(frozen=True)
class AuxK:
    """weights, pre_bias [d]: live references; tp: the ranks that hold all latents; auxk, coef: as of StepConfig."""

    weights: Weights
    pre_bias: Tensor
    tp: Group
    auxk: int
    coef: float

    def __call__(self, centred: Tensor, error: Tensor, mask: Tensor, room: int, rows: int) -> Aux:
        """Let the latents of mask [n], of which no rank has more than `room`, reconstruct what is left.

        That is x - recons + pre_bias, which gets no gradient. centred, error [B, d]: the encoder's input, and
        reconstruction minus target. rows: those of the whole batch.
        """
        n = len(mask)
        # Every dead latent gets a place below room; what is left of it holds latent 0, with a bias that never wins.
        place = torch.where(mask, mask.cumsum(0) - 1, room)
        every = torch.arange(n, device=mask.device)
        ids = torch.zeros(room + 1, dtype=every.dtype, device=mask.device).scatter_(0, place, every)[:room]
        n_dead = mask.sum()
        real = torch.arange(room, device=mask.device) < n_dead
        dead = Weights(
            self.weights.encoder[ids],
            torch.where(real, self.weights.bias[ids], -torch.inf),
            self.weights.decoder[ids],
        )
        loss, encoder, bias, decoder, direct = self._sums(centred, error, dead)
        # The bound may have been too careful: then there is no loss either.
        coef = (self.tp.sum_(n_dead) > 0).to(loss.dtype) * (self.coef / rows)
        bias = bias * (2 * coef)
        found = DeadGradients(
            torch.where(mask, place, -1).to(torch.int32), encoder.mul_(2 * coef), bias, decoder.mul_(2 * coef)
        )
        return Aux(loss * coef, found, direct * (2 * coef), weighted_sum(bias, dead.encoder))

    def _sums(self, centred: Tensor, error: Tensor, dead: Weights) -> list[Tensor]:
        """`_block` over all rows, as many at a time as pre-activations are held of."""
        size = scratch_rows(len(dead.bias) * centred.element_size())
        sums: list[Tensor] = []
        for part, its_error in zip(centred.split(size), error.split(size), strict=True):
            block = self._block(part, its_error, dead)
            sums = [total.add_(more) for total, more in zip(sums, block, strict=True)] if sums else [*block]
        return sums

    def _block(self, centred: Tensor, error: Tensor, dead: Weights) -> tuple[Tensor, ...]:
        """Of some rows, the loss and half the gradients: of the dead latents' encoder, bias and decoder, and of the
        decoder's bias.
        """
        latents = self._latents(centred, dead)
        if self.tp.size == 1:
            recons = latents @ dead.decoder
        else:
            recons = self.tp.sum_(wide(latents, dead.decoder)).to(latents.dtype)
        loss, grad = aux_error(recons, error, self.pre_bias)
        pre_act_grads: Tensor = torch.ops.aten.threshold_backward.default(grad @ dead.decoder.T, latents, 0)
        encoder, decoder = wide(pre_act_grads.T, centred), wide(latents.T, grad)
        return loss.sum(), encoder, column_sum(pre_act_grads), decoder, column_sum(grad)

    def _latents(self, centred: Tensor, dead: Weights) -> Tensor:
        """The auxk largest of all ranks' dead latents, among zeros: [B, m]."""
        k = min(self.auxk, len(dead.bias))
        if self.tp.size == 1:
            return encode_dense_topk(centred, dead.encoder, dead.bias, k)
        values, indices = encode_topk(centred, dead.encoder, dead.bias, k)
        values = won(self.tp, values, self.auxk).relu_().to(centred.dtype)
        return centred.new_zeros(len(centred), len(dead.bias)).scatter_(1, indices.long(), values)
