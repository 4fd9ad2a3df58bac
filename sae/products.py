"""Products of dense latents and weights in bfloat16, on a GPU with float32 sums, as training takes them there.

Shapes: B rows, m columns of the first matrix, n of the second.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 [B, n] of float32 a [B, m] and b [m, n], both rounded; so are gradients that come back."""
    return cast(Tensor, _Rounded.apply(a, b))  # type: ignore[no-untyped-call]


def wide(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two tensors of the type of products, on a GPU in that of master weights."""
    if a.is_cuda and a.dtype != torch.float64:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a, b)
        return wide(a, b).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad.bfloat16()
        of_a, of_b = ctx.needs_input_grad
        return wide(grad, b.T).float() if of_a else None, wide(a.T, grad).float() if of_b else None
