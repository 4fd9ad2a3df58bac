"""GroupMax: of each of k groups of latents the largest, which needs no selection over all of them.

Source: EleutherAI's sparsify, activation `groupmax`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.activations.base import Activation, Own
from sae.activations.simple import check_k
from sae.schemas.errors import AutoencoderError


@dataclass(frozen=True)
class GroupMax(Activation):
    """The largest pre-activation of each of k groups of neighbouring latents, where it is positive.

    Of equal values the smaller latent wins.
    """

    k: int
    name: ClassVar[str] = "GroupMax"

    @property
    def state(self) -> dict[str, Any]:
        return {"k": self.k}

    def check(self, n_latents: int, n_shards: int) -> None:
        check_k(self.k, n_latents * n_shards)
        if self.k % n_shards or n_latents * n_shards % self.k:
            raise AutoencoderError(
                f"k is {self.k}, with n_latents {n_latents * n_shards} on {n_shards} ranks: GroupMax needs groups of "
                "one size, each on one rank; choose a k that the ranks divide and that divides n_latents"
            )

    def on_shard(self, n_shards: int) -> "GroupMax":
        return replace(self, k=self.k // n_shards)

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        groups = pre_act.unflatten(-1, (self.k, -1))
        largest = groups.detach().argmax(dim=-1, keepdim=True)
        latents = torch.zeros_like(groups).scatter(-1, largest, groups.gather(-1, largest).relu())
        return latents.flatten(-2)
