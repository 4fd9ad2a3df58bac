"""Activations of the autoencoder: stateless functions of pre-activations [..., n].

`name` and `state` are what the published checkpoint format stores of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.kernels.topk import topk
from sae.schemas.errors import AutoencoderError


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""

    name: ClassVar[str] = "ReLU"

    @property
    def state(self) -> dict[str, Any]:
        return {}

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@dataclass(frozen=True)
class Identity:
    """x itself."""

    name: ClassVar[str] = "Identity"

    @property
    def state(self) -> dict[str, Any]:
        return {}

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each row, through postact; zero elsewhere.

    Of equal values the smaller latent wins, so never more than k latents are active.
    """

    k: int
    postact: ReLU | Identity = field(default_factory=ReLU)
    name: ClassVar[str] = "TopK"

    @property
    def state(self) -> dict[str, Any]:
        return {"k": self.k, "postact_fn": self.postact.name}

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, indices = topk(rows, self.k)
        return torch.zeros_like(rows).scatter(1, indices, self.postact(values)).view(x.shape)


Activation = ReLU | Identity | TopK


def activation_from_state(name: object, state: Mapping[str, Any]) -> Activation:
    """Build the activation that a state dict or config names.

    Raises AutoencoderError when the name or the state of TopK is not one that exists.
    """
    simple: dict[object, ReLU | Identity] = {"ReLU": ReLU(), "Identity": Identity()}
    if name in simple:
        return simple[name]
    if name != TopK.name:
        raise AutoencoderError(f"activation is {name!r}: expected ReLU, Identity or TopK")
    k, postact = state.get("k"), state.get("postact_fn", "ReLU")
    if isinstance(k, Tensor) and k.numel() == 1:
        k = int(k)
    if not isinstance(k, int) or postact not in simple:
        raise AutoencoderError(
            f"activation TopK has k {k!r} and postact {postact!r}: expected a whole number, and ReLU or Identity"
        )
    return TopK(k, simple[postact])
