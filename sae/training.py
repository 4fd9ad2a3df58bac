"""One training step, on one device or on a mesh of them.

Shapes: B rows, d features, n latents, k selected latents per row, n_dead dead latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from sae.dead_bound import DeadBound
from sae.kernels.topk import topk
from sae.losses import auxk_loss, mse, normalized_mse
from sae.mesh import Mesh
from sae.model import Autoencoder, TopK, won
from sae.optimise import EMA, DeadLatents, Optimiser, copy_tensors_
from sae.sharded import Holdings
from sae.sparse_step import MULTI, Metrics, SparseStep, StepConfig

__all__ = ["Metrics", "StepConfig", "TrainStep"]


class TrainStep:
    """An autoencoder in training: forward, loss, backward, optimiser, average, dead latents.

    Make it after the autoencoder is on its device. With `normalize`, losses and metrics are those of the
    normalised space.

    On a mesh the autoencoder is the shard that this rank holds; see `sae.sharded` for what is held and owned.
    """

    def __init__(self, autoencoder: Autoencoder, config: StepConfig, mesh: Mesh | None = None) -> None:
        self.autoencoder = autoencoder
        self.config = config
        self.mesh = mesh if mesh is not None else Mesh()
        self.holdings = Holdings(autoencoder, self.mesh)
        self.optimiser = Optimiser(self.holdings.owned, config.clip)
        self.ema = EMA(self.holdings.owned, config.ema_decay) if config.ema_decay is not None else None
        self.dead = DeadLatents(autoencoder.stats_last_nonzero)
        self._bound = torch.full(DeadBound.STATE, -1)
        fits = isinstance(autoencoder.activation, TopK) and SparseStep.fits(autoencoder)
        self._sparse = SparseStep(self.holdings, config, self.optimiser, self.ema, self.dead) if fits else None

    def step(self, x: Tensor, lr: float) -> Metrics:
        """Train on raw activations x [B, d] with learning rate lr; on a mesh, on those of all dp ranks.

        Returns scalar tensors of this batch, before the update: loss, normalized_mse, fvu, l0 (active
        latents per row), dead (fraction of latents), grad_norm.
        """
        if self._sparse is not None:
            return self._sparse.step(x, lr)
        with self._rounding():
            return self._by_autograd(x.to(self.autoencoder.pre_bias.dtype), lr)

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        """Where dense products in float32 would take many times as long as all else."""
        model = self.autoencoder
        model.rounds = model.pre_bias.is_cuda and model.pre_bias.dtype == torch.float32
        try:
            yield
        finally:
            model.rounds = False

    def _by_autograd(self, x: Tensor, lr: float) -> Metrics:
        """`step` of what has no kernels of its own."""
        x, target = self.autoencoder.seen(x)
        forward = self._topk if isinstance(self.autoencoder.activation, TopK) else self._dense
        loss, of_shard, recons, active = forward(x, target)
        ((loss + of_shard) / self.mesh.dp.size).backward()
        grad_norm = self._move(lr)
        of_shard, active = self.mesh.tp.sum_all(of_shard.detach(), active)
        return {**self._metrics(target, recons.detach(), loss.detach() + of_shard, active), "grad_norm": grad_norm}

    def _topk(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, what the shard's own latents add to it, reconstructions, and the number of active latents."""
        model, config = self.autoencoder, self.config
        assert isinstance(model.activation, TopK)
        with torch.no_grad():
            pre_act = model.encode_pre_act(x)
            selected, indices = model.select(pre_act, model.activation.k)
            active = model.activation.postact(selected)
            self.dead.update(indices, active, len(x) * self.mesh.dp.size, self.mesh.dp)
            several = config.multi_topk_coef > 0
            more = model.select(pre_act, model.activation.k * MULTI) if several else _nothing(pre_act)
            selections = [(selected, indices), self._select_dead(pre_act), more]
        # One attached tensor for all selections: the encoder's gradient is then one sparse product.
        chosen, ids = (torch.cat(parts, dim=1) for parts in zip(*selections, strict=True))
        latents = model.activation.postact(model.attach(x, chosen, ids))
        latents = torch.where(chosen.isneginf(), 0, latents)  # beaten by another shard's
        values, aux_values, more_values = latents.split([ids.shape[1] for _, ids in selections], dim=1)
        recons = model.add_bypass(model.recombine_sparse(values, indices), x)
        loss = mse(recons, target) * config.mse_scale
        for nested in model.nested.sparse(model, values, indices):
            loss = loss + mse(model.add_bypass(nested, x), target) * config.mse_scale
        if several:
            wider = model.add_bypass(model.recombine_sparse(more_values, more[1]), x)
            loss = loss + config.multi_topk_coef * mse(wider, target) * config.mse_scale
        loss = loss + self._auxk(aux_values, selections[1][1], recons, target)
        return loss, torch.zeros_like(loss), recons, (active > 0).sum(dtype=loss.dtype)

    def _auxk(self, values: Tensor, indices: Tensor, recons: Tensor, target: Tensor) -> Tensor:
        """The loss of dead latents, values and indices [B, c], which reconstruct what the others left over."""
        if not indices.shape[1]:
            return recons.new_zeros(())
        model = self.autoencoder
        aux_recons = model.recombine_sparse(values, indices)
        return self.config.auxk_coef * auxk_loss(aux_recons, recons, target, model.output_bias)

    def _select_dead(self, pre_act: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxk largest pre-activations [B, n] among dead latents, with their ids; maybe none."""
        tp = self.mesh.tp
        dead = self.dead.mask(self.config.dead_after_tokens).nonzero().squeeze(1)
        most = int(tp.max_(torch.tensor(len(dead), device=dead.device)))
        auxk = min(self.config.auxk, most)
        if not auxk:
            return _nothing(pre_act)
        # Every rank gives as many candidates; what it has too few of can't win.
        missing = max(0, auxk - len(dead))
        dead = torch.cat([dead, dead.new_zeros(missing)])
        candidates = pre_act[:, dead]
        candidates[:, len(dead) - missing :] = -torch.inf
        values, positions = topk(candidates, auxk)
        if tp.size > 1:
            positions, order = positions.sort(dim=1)
            values = won(tp, values.gather(1, order), self.config.auxk)
        return values, dead[positions]

    def _dense(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `_topk`."""
        model, config = self.autoencoder, self.config
        activation = model.activation
        pre_act = model.encode_pre_act(x)
        latents = model.activate_to_train(pre_act, self.mesh)
        self.dead.update_fired((latents.detach() > 0).any(dim=0), len(x) * self.mesh.dp.size, self.mesh.dp)
        recons = model.add_bypass(model.recombine(latents), x)
        loss = activation.reconstruction_loss(recons, target, config.mse_scale)
        for nested in model.nested.dense(model, latents):
            loss = loss + activation.reconstruction_loss(model.add_bypass(nested, x), target, config.mse_scale)
        if activation.revives:
            loss = loss + self._auxk(*self._revived(pre_act), recons, target)
        of_shard = config.sparsity_coef * activation.sparsity_loss(pre_act, latents, x, model.own)
        return loss, of_shard, recons, (latents.detach() != 0).sum(dtype=x.dtype)

    def _revived(self, pre_act: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices [B, c] of the dead latents that AuxK takes, of pre-activations [B, n]."""
        chosen, indices = self._select_dead(pre_act.detach())
        values = pre_act.gather(1, indices).relu()
        return torch.where(chosen.isneginf(), 0, values), indices

    def _move(self, lr: float) -> Tensor:
        """Move what this rank owns by the gradients of what it holds; returns their global norm."""
        if self.mesh.dp.size > 1:
            self.holdings.collect_gradients()
        grad_norm = self.optimiser.step(lr, self.mesh.everyone)
        if self.ema is not None:
            self.ema.update(self.holdings.owned)
        self.holdings.copy_owned()
        return grad_norm

    def _metrics(self, x: Tensor, recons: Tensor, loss: Tensor, active: Tensor) -> Metrics:
        tp, dp = self.mesh.tp, self.mesh.dp
        rows = len(x) * dp.size
        mean = dp.sum_(x.sum(dim=0)) / rows
        squared, spread, normalised, loss, active = dp.sum_all(
            (recons - x).square().sum(), (x - mean).square().sum(), normalized_mse(recons, x), loss, active
        )
        n_dead = tp.sum_(self.dead.mask(self.config.dead_after_tokens).sum(dtype=x.dtype))
        return {
            "loss": loss / dp.size,
            "normalized_mse": normalised / dp.size,
            "fvu": squared / spread,
            "l0": active / rows,
            "dead": n_dead / (len(self.dead.tokens_since) * tp.size),
        }

    @contextmanager
    def averaged(self) -> Iterator[Autoencoder]:
        """What this rank owns, with the weights' moving averages inside the block, where they are kept."""
        self.holdings.copy_statistics()
        with self.ema.swap(self.holdings.owned) if self.ema is not None else nullcontext():
            yield self.holdings.owned

    @contextmanager
    def averaged_shard(self) -> Iterator[Autoencoder]:
        """The same of all that it holds, to compute with; every rank must enter."""
        with self.averaged() as owned:
            if owned is self.autoencoder:
                yield owned
                return
            shard = self.holdings.empty(self.autoencoder.n_latents, self.mesh.tp)
            self.holdings.copy_owned(shard)
            yield shard

    def end(self) -> None:
        """Let go of what would keep the ranks of a mesh from parting; further steps are possible, but slower."""
        if self._sparse is not None:
            self._sparse.end()

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, in whatever layout it has.

        Live references: save or clone them before the next step.
        """
        return self._tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in; the next step continues bit by bit.

        Raises AutoencoderError when it is of another autoencoder or configuration.
        """
        if self._sparse is not None:
            self._sparse.settle()
        copy_tensors_(self._tensors(), state)
        self.holdings.spread()
        if self._sparse is not None:
            self._sparse.refresh(self._bound)

    def _tensors(self) -> dict[str, Tensor]:
        owned = self.holdings.owned
        self.holdings.copy_statistics()
        if self._sparse is not None:
            self._sparse.save_bound(self._bound)
        parts: dict[str, Mapping[str, Tensor]] = {
            "autoencoder": {**dict(owned.named_parameters()), **dict(owned.named_buffers())},
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "dead": {"bound": self._bound},
        }
        return {
            f"{part}.{name}": tensor.detach() for part, tensors in parts.items() for name, tensor in tensors.items()
        }


def _nothing(pre_act: Tensor) -> tuple[Tensor, Tensor]:
    """A selection of no latents."""
    empty = pre_act[:, :0]
    return empty, empty.to(torch.int64)
