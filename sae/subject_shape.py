"""What a subject model costs, from its config alone: no weight is read, none is made.

Shapes: T tokens of a context.
"""

import copy
import re
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from sae.pretrained import load_config
from sae.schemas.errors import SubjectError
from sae.subject import resolve_hook

_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_INNER = ("mlp.hook_pre", "mlp.hook_post")


@dataclass(frozen=True)
class SubjectShape:
    """d_model: width of the activations at the hook
    parameters: of all that is loaded
    flops: of the forward to the hook, for each token of a context of T tokens
    """

    d_model: int
    parameters: int
    flops: int


def subject_shape(model: str, hook: str, layers: int | None, context_length: int) -> SubjectShape:
    """Read the config of `model` (see `Subject.load`) and count.

    Raises SubjectError: the model is not found, or its config does not tell the width at such a hook.
    """
    config = load_config(model)
    text = config.get_text_config()
    name = resolve_hook(hook)
    loaded = layers or int(text.num_hidden_layers)
    blocks, parameters = _count(config, loaded)
    run = blocks[: _n_run(name, loaded)]
    attention = 4 * context_length * int(text.hidden_size)
    return SubjectShape(_width(text, name, model), parameters, sum(2 * block + attention for block in run))


def hook_width(model: str, hook: str) -> int | None:
    """Width of the activations at a hook of `model`, where its config tells it.

    Raises SubjectError: the model is not found, or the hook has no layer.
    """
    try:
        return _width(load_config(model).get_text_config(), resolve_hook(hook), model)
    except UnknownWidthError:
        return None


class UnknownWidthError(SubjectError):
    """A config does not tell a width."""


def _width(text: PretrainedConfig, name: str, model: str) -> int:
    hidden = int(text.hidden_size)
    if name.endswith(_RESIDUAL):
        return hidden
    if name.endswith(_INNER):
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
        return int(inner or 4 * hidden)  # GPT-2's config names no width where it is the usual one
    raise UnknownWidthError(f"subject.hook: the config of {model} does not tell the width at {name}; give --d-model")


def _n_run(name: str, loaded: int) -> int:
    """How many blocks run for the hook."""
    match = re.match(r"blocks\.(\d+)\.", name)
    if match is None:
        return loaded
    return int(match[1]) + (not name.endswith("hook_resid_pre"))


def _count(config: PretrainedConfig, layers: int) -> tuple[list[int], int]:
    """Parameters of each block, and of the whole model cut down to so many blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the weights, of which there are none, would be
        model = AutoModelForCausalLM.from_config(config)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    blocks = [sum(p.numel() for p in block.parameters()) for block in stacks[0]] if stacks else []
    return blocks, sum(p.numel() for p in model.parameters())
