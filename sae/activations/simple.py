"""The activations of the published checkpoint format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sae.activations.base import Activation, Own
from sae.kernels.topk import topk
from sae.losses import normalized_l1, normalized_mse
from sae.schemas.errors import AutoencoderError


class _Dense(Activation):
    """Trained by normalised errors and an L1 penalty."""

    revives: ClassVar[bool] = False

    def reconstruction_loss(self, recons: Tensor, target: Tensor, scale: float) -> Tensor:
        return normalized_mse(recons, target)

    def sparsity_loss(self, pre_act: Tensor, latents: Tensor, x: Tensor, own: Own) -> Tensor:
        return normalized_l1(latents, x)


@dataclass(frozen=True)
class ReLU(_Dense):
    """max(x, 0)."""

    name: ClassVar[str] = "ReLU"

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        return torch.relu(pre_act)


@dataclass(frozen=True)
class Identity(_Dense):
    """x itself."""

    name: ClassVar[str] = "Identity"

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        return pre_act


@dataclass(frozen=True)
class TopK(Activation):
    """The k largest pre-activations of each row, through postact; zero elsewhere.

    Of equal values the smaller latent wins, so never more than k latents are active.
    """

    k: int
    postact: ReLU | Identity = field(default_factory=ReLU)
    name: ClassVar[str] = "TopK"

    @property
    def state(self) -> dict[str, Any]:
        return {"k": self.k, "postact_fn": self.postact.name}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        k, postact = state.get("k"), state.get("postact_fn", ReLU.name)
        known = {kind.name: kind for kind in (ReLU, Identity)}
        if not isinstance(k, int) or postact not in known:
            raise AutoencoderError(
                f"activation TopK has k {k!r} and postact {postact!r}: expected a whole number, and ReLU or Identity"
            )
        return cls(k, known[postact]())

    def check(self, n_latents: int, n_shards: int) -> None:
        check_k(self.k, n_latents * n_shards)

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        rows = pre_act.reshape(-1, pre_act.shape[-1])
        values, indices = topk(rows, self.k)
        return torch.zeros_like(rows).scatter(1, indices, self.postact(values)).view(pre_act.shape)


def check_k(k: int, n_latents: int) -> None:
    """Raises AutoencoderError unless k of n_latents can be active."""
    if not isinstance(k, int) or not 1 <= k <= n_latents:
        raise AutoencoderError(f"k is {k} and n_latents is {n_latents}: k must be between 1 and n_latents")
