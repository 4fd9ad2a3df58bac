"""What is measured in each step: kept on its device until a checkpoint asks for it, so that no step waits for it."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Row = tuple[str, int, int, str, float]
"""A row of the metrics table: phase, step, tokens, metric, value."""


class _Step(NamedTuple):
    number: int
    metrics: dict[str, Tensor]
    chosen: dict[str, float]
    timed: dict[str, float]


class History:
    """The measurements of steps on batches of as many tokens."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch = batch_tokens
        self._steps: list[_Step] = []

    def add(self, step: int, metrics: dict[str, Tensor], chosen: dict[str, float], timed: dict[str, float]) -> None:
        """Of one step, scalar tensors on any device, what was set, and what depends on the machine it ran on."""
        self._steps.append(_Step(step, metrics, chosen, timed))

    def rows(self) -> list[Row]:
        """Everything since the last `clear`; waits for the device, once."""
        found: list[Row] = []
        if not self._steps:
            return found
        scalars = torch.stack([value for step in self._steps for value in step.metrics.values()]).tolist()
        values = iter(scalars)
        for number, metrics, chosen, timed in self._steps:
            measured = {name: next(values) for name in metrics}
            found += rows_of("train", number, self._batch, {**measured, **chosen})
            found += rows_of("machine", number, self._batch, timed)
        return found

    def clear(self) -> None:
        self._steps = []


class Clock:
    """Speed and memory as the host sees them; a GPU is at most a few steps behind."""

    def __init__(self, batch_tokens: int, step: int) -> None:
        self._batch, self._last = batch_tokens, (time.monotonic(), step)

    def read(self, step: int) -> dict[str, float]:
        """Of the steps since it was last read."""
        (then, before), now = self._last, time.monotonic()
        self._last = now, step
        rate = {"tokens_per_second": (step - before) * self._batch / max(now - then, 1e-9)}
        if not torch.cuda.is_available():
            return rate
        return {**rate, "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def rows_of(phase: str, step: int, batch_tokens: int, values: Mapping[str, float]) -> list[Row]:
    """Rows of one step, which is that many batches after the start."""
    return [(phase, step, step * batch_tokens, name, value) for name, value in values.items()]
