"""CUDA graphs: a step's kernels launched at once, where launching them one by one takes longer than running them."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[torch.Size, torch.dtype, int]


class _Recorded(NamedTuple):
    graph: Any
    x: Tensor
    result: Tensor


class Replay:
    """A function of a tensor [B, d] on a GPU and a number, recorded once the same shape and number came a few times.

    The function may change tensors in place, but must not wait for the device, and the tensors that it knows must
    stay where they are. Its result is small: it is copied. Of what ranks do together it must have waited for all that
    it began; NCCL's communicators can't end before `forget`.
    """

    WARM_UP, KEPT = 3, 8

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        self._function = function
        self._seen: Counter[Key] = Counter()
        self._recorded: OrderedDict[Key, _Recorded] = OrderedDict()
        self._pool: Any = None

    def __call__(self, x: Tensor, number: int) -> Tensor:
        key = x.shape, x.dtype, number
        if key not in self._recorded:
            self._seen[key] += 1
            if self._seen[key] <= self.WARM_UP:
                return self._function(x, number)
            self._record(key, x)
        recorded = self._recorded[key]
        self._recorded.move_to_end(key)
        recorded.x.copy_(x)
        recorded.graph.replay()
        return recorded.result.clone()

    def forget(self) -> None:
        """Let go of all that was recorded."""
        self._recorded.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Key, x: Tensor) -> None:
        if len(self._recorded) == self.KEPT:
            oldest, _ = self._recorded.popitem(last=False)
            del self._seen[oldest]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = torch.empty_like(x, memory_format=torch.contiguous_format)
        graph: Any = torch.cuda.CUDAGraph()
        # Other threads go on to copy and allocate meanwhile.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = self._function(static, key[-1])
        except RuntimeError as error:
            # Ending a recording that broke off among collectives is an error too, which hides the first one.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        self._recorded[key] = _Recorded(graph, static, result)
