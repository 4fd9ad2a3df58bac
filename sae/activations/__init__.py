"""Activations of the autoencoder, one a file."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae.activations.base import Activation, Own
from sae.activations.batch_topk import BatchTopK
from sae.activations.group_max import GroupMax
from sae.activations.jump_relu import JumpReLU
from sae.activations.simple import Identity, ReLU, TopK
from sae.schemas.errors import AutoencoderError

__all__ = ["Activation", "BatchTopK", "GroupMax", "Identity", "JumpReLU", "Own", "ReLU", "TopK", "made"]

_SIMPLE = {"ReLU": ReLU(), "Identity": Identity()}
_NAMED = (TopK, BatchTopK, GroupMax, JumpReLU)


def made(name: object, state: Mapping[str, Any]) -> Activation:
    """The activation that a state dict or config names, with its `Activation.state`.

    Raises AutoencoderError when the name or the state is not one that exists.
    """
    if name in _SIMPLE:
        return _SIMPLE[name]
    kind = next((kind for kind in _NAMED if kind.name == name), None)
    if kind is None:
        raise AutoencoderError(
            f"activation is {name!r}: expected {', '.join(_SIMPLE)}, {', '.join(kind.name for kind in _NAMED)}"
        )
    plain = {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for key, value in state.items()
    }
    return kind.from_state(plain)
