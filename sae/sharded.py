"""The autoencoder over a mesh of ranks: which latents a rank computes with, and which of them it moves and saves.

A rank *holds* 1/tp of the latents. The dp ranks that hold the same ones share the work of moving them: each *owns* a
part, whose master weights and optimiser state only it has, and gives the others the new weights after each step.
Source: Rajbhandari et al. 2020, "ZeRO", section 5 (the second stage).
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from sae.collectives import Group, Wait
from sae.mesh import Mesh
from sae.model import Autoencoder

# The axis of the latents, for tensors that have one; pre_bias and counts have none.
_AXES: Final = {"encoder.weight": 0, "latent_bias": 0, "decoder.weight": 1, "log_threshold": 0}
_STATISTICS: Final = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def latent_axis(name: str) -> int | None:
    """The axis of the latents in a tensor of a checkpoint, by its name, which may have a prefix; None without one."""
    for ending, axis in (*_AXES.items(), *((name, 0) for name in _STATISTICS)):
        if name == ending or name.endswith(f".{ending}"):
            return axis
    return None


def part_of(tensors: Mapping[str, Tensor], latents: list[range]) -> dict[str, Tensor]:
    """Of whole tensors those of some latents, one range after another."""
    return {name: _part(tensor, latent_axis(name), latents) for name, tensor in tensors.items()}


def _part(tensor: Tensor, axis: int | None, latents: list[range]) -> Tensor:
    if axis is None:
        return tensor
    return torch.cat([tensor.narrow(axis, part.start, len(part)) for part in latents], dim=axis)


class Holdings:
    """The latents that a rank holds, as an autoencoder, and those that it owns: the same one where dp is 1.

    Owned ones are to be moved and saved, not to compute with: no two ranks of dp see the same rows.
    """

    def __init__(self, held: Autoencoder, mesh: Mesh) -> None:
        self.held, self.mesh = held, mesh
        first = mesh.held(held.n_latents * mesh.tp.size).start
        buckets = mesh.buckets(held.n_latents * mesh.tp.size)
        self.buckets = [slice(bucket.start - first, bucket.stop - first) for bucket in buckets]
        self.owned = held if mesh.dp.size == 1 else self._taken()

    @property
    def shares(self) -> list[slice]:
        """Of each bucket of the held latents, the part that this rank owns."""
        shares = []
        for bucket in self.buckets:
            share = self.mesh.dp.share(bucket.stop - bucket.start)
            shares.append(slice(bucket.start + share.start, bucket.start + share.stop))
        return shares

    @property
    def _sizes(self) -> list[int]:
        return [share.stop - share.start for share in self.shares]

    @torch.no_grad()
    def copy_owned(self, target: Autoencoder | None = None) -> None:
        """Give the held autoencoder, or `target` of its shape, the parameters that the ranks of dp own."""
        if target is None:
            target = self.held
        else:
            _copy(_counted(self.owned), _counted(target))
        if target is not self.owned:
            _copy(_shared(self.owned), _shared(target))
            self._spread({name: rows for name, rows in _rows(target).items() if name not in _STATISTICS})

    def spread(self) -> None:
        """Give the held autoencoder all that the ranks of dp own, statistics too."""
        self.copy_owned()
        if self.held is not self.owned:
            _copy(_counted(self.owned), _counted(self.held))
            self._spread({name: rows for name, rows in _rows(self.held).items() if name in _STATISTICS})

    def _spread(self, held: dict[str, Tensor]) -> None:
        owned = _rows(self.owned)
        for name, rows in held.items():
            for share, part in zip(self.shares, owned[name].split(self._sizes), strict=True):
                rows[share] = part
            for wait in [self.begin_gather(rows, bucket) for bucket in self.buckets]:
                wait()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of what is held to what is owned, summed over dp."""
        dp, tp = self.mesh.dp, self.mesh.tp
        parameters = dict(self.owned.named_parameters())
        for name, parameter in self.held.named_parameters():
            axis, grad = latent_axis(name), parameter.grad
            if axis is None and grad is not None:
                # A sum over all ranks, of which those of tp have the same: every rank gets the same bits.
                parameters[name].grad = self.mesh.everyone.sum_(grad / tp.size)
            elif axis is not None and grad is not None:
                rows = grad if axis == 0 else grad.T
                begun = [dp.begin_sum_to_shares(rows[bucket].contiguous()) for bucket in self.buckets]
                summed = torch.cat([_waited(*one) for one in begun])
                parameters[name].grad = summed if axis == 0 else summed.T
            parameter.grad = None

    def begin_gather(self, rows: Tensor, bucket: slice) -> Wait:
        """Fill a bucket of rows [held, ...], of which each rank of dp has written what it owns."""
        return self.mesh.dp.begin_gather_(rows[bucket])

    @torch.no_grad()
    def copy_statistics(self) -> None:
        """Give the owned autoencoder the statistics of what it owns, which are kept for all that is held."""
        if self.owned is not self.held:
            _copy(_counted(self.held), _counted(self.owned))
            for name in _STATISTICS:
                counts = getattr(self.held, name)
                getattr(self.owned, name).copy_(torch.cat([counts[share] for share in self.shares]))

    def empty(self, n_latents: int, together: Group) -> Autoencoder:
        """An autoencoder like the held one, of as many latents on each of the ranks that have all `together`."""
        held = self.held
        like = held.pre_bias
        with torch.device("meta"):
            made = held.like(n_latents, together)
        return made.to_empty(device=like.device).to(like.dtype)

    def _taken(self) -> Autoencoder:
        owned = self.empty(sum(self._sizes), self.mesh.everyone)
        with torch.no_grad():
            _copy(_shared(self.held) | _counted(self.held), _shared(owned) | _counted(owned))
            theirs = _rows(self.held)
            for name, rows in _rows(owned).items():
                rows.copy_(torch.cat([theirs[name][share] for share in self.shares]))
        return owned


def _waited(tensor: Tensor, wait: Wait) -> Tensor:
    wait()
    return tensor


def _shared(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Parameters that every rank has whole; live references."""
    return {name: p.detach() for name, p in autoencoder.named_parameters() if latent_axis(name) is None}


def _counted(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """What every rank has whole and keeps beside its parameters; live references."""
    return {name: buffer for name, buffer in autoencoder.named_buffers() if latent_axis(name) is None}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _rows(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Every parameter and statistic that has a row for each latent, as [n, ...]; live references."""
    named = {**dict(autoencoder.named_parameters()), **dict(autoencoder.named_buffers())}
    return {
        name: tensor.detach() if axis == 0 else tensor.detach().T
        for name, tensor in named.items()
        if (axis := latent_axis(name)) is not None
    }
