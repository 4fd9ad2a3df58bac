"""The second half of a training step: gradients to weights, and what is kept beside the weights.

Shapes: B rows, d features, n latents, k selected latents per row.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.1 and appendix A.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.model import Autoencoder, check_tensors

BETAS = (0.9, 0.999)
EPS = 6.25e-10


def learning_rate(
    tokens_seen: int,
    batch_tokens: int,
    *,
    total_tokens: int,
    peak: float,
    warmup_tokens: int = 0,
    decay_fraction: float = 0.0,
) -> float:
    """Learning rate of the step that trains on tokens_seen..tokens_seen + batch_tokens.

    Linear warm-up over warmup_tokens, constant, then linear decay over the last decay_fraction of
    total_tokens. Never zero before total_tokens, so no batch is wasted.
    """
    warm = min(1.0, (tokens_seen + batch_tokens) / warmup_tokens) if warmup_tokens > 0 else 1.0
    decay_tokens = decay_fraction * total_tokens
    left = max(0, total_tokens - tokens_seen)
    return peak * min(warm, left / decay_tokens if decay_tokens > 0 else 1.0, 1.0)


@torch.no_grad()
def normalise_rows_(rows: Tensor) -> None:
    """Scale each row of [n, d] to unit norm in place; a zero row stays zero."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny))


class Optimiser:
    """Adam on an autoencoder whose decoder rows stay unit vectors.

    Order: project, clip by the global norm where `clip` is given, Adam, renormalise.
    """

    def __init__(self, autoencoder: Autoencoder, clip: float | None = None) -> None:
        self.autoencoder = autoencoder
        self.clip = clip
        self._parameters = dict(autoencoder.named_parameters())
        self._adam = torch.optim.Adam(self._parameters.values(), betas=BETAS, eps=EPS, fused=False)
        for parameter in self._parameters.values():
            # Made at once, so that a state saved before the first step has all its tensors.
            self._adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Apply the gradients with learning rate lr and clear them.

        Returns the global gradient norm (scalar tensor) after projection and before clipping.
        """
        self._project()
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        if self.clip is not None:
            factor = self.clip / norm.clamp(min=self.clip)
            for gradient in gradients:
                gradient.mul_(factor)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        normalise_rows_(self.autoencoder.decoder_rows)
        return norm

    def _project(self) -> None:
        """Remove what would only change the length of a decoder row, which is fixed to one."""
        rows, gradient = self.autoencoder.decoder_rows, self.autoencoder.decoder_rows_grad
        if gradient is not None:
            gradient.addcmul_(rows, (rows * gradient).sum(dim=1, keepdim=True), value=-1)

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's tensors by `<kind>.<parameter>`; live references, as with torch's own optimisers."""
        return {
            f"{kind}.{name}": tensor.detach()
            for name, parameter in self._parameters.items()
            for kind, tensor in self._adam.state[parameter].items()
        }

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
    def update(self, indices: Tensor, values: Tensor, n_rows: int) -> None:
        """Count a training batch of n_rows tokens with these sparse latents (indices, values [B, k])."""
        n = len(self.tokens_since)
        fired = torch.zeros(n + 1, dtype=torch.bool, device=indices.device)
        fired[torch.where(values > 0, indices, n).flatten()] = True
        self.update_fired(fired[:n], n_rows)

    @torch.no_grad()
    def update_fired(self, fired: Tensor, n_rows: int) -> None:
        """Count a training batch of n_rows tokens in which the latents of mask [n] fired."""
        self.tokens_since.add_(n_rows).masked_fill_(fired, 0)

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
