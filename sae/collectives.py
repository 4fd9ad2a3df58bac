"""What ranks of one group do together: sums, gathers, and their places in a graph of gradients.

A `Group` of one rank needs no torch.distributed and does nothing, so that one process runs the same code.
Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (the pair of functions that conjugate a sum).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Their names since torch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Wait = Callable[[], object]
"""Waits for a collective that was begun: on a GPU the current stream does, not the host."""


class Group:
    """Ranks that work together, in order of `rank`.

    Every rank must make the same calls in the same order. When another rank is lost, gloo raises RuntimeError, and
    NCCL ends the process, at the latest after the process group's timeout; but it knows nothing of what is in a CUDA
    graph: whoever watches the ranks must notice that they stand still.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group
        self.size = process_group.size() if process_group is not None else 1
        self.rank = process_group.rank() if process_group is not None else 0

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can hold what the ranks do together."""
        return self.size == 1 or dist.get_backend(self._group) == "nccl"

    def sum_(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks, in place."""
        return self._reduce_(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x over the ranks, in place."""
        return self._reduce_(x, dist.ReduceOp.MAX)

    def _reduce_(self, x: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, operation, group=self._group)
        return x

    def sum_all(self, *tensors: Tensor) -> list[Tensor]:
        """The sums of several tensors of one type in one message."""
        if self.size == 1:
            return list(tensors)
        flat = self.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        """x [m, ...] of all ranks, one after another: [size * m, ...]."""
        out, wait = self.begin_gather(x)
        wait()
        return out

    def begin_gather(self, x: Tensor) -> tuple[Tensor, Wait]:
        """As `gather`; the result is there once the second value was called."""
        if self.size == 1:
            return x, _done
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        return out, self._gather_into(out, x)

    def begin_gather_(self, whole: Tensor) -> Wait:
        """Fill whole [size * m, ...] in place, of which each rank has written its own m rows."""
        return self._gather_into(whole, whole[self.share(len(whole))])

    def begin_sum_to_shares(self, whole: Tensor) -> tuple[Tensor, Wait]:
        """This rank's share of the sum over the ranks of whole [size * m, ...]: [m, ...]. whole is used up."""
        if self.size == 1:
            return whole, _done
        out = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        work = _reduce_scatter(out, whole, group=self._group, async_op=True)
        return out, _waiting(work, whole)

    def share(self, n: int) -> slice:
        """This rank's part of n things, which the size divides."""
        m = n // self.size
        return slice(self.rank * m, (self.rank + 1) * m)

    def broadcast_(self, x: Tensor) -> Tensor:
        """x of rank 0, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self._group, group_src=0)
        return x

    def gather_objects(self, value: object) -> list[Any]:
        """A picklable value of each rank, in order."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self._group)
        return out

    def _gather_into(self, out: Tensor, x: Tensor) -> Wait:
        if self.size == 1:
            return _done
        x = x.contiguous()
        return _waiting(_all_gather(out, x, group=self._group, async_op=True), x)


def _done() -> None:
    """Nothing to wait for."""


def _waiting(work: Any, kept: Tensor) -> Wait:
    def wait() -> None:
        work.wait()
        nonlocal kept
        del kept  # its memory was read until now

    return wait


def sum_forward(x: Tensor, group: Group) -> Tensor:
    """Sum of x over the ranks, each of which then does the same with it: its gradient is passed on as it is."""
    return x if group.size == 1 else cast(Tensor, _SumForward.apply(x, group))  # type: ignore[no-untyped-call]


def sum_backward(x: Tensor, group: Group) -> Tensor:
    """x itself, which all ranks have, and of which each computes something else: its gradients are summed."""
    return x if group.size == 1 else cast(Tensor, _SumBackward.apply(x, group))  # type: ignore[no-untyped-call]


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(grad.clone()), None
