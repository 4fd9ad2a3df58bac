"""What an op asks of its tensors. Only what the host knows is looked at: nothing waits for a device."""

import re
from functools import lru_cache

import torch
from torch import Tensor

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
IDS = frozenset({torch.int32, torch.int64})


def expect(op: str, form: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless the tensors are of a form such as "values [B, k] float, indices [B, k] int, weight [n]".

    A letter is the same size wherever it stands; int is int32 or int64; where no type is given, any will do. None is
    not looked at.
    """
    sizes: dict[str, int] = {}
    for (dimensions, types), tensor in zip(_parsed(form), tensors, strict=True):
        if tensor is None:
            continue
        agrees = len(dimensions) == tensor.ndim and all(
            sizes.setdefault(name, size) == size for name, size in zip(dimensions, tensor.shape, strict=True)
        )
        if not agrees or (types is not None and tensor.dtype not in types):
            raise ValueError(f"{op} expects {form}, received {received(*tensors)}")


def expect_contiguous(op: str, names: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless the entries of each tensor follow one another in memory; None is not looked at."""
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{op} expects contiguous {names}: call .contiguous() on what is transposed or cut out")


def expect_k(op: str, k: int, n: int) -> None:
    """Raise ValueError unless k of n can be selected."""
    if not 1 <= k <= n:
        raise ValueError(f"{op} expects 1 <= k <= n, received k={k} with n={n}")


def received(*tensors: Tensor | None) -> str:
    """Shapes and types, for a message."""
    given = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t is not None]
    return " and ".join([", ".join(given[:-1]), given[-1]]) if len(given) > 1 else given[0]


@lru_cache
def _parsed(form: str) -> list[tuple[list[str], frozenset[torch.dtype] | None]]:
    """Of each tensor, the names of its dimensions and the types that it may have."""
    types = {"float": FLOATS, "int": IDS, "": None}
    return [
        ([name for name in names.split(", ") if name], types[kind])
        for names, kind in re.findall(r"\[([^]]*)\](?: (float|int))?", form)
    ]
