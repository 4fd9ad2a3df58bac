"""SAELens: cfg.json and sae_weights.safetensors, in which latents are columns of W_enc [d, n] and rows of W_dec [n, o].

Source: what sae-lens 6.54 writes and reads, which the tests compare.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from sae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
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
    moved,
    refuse,
    shown,
    size,
    text,
)
from sae.matryoshka import Nested
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from sae.transcoder import Transcoder

_NAME: Final = "saelens"
_OF_BATCH: Final = ("batchtopk", "matryoshka_batchtopk")
_JUMPS: Final = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRANSCODERS: Final = ("transcoder", "skip_transcoder", *_JUMPS[1:])
_SKIPS: Final = ("skip_transcoder", "jumprelu_skip_transcoder")
_KNOWN: Final = ("standard", "topk", "jumprelu", *_OF_BATCH, *_TRANSCODERS)
# What SAELens applies beside the architecture, each with the values that change nothing.
_PLAIN: Final = {
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "finetuning_scaling_factor": (False, None),
    "use_error_term": (False, None),
}


def read(config: Json, tensors: Mapping[str, Any]) -> Foreign:
    """Raises AutoencoderError where it is damaged, or does what our autoencoders don't."""
    architecture = _architecture(config)
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else config  # where versions before 6 have it
    for key, allowed in _PLAIN.items():
        for of in (config, metadata):
            if of.get(key) not in allowed:
                raise AutoencoderError(f"its {key} is {shown(of[key])}: no autoencoder of ours does that")
    n, d = size(config, "d_sae"), size(config, "d_in")
    transcodes = architecture in _TRANSCODERS
    d_out = size(config, "d_out") if transcodes else d
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "W_dec": (n, d_out), "b_enc": (n,), "b_dec": (d_out,)}
    threshold = "log_threshold" if "log_threshold" in tensors else "threshold"
    shapes |= {threshold: (n,)} if architecture in _JUMPS else {}
    shapes |= {"topk_threshold": ()} if architecture in _OF_BATCH else {}
    shapes |= {"W_skip": (d_out, d)} if architecture in _SKIPS else {}
    ours = checked(tensors, shapes)
    _fold_norms(ours, config, architecture)
    normalize = _normalizes(config, skips=architecture in _SKIPS)
    made: Tensors = {"encoder.weight": ours["W_enc"].T, "decoder.weight": ours["W_dec"].T, "latent_bias": ours["b_enc"]}
    if transcodes:
        if is_on(config, "apply_b_dec_to_input"):
            raise AutoencoderError("apply_b_dec_to_input is true: a transcoder's b_dec is of what comes out")
        made |= {"post_bias": ours["b_dec"]}
        made |= {"skip.weight": ours["W_skip"]} if "W_skip" in ours else {}
    else:
        made["pre_bias"] = ours["b_dec"]
        if not is_on(config, "apply_b_dec_to_input", True):
            made["latent_bias"] = moved(ours["b_enc"], made["encoder.weight"], ours["b_dec"])
    made |= _thresholds(ours)
    autoencoder = assembled(made, _activation(config, architecture), normalize=normalize, nested=_nested(config, n))
    about = About(text(metadata, "model_name"), text(metadata, "hook_name"), text(metadata, "hook_name_out"))
    return Foreign(autoencoder, about)


def _architecture(config: Json) -> str:
    found = config.get("architecture", "standard")
    # Versions before 6 had the activation of standard ones beside it.
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if found not in _KNOWN or activation not in ("relu", "topk") or (activation == "topk" and found != "standard"):
        what = found if found not in _KNOWN else f"{found} with {activation}"
        raise AutoencoderError(
            f"its architecture is {shown(what)}, which no autoencoder of ours is; these can be imported: "
            f"{', '.join(_KNOWN)}"
        )
    return "topk" if activation == "topk" else str(found)


def _normalizes(config: Json, *, skips: bool) -> bool:
    found = config.get("normalize_activations", "none")
    if found in ("none", None, False):
        return False
    if found != "layer_norm" or skips:
        where = " with a skip connection" if skips else ""
        raise AutoencoderError(
            f"its normalize_activations is {shown(found)}{where}, which no autoencoder of ours does; fold it into the "
            "weights with SAELens, then import what it saves"
        )
    return True


def _fold_norms(ours: Tensors, config: Json, architecture: str) -> None:
    """Makes the decoder's rows of unit norm where it is used as if they were."""
    if architecture not in ("topk", *_OF_BATCH) or not is_on(config, "rescale_acts_by_decoder_norm"):
        return
    norms = torch.linalg.vector_norm(ours["W_dec"], dim=1).clamp(min=1e-8)
    ours |= {"W_dec": ours["W_dec"] / norms[:, None], "W_enc": ours["W_enc"] * norms, "b_enc": ours["b_enc"] * norms}


