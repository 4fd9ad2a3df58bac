"""One training step on one device.

Shapes: B rows, d features, n latents, k selected latents per row, n_dead dead latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.kernels.decode import decode
from sae.kernels.topk import topk
from sae.losses import autoencoder_loss, fvu, normalized_mse, topk_loss
from sae.model import Autoencoder, TopK
from sae.optimise import EMA, DeadLatents, Optimiser, copy_tensors_
from sae.sparse_step import Metrics, SparseStep, StepConfig

__all__ = ["Metrics", "StepConfig", "TrainStep"]


class TrainStep:
    """An autoencoder in training: forward, loss, backward, optimiser, average, dead latents.

    Make it after the autoencoder is on its device. With `normalize`, losses and metrics are those of the
    normalised space.
    """

    def __init__(self, autoencoder: Autoencoder, config: StepConfig) -> None:
        self.autoencoder = autoencoder
        self.config = config
        self.optimiser = Optimiser(autoencoder, config.clip)
        self.ema = EMA(autoencoder, config.ema_decay) if config.ema_decay is not None else None
        self.dead = DeadLatents(autoencoder.stats_last_nonzero)
        fits = isinstance(autoencoder.activation, TopK) and SparseStep.fits(autoencoder)
        self._sparse = SparseStep(autoencoder, config, self.optimiser, self.ema, self.dead) if fits else None

    def step(self, x: Tensor, lr: float) -> Metrics:
        """Train on raw activations x [B, d] with learning rate lr.

        Returns scalar tensors of this batch, before the update: loss, normalized_mse, fvu, l0 (active
        latents per row), dead (fraction of latents), grad_norm.
        """
        if self._sparse is not None:
            return self._sparse.step(x, lr)
        x, _ = self.autoencoder.preprocess(x)
        forward = self._topk if isinstance(self.autoencoder.activation, TopK) else self._dense
        loss, recons, l0 = forward(x)
        loss.backward()
        grad_norm = self.optimiser.step(lr)
        if self.ema is not None:
            self.ema.update(self.autoencoder)
        recons = recons.detach()
        return {
            "loss": loss.detach(),
            "normalized_mse": normalized_mse(recons, x),
            "fvu": fvu(recons, x),
            "l0": l0,
            "dead": self.dead.mask(self.config.dead_after_tokens).float().mean(),
            "grad_norm": grad_norm,
        }

    def _topk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, config = self.autoencoder, self.config
        assert isinstance(model.activation, TopK)
        with torch.no_grad():
            pre_act = model.encode_pre_act(x)
            selected, indices = topk(pre_act, model.activation.k)
            active = model.activation.postact(selected)
            self.dead.update(indices, active, len(x))
            aux_selected, aux_indices = self._select_dead(pre_act)
        # One attached tensor for both selections: the encoder's gradient is then one sparse product.
        both = torch.cat([selected, aux_selected], dim=1), torch.cat([indices, aux_indices], dim=1)
        latents = model.activation.postact(model.attach(x, *both))
        values, aux_values = latents.split([indices.shape[1], aux_indices.shape[1]], dim=1)
        recons = _reconstruct(model, values, indices)
        aux_recons = None
        if aux_indices.shape[1]:
            aux_recons = _reconstruct(model, aux_values, aux_indices)
        loss = topk_loss(recons, x, config.mse_scale, aux_recons, model.pre_bias, config.auxk_coef)
        return loss, recons, (active > 0).sum(dim=1).float().mean()

    def _select_dead(self, pre_act: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxk largest pre-activations [B, n] among dead latents, with their ids; maybe none."""
        dead = self.dead.mask(self.config.dead_after_tokens).nonzero().squeeze(1)
        auxk = min(self.config.auxk, len(dead))
        if not auxk:
            empty = pre_act[:, :0]
            return empty, empty.to(torch.int64)
        values, positions = topk(pre_act[:, dead], auxk)
        return values, dead[positions]

    def _dense(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.autoencoder
        latents = model.activation(model.encode_pre_act(x))
        recons = latents @ model.decoder_rows + model.pre_bias
        active = latents.detach() != 0
        self.dead.update_fired((latents.detach() > 0).any(dim=0), len(x))
        loss = autoencoder_loss(recons, x, latents, self.config.l1_coef)
        return loss, recons, active.sum(dim=1).float().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, flat and contiguous.

        Some are live references: save or clone them before the next step.
        """
        return {name: tensor.contiguous() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in; the next step continues bit by bit.

        Raises AutoencoderError when it is of another autoencoder or configuration.
        """
        copy_tensors_(self._tensors(), state)
        if self._sparse is not None:
            self._sparse.refresh()

    def _tensors(self) -> dict[str, Tensor]:
        model = self.autoencoder
        parts: dict[str, Mapping[str, Tensor]] = {
            "autoencoder": {**dict(model.named_parameters()), **dict(model.named_buffers())},
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }
        return {
            f"{part}.{name}": tensor.detach() for part, tensors in parts.items() for name, tensor in tensors.items()
        }


def _reconstruct(model: Autoencoder, values: Tensor, indices: Tensor) -> Tensor:
    """Decode sparse latents [B, k] to [B, d] without undoing the normalisation."""
    return decode(values, indices, model.decoder_rows) + model.pre_bias
