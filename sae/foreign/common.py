"""What the formats share.

Shapes: d = d_model features that go in, o features that come out (d but for transcoders), n latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from sae.activations import Activation
from sae.matryoshka import Nested
from sae.model import Autoencoder, check_tensors
from sae.schemas.errors import AutoencoderError
from sae.transcoder import Transcoder

Tensors = dict[str, Tensor]
Json = dict[str, Any]

_LARGEST = 1 << 40  # of a size in a config; more cannot be multiplied without overflow


@dataclass(frozen=True)
class About:
    """Where an autoencoder's activations are, as far as it is known: names that its own program gives them."""

    model: str | None = None
    hook: str | None = None
    output_hook: str | None = None


@dataclass(frozen=True)
class Foreign:
    """An autoencoder that was read."""

    autoencoder: Autoencoder
    about: About = About()


@dataclass(frozen=True)
class Format:
    """How it is stored: `weights` is the name of the file with the tensors.

    `has_config` tells whether cfg.json lies beside them, and `claims` whether one is of this format.
    """

    name: str
    weights: str
    has_config: bool
    claims: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Json, dict[str, Any]], Foreign]
    write: Callable[[Autoencoder, About], tuple[Json, dict[str, Any]]]


def size(config: Mapping[str, Any], key: str) -> int:
    """A size that a config must have; raises AutoencoderError where it is none."""
    found = config.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found < _LARGEST:
        raise AutoencoderError(f"{key} is {shown(found)}: expected a whole number of at least 1")
    return found


def shown(value: object) -> str:
    """A value of a file in a few words."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def is_on(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A flag of a config; raises AutoencoderError where it is neither true nor false."""
    found = config.get(key, default)
    if not isinstance(found, bool):
        raise AutoencoderError(f"{key} is {shown(found)}: expected true or false")
    return found


def text(config: Mapping[str, Any], key: str) -> str | None:
    """What a config says in words, if it does."""
    found = config.get(key)
    return found if isinstance(found, str) and found else None


def checked(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The tensors in float32; raises AutoencoderError unless they are these, real, and finite."""
    check_tensors(tensors, {name: torch.Size(shape) for name, shape in shapes.items()})
    return {name: real(name, tensor) for name, tensor in tensors.items()}


def real(name: str, tensor: Tensor) -> Tensor:
    """A tensor in float32; raises AutoencoderError where it holds no real numbers, or NaN or infinite ones."""
    if not tensor.is_floating_point():
        raise AutoencoderError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}: expected real numbers")
    tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise AutoencoderError(f"{name} has NaN or infinite entries: the file is damaged, or the training diverged")
    return tensor


def assembled(
    tensors: Tensors,
    activation: Activation,
    *,
    normalize: bool = False,
    nested: Nested | None = None,
) -> Autoencoder:
    """The autoencoder, or with post_bias the transcoder, that has these tensors under our names; they are not copied.

    pre_bias may be missing where it is zero.
    """
    n, d = tensors["encoder.weight"].shape
    given = {
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
        "pre_bias": torch.zeros(d),
        **tensors,
    }
    with torch.device("meta"):
        made = (
            Transcoder(n, d, len(tensors["post_bias"]), activation, "skip.weight" in tensors, normalize)
            if "post_bias" in tensors
            else Autoencoder(n, d, activation, False, normalize, None, nested)
        )
    made.load_state_dict(given, assign=True)
    return made.eval().requires_grad_(False)


def moved(bias: Tensor, weight: Tensor, by: Tensor) -> Tensor:
    """The bias [n] with which weight [n, d] gives of x what it gave of x + by [d]: in float64, then float32 again."""
    return (bias.double() + weight.double() @ by.double()).float() if bool(by.any()) else bias


def input_weights(model: Autoencoder) -> tuple[Tensor, Tensor]:
    """Encoder [n, d] and latent bias [n] of a transcoder that subtracts nothing before it."""
    weight = model.encoder.weight.detach()
    return weight, moved(model.latent_bias.detach(), weight, -model.pre_bias.detach())


def refuse(format_: str, what: str, instead: str) -> NoReturn:
    """Raises AutoencoderError: the format has no field for what an autoencoder is."""
    raise AutoencoderError(f"format {format_} has no place for {what}; {instead}")