def _activation(config: Json, architecture: str) -> Activation:
    if architecture == "topk":
        arguments = config.get("activation_fn_kwargs")
        return TopK(size(arguments if isinstance(arguments, dict) and "k" not in config else config, "k"))
    if architecture in _OF_BATCH:
        k = config.get("k")
        # There it is an average, and need not be whole.
        whole = round(k) if isinstance(k, float) and 1 <= k < 2**31 else k
        return BatchTopK(size({"k": whole}, "k"))
    return JumpReLU() if architecture in _JUMPS else ReLU()


def _nested(config: Json, n: int) -> Nested:
    widths = config.get("matryoshka_widths", [])
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        raise AutoencoderError(f"matryoshka_widths is {shown(widths)}: expected whole numbers")
    return Nested(tuple(width for width in widths if width != n))


def _thresholds(ours: Tensors) -> Tensors:
    """Under our names: ours are reached where theirs are exceeded, or are logarithms."""
    if "topk_threshold" in ours:
        above = torch.nextafter(ours["topk_threshold"], torch.tensor(torch.inf))
        return {"threshold": above}
    if "log_threshold" in ours:
        return {"log_threshold": ours["log_threshold"]}
    if "threshold" in ours:
        # A latent is never active below zero, whatever its threshold.
        return {"log_threshold": ours["threshold"].double().clamp(min=0).log().float()}
    return {}


def write(model: Autoencoder, about: About) -> tuple[Json, dict[str, Any]]:
    """Raises AutoencoderError where SAELens has no architecture for it. Matryoshka prefixes, which only training needs,
    are left out.
    """
    architecture, more = _their_activation(model)
    rows = model.decoder_rows.detach()
    if isinstance(model, Transcoder):
        architecture = _their_transcoder(model, architecture)
        weight, bias = input_weights(model)
        more |= {"W_skip": model.skip.weight.detach()} if model.skip is not None else {}
    else:
        weight, bias = model.encoder.weight.detach(), model.latent_bias.detach()
    tensors = {"W_enc": weight.T, "W_dec": rows, "b_enc": bias, "b_dec": model.output_bias.detach(), **more}
    config: Json = {
        "architecture": architecture,
        "d_in": model.d_model,
        "d_sae": model.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not isinstance(model, Transcoder),
        "normalize_activations": "layer_norm" if model.normalize else "none",
        "reshape_activations": "none",
        "metadata": {
            key: value
            for key, value in {
                "model_name": about.model,
                "hook_name": about.hook,
                "hook_name_out": about.output_hook,
            }.items()
            if value is not None
        },
    }
    if isinstance(model.activation, TopK):
        config |= {"k": model.activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(model, Transcoder):
        config["d_out"] = model.d_out
    return config, {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _their_activation(model: Autoencoder) -> tuple[str, Tensors]:
    """The architecture, and the tensors that its activation has."""
    activation = model.activation
    if isinstance(activation, ReLU):
        return "standard", {}
    if isinstance(activation, TopK) and isinstance(activation.postact, ReLU):
        return "topk", {}
    if isinstance(activation, JumpReLU):
        return "jumprelu", {"threshold": model.own["log_threshold"].detach().exp()}
    if isinstance(activation, BatchTopK):
        return "jumprelu", {"threshold": _exceeded(model.own["threshold"]).repeat(model.n_latents)}
    name = f"{activation.name} with {activation.postact.name}" if isinstance(activation, TopK) else activation.name
    refuse(_NAME, f"activation {name}", "use another format, or train with topk, batchtopk, jumprelu or relu")


def _exceeded(threshold: Tensor) -> Tensor:
    """What has to be exceeded where a threshold has to be reached, and zero has to be exceeded anyway."""
    return torch.nextafter(threshold.detach().float(), torch.tensor(-torch.inf)).clamp(min=0)


def _their_transcoder(model: Transcoder, architecture: str) -> str:
    if architecture == "topk":
        refuse(_NAME, "transcoders with TopK", "use sparsify")
    if model.skip is not None and model.normalize:
        refuse(_NAME, "a skip connection of normalised inputs", "train with autoencoder.normalize: false")
    jumps = "jumprelu_" if architecture == "jumprelu" else ""
    return f"{jumps}{'skip_' if model.skip is not None else ''}transcoder"


FORMAT: Final = Format(_NAME, "sae_weights.safetensors", True, lambda config: "d_sae" in config, read, write)
