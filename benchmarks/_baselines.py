"""The same training step as one writes it with torch alone, once with sparse and once with dense latents.

Mixed precision by autocast, fp32 masters, autograd, fused Adam. Same mathematics as `sae.training`, of whose metrics
only the loss is computed.

Shapes: B rows, d features, n latents, k selected latents per row, n_dead dead latents.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._timing import Work
from sae.model import Autoencoder
from sae.optimise import normalise_rows_
from sae.training import StepConfig

BETAS = (0.9, 0.999)
EPS = 6.25e-10


class TorchStep:
    """linear, torch.topk, embedding_bag."""

    def __init__(self, start: Autoencoder, k: int, config: StepConfig) -> None:
        self.k, self.config, self.normalize = k, config, start.normalize
        tensors = start.pre_bias, start.encoder.weight, start.latent_bias, start.decoder_rows
        self._parameters = [tensor.detach().clone().contiguous().requires_grad_() for tensor in tensors]
        self.pre_bias, self.encoder, self.latent_bias, self.decoder = self._parameters
        self._averages = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        self._since = start.stats_last_nonzero.clone()
        self._adam = torch.optim.Adam(self._parameters, betas=BETAS, eps=EPS, fused=True)

    def step(self, x: Tensor, lr: float) -> Tensor:
        """Train on raw activations x [B, d]; the loss, a scalar tensor."""
        loss = self._loss(self._preprocess(x.float()))
        loss.backward()
        with torch.no_grad():
            self._update(lr)
        return loss.detach()

    def decode(self, values: Tensor, indices: Tensor, n: int) -> Tensor:
        """[B, d] of values [B, k] at indices [B, k] of n latents, without pre_bias."""
        # In float32: on a GPU torch has no gradient of a bag's weights in bfloat16.
        return F.embedding_bag(indices, self.decoder, per_sample_weights=values.float(), mode="sum")

    def _preprocess(self, x: Tensor) -> Tensor:
        if not self.normalize:
            return x
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.std(dim=-1, keepdim=True) + 1e-5)

    def _loss(self, x: Tensor) -> Tensor:
        # encoder @ (x - pre_bias): taken off the bias, pre_bias costs no product of size [B, n] in the backward pass.
        bias = torch.addmv(self.latent_bias, self.encoder, self.pre_bias, alpha=-1)
        with torch.autocast(x.device.type, torch.bfloat16):
            pre_act = F.linear(x, self.encoder, bias)
            values, indices = pre_act.topk(self.k, dim=1, sorted=False)
            recons = self.decode(values.relu(), indices, pre_act.shape[1])
        recons = recons + self.pre_bias
        loss = (recons - x).square().mean() * self.config.mse_scale
        dead = (self._since > self.config.dead_after_tokens).nonzero().squeeze(1)
        self._since.add_(len(x)).index_fill_(0, indices.flatten(), 0)
        if len(dead):
            loss = loss + self.config.auxk_coef * self._aux_loss(pre_act, dead, (x - recons).detach())
        return loss

    def _aux_loss(self, pre_act: Tensor, dead: Tensor, residual: Tensor) -> Tensor:
        with torch.autocast(pre_act.device.type, torch.bfloat16):
            of_dead = pre_act.index_select(1, dead)
            values, indices = of_dead.topk(min(self.config.auxk, len(dead)), dim=1, sorted=False)
            latents = torch.zeros_like(of_dead).scatter(1, indices, values.relu())
            recons = latents @ self.decoder.index_select(0, dead)
        error = recons + self.pre_bias - (residual + self.pre_bias.detach())
        return (error.square().mean(dim=-1) / residual.square().mean(dim=-1)).mean()

    def _update(self, lr: float) -> None:
        gradient = cast(Tensor, self.decoder.grad)
        gradient.addcmul_(self.decoder, (self.decoder * gradient).sum(dim=1, keepdim=True), value=-1)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        normalise_rows_(self.decoder)
        if self.config.ema_decay is not None:
            torch._foreach_lerp_(self._averages, self._parameters, 1 - self.config.ema_decay)


class DenseStep(TorchStep):
    """linear, torch.topk, a scatter to [B, n] and a dense product."""

    def decode(self, values: Tensor, indices: Tensor, n: int) -> Tensor:
        latents = values.new_zeros(len(values), n).scatter(1, indices, values)
        return latents @ self.decoder


def bare_product(weight: Tensor, batches: Sequence[Tensor]) -> Work:
    """The encoder's product alone: batches [B, d] in turns by weight [n, d] to [B, n], all bfloat16."""
    weight, turns = weight.detach().bfloat16(), cycle([batch.bfloat16() for batch in batches])
    out = torch.empty(len(batches[0]), len(weight), dtype=weight.dtype, device=weight.device)
    return lambda: torch.mm(next(turns), weight.T, out=out)
