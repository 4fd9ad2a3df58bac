"""CUDA graphs: a step's kernels launched at once, where launching them one by one takes longer than running them."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Results = dict[str, Tensor]


class _Recorded(NamedTuple):
    graph: Any
    x: Tensor
    results: Results


class Replay:
    """A function of a tensor [B, d] and a number, recorded once the same shape and number have come a few times.

    The function may change tensors in place, but nothing else, and must not wait for the device. Its results are
    small: they are copied. On a CPU it is called as it is.
    """

    WARM_UP, KEPT = 2, 4

    def __init__(self, function: Callable[[Tensor, int], Results]) -> None:
        self._function = function
        self._seen: Counter[Any] = Counter()
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._pool: Any = None

    def __call__(self, x: Tensor, number: int) -> Results:
        if not x.is_cuda:
            return self._function(x, number)
        key = (x.shape, x.dtype, number)
        if key not in self._recorded:
            self._seen[key] += 1
            if self._seen[key] <= self.WARM_UP:
                return self._function(x, number)
            self._record(key, x, number)
        recorded = self._recorded[key]
        self._recorded.move_to_end(key)
        recorded.x.copy_(x)
        recorded.graph.replay()
        return {name: value.clone() for name, value in recorded.results.items()}

    def _record(self, key: Any, x: Tensor, number: int) -> None:
        if len(self._recorded) == self.KEPT:
            self._recorded.popitem(last=False)
        torch.cuda.empty_cache()  # what the first calls needed, the graph will hold by itself
        graph: Any = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Other threads go on to copy and allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = self._function(static, number)
        self._recorded[key] = _Recorded(graph, static, results)
