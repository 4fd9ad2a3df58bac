"""A forward pass compiled for one shape of token ids.

Shapes: B contexts, T tokens, d width of the activations.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

Forward = Callable[[Tensor], Tensor]


class FixedForward:
    """`forward`, compiled for up to B contexts of T tokens; other shapes run as they did.

    The operators that one pass calls are recorded and compiled together, so that hooks and whatever else a model
    does in Python cost nothing. Fewer contexts are padded to B, for each shape would be compiled anew.
    """

    def __init__(self, forward: Forward, example: Tensor) -> None:
        """`example` [B, T] int64 on the device. Raises whatever the compiler raises."""
        self._forward = forward
        self._batch, self._width = example.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's advice on settings that are not ours
            self._compiled: Forward = torch.compile(_recorded(forward, example), dynamic=False)
            self(example)  # compiles

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> Tensor:
        """Activations [B', T', d] of token_ids [B', T']."""
        n_contexts, width = token_ids.shape
        if width != self._width or n_contexts > self._batch:
            return self._forward(token_ids)
        return self._compiled(F.pad(token_ids, (0, 0, 0, self._batch - n_contexts)))[:n_contexts]


@torch.no_grad()
def _recorded(forward: Forward, example: Tensor) -> torch.fx.GraphModule:
    def run(token_ids: Tensor) -> Tensor:
        with _ReadsAreConstants():  # type: ignore[no-untyped-call]
            return forward(token_ids)

    return make_fx(run)(example)


class _ReadsAreConstants(TorchDispatchMode):
    """Lets the code that is recorded read a number from a tensor, such as whether positions are consecutive.

    The branch that it takes then is taken for all token ids: whoever compiles has to try others.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            with disable_proxy_modes_tracing():
                return func(*args)
        return func(*args, **(kwargs or {}))
