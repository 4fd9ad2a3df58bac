"""The format of the published autoencoders: the state dict of the reference's model, in a file of torch.

Its reader takes the activation's name and state from it, ReLU where there is none, and normalises with TopK alone.
"""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from sae.activations import Identity, ReLU, TopK
from sae.foreign.common import About, Foreign, Format, Json, real, refuse
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from sae.transcoder import Transcoder

_NAME: Final = "openai-weights"
_TIED: Final = "decoder.linear.weight"
_STATISTICS: Final = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_REAL: Final = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight", _TIED, *_STATISTICS[1:])
_REST: Final = (_STATISTICS[0], "activation", "activation_state_dict", "tied", "normalize")


def read(_: Json, state: Mapping[str, Any]) -> Foreign:
    """Raises AutoencoderError where it is not the state dict of one, or one that selects nothing."""
    unknown = sorted(map(str, state.keys() - {*_REAL, *_REST}))
    if unknown:
        raise AutoencoderError(f"state dict has unknown keys {', '.join(unknown)[:200]}: it is of another kind")
    # Names and types first: what follows makes an autoencoder of the size of encoder.weight.
    tensors = {name: real(name, state[name]) for name in _REAL if isinstance(state.get(name), Tensor)}
    if not isinstance(state.get("activation_state_dict", {}), dict):
        raise AutoencoderError("state dict has an activation_state_dict that is none")
    autoencoder = Autoencoder.from_state_dict({**state, **tensors})
    if isinstance(autoencoder.activation, Identity):
        raise AutoencoderError("its activation is Identity: latents that are never zero make no sparse table")
    return Foreign(autoencoder.eval().requires_grad_(False))


def write(model: Autoencoder, _: About) -> tuple[Json, dict[str, Any]]:
    """Raises AutoencoderError where the reference's reader would make another autoencoder of it."""
    if isinstance(model, Transcoder):
        refuse(_NAME, "transcoders", "use saelens or sparsify")
    if not isinstance(model.activation, ReLU | TopK):
        refuse(_NAME, f"activation {model.activation.name}", "use saelens or sparsify")
    if model.normalize != isinstance(model.activation, TopK):
        state = "normalises its input" if model.normalize else "does not normalise its input"
        refuse(_NAME, f"one with {model.activation.name} that {state}", "use saelens")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.tensors().items()}
    # A tied one does not load in the reference's own code.
    tensors["decoder.weight"] = model.decoder_rows.detach().T.contiguous()
    return {}, {**tensors, "activation": model.activation.name, "activation_state_dict": model.activation.state}


FORMAT: Final = Format(_NAME, "autoencoder.pt", False, lambda config: False, read, write)
