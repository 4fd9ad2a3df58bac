"""JumpReLU: a latent is active where it reaches a threshold of its own, which is learned, and then loses nothing.

Source: Rajamanoharan et al. 2024, "Jumping ahead", sections 3 and 4 and appendix J.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae.activations.base import Activation, Own
from sae.schemas.errors import AutoencoderError


@dataclass(frozen=True)
class JumpReLU(Activation):
    """x where it is above the threshold, else 0; trained with an L0 penalty.

    bandwidth: around a threshold, of the pre-activations that tell in which direction it should move.
    initial: every threshold in the beginning.
    """

    bandwidth: float = 0.1
    initial: float = 0.1
    name: ClassVar[str] = "JumpReLU"
    revives: ClassVar[bool] = False

    @property
    def state(self) -> dict[str, Any]:
        return {"bandwidth": self.bandwidth, "initial": self.initial}

    def check(self, n_latents: int, n_shards: int) -> None:
        if not (self.bandwidth > 0 and self.initial > 0):
            raise AutoencoderError(
                f"bandwidth is {self.bandwidth} and the initial threshold {self.initial}: both must be positive"
            )

    def tensors(self, n_latents: int) -> dict[str, Tensor]:
        """log_threshold: [n], learned."""
        return {"log_threshold": nn.Parameter(torch.full((n_latents,), self.initial).log())}

    def __call__(self, pre_act: Tensor, own: Own | None = None) -> Tensor:
        assert own is not None
        jumped = _Jump.apply(pre_act.relu(), own["log_threshold"].exp(), self.bandwidth)  # type: ignore[no-untyped-call]
        return cast(Tensor, jumped)

    def sparsity_loss(self, pre_act: Tensor, latents: Tensor, x: Tensor, own: Own) -> Tensor:
        """Mean number of active latents a row."""
        steps = _Step.apply(pre_act.relu(), own["log_threshold"].exp(), self.bandwidth)  # type: ignore[no-untyped-call]
        return cast(Tensor, steps).sum() / len(pre_act)


def _near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel of (z - threshold) / bandwidth, [B, n]."""
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


class _Jump(torch.autograd.Function):
    """z where it is above the threshold, with a pseudo-derivative for the threshold (equation 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        of_threshold = -(threshold / ctx.bandwidth) * (_near(z, threshold, ctx.bandwidth) * grad).flatten(0, -2).sum(0)
        return torch.where(z > threshold, grad, 0), of_threshold, None


class _Step(torch.autograd.Function):
    """1 where z is above the threshold, else 0, with a pseudo-derivative for the threshold (equation 12)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = _near(z, threshold, ctx.bandwidth) * grad
        return None, -near.flatten(0, -2).sum(0) / ctx.bandwidth, None
