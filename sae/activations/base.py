"""What every activation is: a function of pre-activations, and what it needs of the model and of training.

Shapes: B rows, n latents that this rank holds.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

from torch import Tensor

from sae.losses import mse
from sae.mesh import Mesh
from sae.schemas.errors import AutoencoderError

Own = Mapping[str, Tensor]
"""The tensors of `Activation.tensors`, as the model has them."""


class Activation:
    """Hyperparameters alone; what is learned or counted is the model's.

    `name` and `state` are what checkpoints store of it.
    """

    name: ClassVar[str]
    revives: ClassVar[bool] = True
    """Whether dead latents are trained to reconstruct the residual (AuxK)."""

    @property
    def state(self) -> dict[str, Any]:
        """What `from_state` builds it from."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Raises AutoencoderError where the state is not one of this activation."""
        given = {field.name: state.get(field.name) for field in fields(cls)}  # type: ignore[arg-type]
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise AutoencoderError(f"activation {cls.name} has {name} {value!r}: expected a number")
        return cls(**given)

    def check(self, n_latents: int, n_shards: int) -> None:
        """Raises AutoencoderError where it can't be that of n_latents on each of n_shards ranks."""

    def on_shard(self, n_shards: int) -> Self:
        """The activation of one of n_shards ranks, each of which holds as many latents."""
        return self

    def tensors(self, n_latents: int) -> dict[str, Tensor]:
        """What the model keeps for it by name: parameters are learned, other tensors are kept beside them."""
        return {}

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        """Latents [..., n] of pre-activations [..., n], as they are encoded."""
        raise NotImplementedError

    def train(self, pre_act: Tensor, own: Own, mesh: Mesh) -> Tensor:
        """Latents [B, n] in a training step, where they may depend on the batch, which is that of the whole `mesh`."""
        return self(pre_act, own)

    def reconstruction_loss(self, recons: Tensor, target: Tensor, scale: float) -> Tensor:
        """Of recons [B, d] beside the target [B, d]."""
        return mse(recons, target) * scale

    def sparsity_loss(self, pre_act: Tensor, latents: Tensor, x: Tensor, own: Own) -> Tensor:
        """What this rank's latents [B, n] of x [B, d] add to the loss, times training's coefficient."""
        return latents.new_zeros(())
