"""The second half of a training step: gradients to weights, and what is kept beside the weights.

Shapes: B rows, d features, n latents, k selected latents per row.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.1 and appendix A.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.collectives import Group
from sae.devices import send
from sae.kernels.update import BETAS, Hyper, Parameter, adam_, normalise_rows_, project_
from sae.model import Autoencoder, check_tensors
from sae.sharded import latent_axis

__all__ = ["EMA", "DeadLatents", "Optimiser", "copy_tensors_", "normalise_rows_"]


class Optimiser:
    """Adam on an autoencoder whose decoder rows stay unit vectors.

    Order: project, clip by the global norm where `clip` is given, Adam, renormalise.
    """

    def __init__(self, autoencoder: Autoencoder, clip: float | None = None) -> None:
        self.autoencoder = autoencoder
        self.clip = clip
        self._steps = torch.zeros((), dtype=torch.int64)
        self._parameters = dict(autoencoder.named_parameters())
        # Made at once, so that a state saved before the first step has all its tensors.
        self._moments = {
            name: (torch.zeros_like(p, requires_grad=False), torch.zeros_like(p, requires_grad=False))
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: float, everyone: Group | None = None) -> Tensor:
        """Apply the gradients that autograd left, with learning rate lr, and clear them.

        Returns the global gradient norm (scalar tensor) after projection and before clipping: of all ranks, where
        the autoencoder is what one of `everyone` owns.
        """
        rows, gradient = self.autoencoder.decoder_rows, self.autoencoder.decoder_rows_grad
        if gradient is not None:
            project_(gradient, rows)
        given = {name: p for name, p in self._parameters.items() if p.grad is not None}
        norms = {name: torch.linalg.vector_norm(p.grad) for name, p in given.items()}
        if everyone is not None and everyone.size > 1:
            of_latents = [norms.pop(name) for name in given if latent_axis(name) is not None]
            norms["latents"] = everyone.sum_(torch.stack(of_latents).square().sum()).sqrt()
        norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        hyper = self.clipped(Hyper(self.advance(lr)), norm)
        for name, parameter in given.items():
            assert parameter.grad is not None
            adam_(self.parameter(name), parameter.grad, hyper)
            parameter.grad = None
        normalise_rows_(rows)
        return norm

    def parameter(self, name: str, average: Tensor | None = None, shadow: Tensor | None = None) -> Parameter:
        """A parameter with its moments; live references."""
        return Parameter(self._parameters[name].detach(), *self._moments[name], average, shadow)

    def advance(self, lr: float) -> Tensor:
        """Count one more step, and say what Adam needs to know of it: `Hyper.scalars`. The host does not wait."""
        self._steps += 1
        steps, like = int(self._steps), self.autoencoder.pre_bias
        known = [lr / (1 - BETAS[0] ** steps), (1 - BETAS[1] ** steps) ** -0.5, 1.0]
        return send(torch.tensor(known, dtype=like.dtype), like.device)

    def clipped(self, hyper: Hyper, norm: Tensor) -> Hyper:
        """The same step for gradients of a global norm, with the factor that clips them."""
        if self.clip is None:
            return hyper
        factor = (self.clip / norm.clamp(min=self.clip)).to(hyper.scalars.dtype)
        return hyper._replace(scalars=torch.cat([hyper.scalars[:2], factor.view(1)]))

    def state_dict(self) -> dict[str, Tensor]:
        """The number of steps, and both moments by parameter name; live references."""
        kinds = ("exp_avg", "exp_avg_sq")
        moments = {
            f"{kind}.{name}": moment
            for name, both in self._moments.items()
            for kind, moment in zip(kinds, both, strict=True)
        }
        return {"steps": self._steps, **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state of the same autoencoder into this one."""
        copy_tensors_(self.state_dict(), state)


class EMA:
    """Exponential moving average of parameters, corrected for its start at zero."""

    def __init__(self, autoencoder: Autoencoder, decay: float) -> None:
        self.decay = decay
        self._steps = torch.zeros((), dtype=torch.int64)
        self._averages = {name: torch.zeros_like(p, requires_grad=False) for name, p in autoencoder.named_parameters()}

    @torch.no_grad()
    def update(self, autoencoder: Autoencoder) -> None:
        """Count the present weights in; call it after the optimiser's step."""
        for name, parameter in autoencoder.named_parameters():
            self._averages[name].lerp_(parameter, 1 - self.decay)
        self.count()

    def average(self, name: str) -> Tensor:
        """The running average of a parameter; a live reference, for whoever moves it and then calls `count`."""
        return self._averages[name]

    def count(self) -> None:
        """Say that the averages have been moved once."""
        self._steps += 1

    @contextmanager
    def swap(self, autoencoder: Autoencoder) -> Iterator[None]:
        """Let the autoencoder hold the averages, with unit decoder rows, inside the block.

        The trained weights come back in any case. Before the first update nothing is swapped.
        """
        if not int(self._steps):
            yield
            return
        correction = 1 - self.decay ** int(self._steps)
        trained = {name: p.data for name, p in autoencoder.named_parameters()}
        try:
            for name, parameter in autoencoder.named_parameters():
                parameter.data = self._averages[name] / correction
            normalise_rows_(autoencoder.decoder_rows)
            yield
        finally:
            for name, parameter in autoencoder.named_parameters():
                parameter.data = trained[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name, and the number of updates; live references."""
        return {"steps": self._steps, **self._averages}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state of the same autoencoder into this one."""
        copy_tensors_(self.state_dict(), state)


class DeadLatents:
    """Tokens since each latent last fired; it fires where its value is positive.

    tokens_since is counted up in place, so that it can be the autoencoder's own buffer.
    """

    def __init__(self, tokens_since: Tensor) -> None:
        self.tokens_since = tokens_since

    @torch.no_grad()
    def update(self, indices: Tensor, values: Tensor, n_rows: int, dp: Group | None = None) -> None:
        """Count a training batch of n_rows tokens with these sparse latents (indices, values [B, k]).

        With `dp` the batch is that of all its ranks, of which each gives the latents of some rows.
        """
        n = len(self.tokens_since)
        fired = torch.zeros(n + 1, dtype=torch.uint8, device=indices.device)
        fired.scatter_(0, torch.where(values > 0, indices, n).flatten().long(), 1)
        self.update_fired(fired[:n], n_rows, dp)

    @torch.no_grad()
    def update_fired(self, fired: Tensor, n_rows: int, dp: Group | None = None) -> None:
        """The same for a mask [n] of the latents that fired."""
        if dp is not None:
            fired = dp.max_(fired.to(torch.uint8))
        self.tokens_since.add_(n_rows).masked_fill_(fired.bool(), 0)

    def mask(self, threshold_tokens: int) -> Tensor:
        """Latents [n] that have not fired for more than threshold_tokens tokens."""
        return self.tokens_since > threshold_tokens


@torch.no_grad()
def copy_tensors_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors in place by name; layouts may differ.

    Raises AutoencoderError when names or shapes disagree.
    """
    check_tensors(source, {name: tensor.shape for name, tensor in target.items()})
    for name, tensor in target.items():
        tensor.copy_(source[name])
