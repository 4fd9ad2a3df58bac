"""EleutherAI's sparsify: cfg.json and sae.safetensors, in which latents are rows of both encoder and W_dec [n, d].

Source: what eai-sparsify 1.3 writes and reads, which the tests compare. It normalises nothing, and a transcoder's
output is as wide as its input.
"""

from collections.abc import Mapping
from typing import Any, Final

from sae.activations import GroupMax, ReLU, TopK
from sae.foreign.common import (
    About,
    Foreign,
    Format,
    Json,
    Tensors,
    assembled,
    checked,
    input_weights,
    is_on,
    refuse,
    shown,
    size,
)
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from sae.transcoder import Transcoder

_NAME: Final = "sparsify"


def read(config: Json, tensors: Mapping[str, Any]) -> Foreign:
    """Raises AutoencoderError where it is damaged, or does what our autoencoders don't."""
    d, k = size(config, "d_in"), size(config, "k")
    n = config.get("num_latents") or d * size(config, "expansion_factor")
    n = size({"num_latents": n}, "num_latents")
    transcodes, skips = is_on(config, "transcode"), is_on(config, "skip_connection")
    if skips and not transcodes:
        raise AutoencoderError("it has a skip_connection but is no transcoder, which no autoencoder of ours is")
    if is_on(config, "signed"):
        raise AutoencoderError("it is signed: its latents may be negative, which no autoencoder of ours has")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise AutoencoderError(f"its activation is {shown(activation)}: expected topk or groupmax")
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d)}
    shapes |= {"b_dec": (d,)} | ({"W_skip": (d, d)} if skips else {})
    theirs = checked(tensors, shapes)
    ours: Tensors = {
        "encoder.weight": theirs["encoder.weight"],
        "latent_bias": theirs["encoder.bias"],
        "decoder.weight": theirs["W_dec"].T,
        "post_bias" if transcodes else "pre_bias": theirs["b_dec"],
    }
    ours |= {"skip.weight": theirs["W_skip"]} if skips else {}
    return Foreign(assembled(ours, GroupMax(k) if activation == "groupmax" else TopK(k)))


def write(model: Autoencoder, _: About) -> tuple[Json, dict[str, Any]]:
    """Raises AutoencoderError where sparsify has no field for what it is. Matryoshka prefixes, which only training
    needs, are left out.
    """
    activation = model.activation
    of_relu = isinstance(activation, TopK) and isinstance(activation.postact, ReLU)
    if not (of_relu or isinstance(activation, GroupMax)):
        refuse(_NAME, f"activation {activation.name}", "use saelens, or train with topk or groupmax")
    if model.normalize:
        refuse(_NAME, "normalised inputs", "use saelens, or train with autoencoder.normalize: false")
    if model.d_out != model.d_model:
        refuse(_NAME, f"an output of {model.d_out} features beside an input of {model.d_model}", "use saelens")
    if isinstance(model, Transcoder):
        weight, bias = input_weights(model)
    else:
        weight, bias = model.encoder.weight.detach(), model.latent_bias.detach()
    # A file of safetensors holds no tensor twice.
    rows = model.decoder_rows.clone() if model.tied else model.decoder_rows
    tensors = {"encoder.weight": weight, "encoder.bias": bias, "W_dec": rows, "b_dec": model.output_bias}
    skip = model.skip if isinstance(model, Transcoder) else None
    tensors |= {} if skip is None else {"W_skip": skip.weight}
    config = {
        "activation": "topk" if of_relu else "groupmax",
        "expansion_factor": max(1, model.n_latents // model.d_model),
        "normalize_decoder": True,
        "num_latents": model.n_latents,
        "k": activation.state["k"],
        "multi_topk": False,
        "skip_connection": skip is not None,
        "transcode": isinstance(model, Transcoder),
        "d_in": model.d_model,
    }
    return config, {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


FORMAT: Final = Format(
    _NAME,
    "sae.safetensors",
    True,
    lambda config: "d_in" in config and ("expansion_factor" in config or "num_latents" in config),
    read,
    write,
)
