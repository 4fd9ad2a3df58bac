"""BatchTopK: the k * B largest latents of a batch of B rows, so that a row has as many as it needs.

Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from sae.activations.base import Activation, Own
from sae.activations.simple import check_k
from sae.kth import kth_largest
from sae.mesh import Mesh

# Of the running mean of what a latent had to reach in a batch.
_DECAY: Final = 0.99


@dataclass(frozen=True)
class BatchTopK(Activation):
    """k active latents a row on average of a training batch; of equal values at the cut all are taken.

    To encode, where a row may not depend on others, all latents that reach a threshold: the running mean of the cut.
    """

    k: int
    name: ClassVar[str] = "BatchTopK"

    @property
    def state(self) -> dict[str, Any]:
        return {"k": self.k}

    def check(self, n_latents: int, n_shards: int) -> None:
        check_k(self.k, n_latents * n_shards)

    def tensors(self, n_latents: int) -> dict[str, Tensor]:
        """threshold: scalar, negative before the first step."""
        return {"threshold": torch.tensor(-1.0)}

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        assert own is not None
        return _reaching(pre_act, own["threshold"])

    def train(self, pre_act: Tensor, own: Own, mesh: Mesh) -> Tensor:
        cut = kth_largest(pre_act.detach(), self.k * len(pre_act) * mesh.dp.size, mesh.everyone)
        threshold = own["threshold"]
        threshold.copy_(torch.where(threshold < 0, cut, threshold.lerp(cut, 1 - _DECAY)))
        return _reaching(pre_act, cut)


def _reaching(pre_act: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((pre_act >= threshold) & (pre_act > 0), pre_act, 0)
