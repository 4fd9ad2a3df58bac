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


class Fetched:
    """A small tensor on its way to the host, which waits for it only if it is asked for `values` early."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values.detach(), None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def values(self) -> list[float]:
        """The numbers of a tensor [m]."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values.tolist()]
