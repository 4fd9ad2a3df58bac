"""What a direction at the hook does to the logits by itself, past all that comes between.

The final norm is taken as the linear map that it is but for its scale, which depends on the token: a LayerNorm centres
the direction and multiplies it by its weight, an RMSNorm only multiplies. The direction is not scaled otherwise, and
biases are left out. This is W_dec @ W_U with the norm's weight folded into W_U, as transformer_lens' fold_ln does it,
and what Bloom & Lin 2024, "Understanding SAE features with the logit lens", look at. Logits are not centred over the
vocabulary (center_unembed), as those of effects are not.

Shapes: m directions, d width at the hook, D width of the residual stream, V vocabulary.
"""

import copy
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from sae.subject import Subject

# The stream, and what is added to it.
_WRITES: Final = re.compile(r"hook_(in|out|resid_pre|resid_mid|resid_post|attn_out|mlp_out)|(attn|mlp)\.hook_out")
# What reaches the stream through one linear map of its block.
_THROUGH: Final = {"mlp.hook_post": ("mlp", "out"), "attn.hook_z": ("attn", "o")}
_FAR: Final = 1e3

Map = Callable[[Tensor], Tensor]


def direct_logits(subject: Subject) -> Map | None:
    """What maps directions [m, d] to logits [m, V], in float32; None where there is no such path from the hook."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", subject.hook)
    if match is None or not (match[2] in _THROUGH or _WRITES.fullmatch(match[2])):
        return None
    bridge = subject.bridge
    norm = _in_float32(bridge.ln_final) if hasattr(bridge, "ln_final") else nn.Identity()
    unembed = _in_float32(bridge.unembed)
    part, name = _THROUGH.get(match[2], ("", ""))
    writer = _in_float32(getattr(getattr(bridge.blocks[int(match[1])], part), name)) if part else nn.Identity()

    @torch.no_grad()
    def logits(directions: Tensor) -> Tensor:
        found: Tensor = _linear(unembed, _without_scale(norm, _linear(writer, directions.float())))
        return found

    return logits


def _in_float32(component: Any) -> nn.Module:
    """A copy of the model's own module that the bridge's component wraps."""
    module: nn.Module = copy.deepcopy(component.original_component)
    return module.float()


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """A module without its bias."""
    found: Tensor = module(x) - module(torch.zeros_like(x[:1]))
    return found


def _without_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """x [m, D] through a norm without scale and bias. Rows are lengthened, so that the norm's epsilon is nothing."""
    length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    far = _FAR * x.shape[-1] ** 0.5 * x / length
    normed = _linear(norm, far)
    if not torch.allclose(_linear(norm, 2 * far), normed, rtol=1e-3, atol=1e-3):
        return _linear(norm, x)
    centres = torch.allclose(_linear(norm, far + _FAR), normed, rtol=1e-2, atol=1e-2)
    spread = far - far.mean(dim=-1, keepdim=True) if centres else far
    scale = spread.square().mean(dim=-1, keepdim=True).sqrt()
    found: Tensor = normed * scale * length / (_FAR * x.shape[-1] ** 0.5)
    return found
