"""Which body of an op runs: its Triton kernel on a GPU, its plain torch twin elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_interpreting = False


def use_triton(*tensors: Tensor) -> bool:
    """Whether these tensors go to the Triton kernel: on CUDA, and of a type that it takes.

    float64 has no kernel: it is what the others are checked against, so it goes to the twin on any device.
    """
    if any(t.is_floating_point() and t.dtype not in KERNEL_DTYPES for t in tensors):
        return False
    return _interpreting or all(t.is_cuda for t in tensors)


@contextmanager
def interpreter() -> Iterator[None]:
    """Sends CPU tensors to the kernels inside the block; they need TRITON_INTERPRET=1 before their import."""
    global _interpreting
    _interpreting, before = True, _interpreting
    try:
        yield
    finally:
        _interpreting = before
