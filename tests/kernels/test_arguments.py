"""Wrong shapes and types end in one line that says what was expected and what came; what fits passes."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.kernels.addmul import add_mul
from sae.kernels.aux_error import aux_error
from sae.kernels.centre import centre
from sae.kernels.columns import column_sum, weighted_sum
from sae.kernels.decode import decode
from sae.kernels.dispatch import interpreter
from sae.kernels.encode import encode_dense_topk, encode_topk
from sae.kernels.mse import mse
from sae.kernels.order import latent_index
from sae.kernels.reconstruct import partial, reconstruct
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul, sparse_t_matmul_coo
from sae.kernels.topk import topk

B, K, N, D = 4, 3, 11, 5


def floats(*shape: int) -> Tensor:
    return torch.ones(*shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


# By op: a call, and operands that it takes.
OPS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "decode": (decode, [floats(B, K), ids(B, K), floats(N, D)]),
    "sampled_matmul": (sampled_matmul, [floats(B, D), floats(N, D), ids(B, K)]),
    "sparse_t_matmul": (functools.partial(sparse_t_matmul, n=N), [floats(B, K), ids(B, K), floats(B, D)]),
    "sparse_t_matmul_coo": (functools.partial(sparse_t_matmul_coo, n=N), [ids(K), ids(K), floats(K), floats(B, D)]),
    "partial": (partial, [floats(B, K), ids(B, K), floats(N, D)]),
    "reconstruct": (reconstruct, [floats(B, K), ids(B, K), floats(N, D), floats(B, D), floats(B, D)]),
    "encode_topk": (functools.partial(encode_topk, k=K), [floats(B, D), floats(N, D), floats(N)]),
    "encode_dense_topk": (functools.partial(encode_dense_topk, k=K), [floats(B, D), floats(N, D), floats(N)]),
    "mse": (mse, [floats(B, D), floats(B, D)]),
    "column_sum": (column_sum, [floats(B, D)]),
    "weighted_sum": (weighted_sum, [floats(B), floats(B, D)]),
    "centre": (functools.partial(centre, eps=None, dtype=torch.float32), [floats(B, D), floats(D)]),
    "aux_error": (aux_error, [floats(B, D), floats(B, D), floats(D)]),
    "latent_index": (functools.partial(latent_index, n=N), [ids(B, K)]),
}
WRONG = [(op, at) for op, (_, operands) in OPS.items() for at in range(len(operands))]
# Whose last size no other operand has.
FREE = [
    ("decode", 2),
    ("partial", 2),
    ("sampled_matmul", 2),
    ("sparse_t_matmul", 2),
    ("sparse_t_matmul_coo", 3),
    ("weighted_sum", 1),
]


@pytest.mark.parametrize("use", ["kernel", "twin"])
@pytest.mark.parametrize(("op", "at"), WRONG)
def test_a_wrong_type_and_a_wrong_shape_are_named(op: str, at: int, use: str) -> None:
    call, operands = OPS[op]
    right = operands[at]
    other = right.to(torch.int64 if right.is_floating_point() else torch.float32)
    with interpreter() if use == "kernel" else nullcontext():
        call(*operands)
        for wrong in (other, right.to(torch.bool), right[0], right[..., None]):
            given = [*operands[:at], wrong, *operands[at + 1 :]]
            with pytest.raises(ValueError, match=rf"^{op} expects .*, received ") as caught:
                call(*given)
            assert "\n" not in str(caught.value)
            assert f"{tuple(wrong.shape)} {str(wrong.dtype).removeprefix('torch.')}" in str(caught.value)


@pytest.mark.parametrize(("op", "at"), [(op, at) for op, at in WRONG if len(OPS[op][1]) > 1 and (op, at) not in FREE])
def test_sizes_that_disagree_are_named(op: str, at: int) -> None:
    call, operands = OPS[op]
    longer = torch.cat([operands[at], operands[at][..., :1]], dim=-1)
    with pytest.raises(ValueError, match=f"^{op} expects"):
        call(*operands[:at], longer, *operands[at + 1 :])


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("encode", "latent"))])
def test_floats_of_several_types_go_together(op: str) -> None:
    call, operands = OPS[op]
    for at, operand in enumerate(operands):
        if operand.is_floating_point():
            call(*operands[:at], operand.bfloat16(), *operands[at + 1 :])


def test_what_has_its_own_rules() -> None:
    x, weight, bias = floats(B, D), floats(N, D), floats(N)
    for op in (encode_topk, encode_dense_topk):
        with pytest.raises(ValueError, match=f"{op.__name__} expects x and weight of one type"):
            op(x.bfloat16(), weight, bias, K)
        with pytest.raises(ValueError, match=f"{op.__name__} expects 1 <= k <= n, received k=12 with n=11"):
            op(x, weight, bias, 12)
    with pytest.raises(ValueError, match=r"centre expects a dtype of floats, received torch\.int32"):
        centre(x, floats(D), None, torch.int32)
    with pytest.raises(ValueError, match=r"add_mul expects floats.*received \(4, 5\) int64"):
        add_mul(x.long(), x, x)
    with pytest.raises(ValueError, match=r"topk expects x \[B, n\], received \(4,\)"):
        topk(floats(B), 1)
