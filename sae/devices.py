"""Work on a device that the host does not wait for."""

from collections.abc import Callable

import torch
from torch import Tensor

# Called before what was launched is used: waits for it, and raises what was found wrong with it.
Check = Callable[[], None]


def no_check() -> None:
    """The check of what is known to be right."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`; from the host to a GPU by way of pinned memory, so that the host goes on at once."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
