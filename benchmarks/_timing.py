"""Time of several ways to do the same, in turns: medians of device-event times."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_UP_CALLS = 6
SAMPLE_MS = 20.0
MAX_CALLS = 20
LIMIT_MS = 2000.0
HEAD_START_CYCLES = 10_000_000  # about 5 ms

T = TypeVar("T")
Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 10th and 90th percentile of that many samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
        return cls(statistics.median(samples), deciles[0], deciles[8], len(samples))


@dataclass(frozen=True)
class Skipped:
    """A contender that was not measured, and why."""

    reason: str


Outcome = Timing | Skipped


def measure(
    makers: Mapping[str, Callable[[], Work]],
    device: torch.device,
    rounds: int,
    budget_s: float,
    head_start: bool = False,
) -> dict[str, Outcome]:
    """The time of a call of each contender. All are made first, then take turns, each round beginning with another.

    A sample is of as many calls in a row as fill 20 ms. A contender that has used up `budget_s` sits out the rounds
    after its fifth; one that runs out of memory or takes more than 2 s a call is skipped. With `head_start` the calls
    of a sample are queued while the device still waits, so that short ones are not timed by how fast Python launches.
    """
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, tuple[Work, int]] = {}
    for name, make in makers.items():
        made = _prepare(make, device)
        if isinstance(made, Skipped):
            outcomes[name] = made
        else:
            ready[name] = made
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds):
        for name in _rotated(list(ready), turn):
            work, calls = ready[name]
            if len(samples[name]) < 5 or sum(samples[name]) * calls < budget_s * 1000:
                samples[name].append(clock(work, device, calls, head_start))
    outcomes |= {name: Timing.of(times) for name, times in samples.items()}
    return {name: outcomes[name] for name in makers}


def clock(work: Work, device: torch.device, calls: int = 1, head_start: bool = False) -> float:
    """Milliseconds a call, of that many calls in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) * 1000 / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if head_start:
        torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def seconds(work: Work) -> float:
    """Wall time of one call that ends with its result on the host."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _prepare(make: Callable[[], Work], device: torch.device) -> tuple[Work, int] | Skipped:
    """A contender warmed up, and how many of its calls make a sample."""
    try:
        return _warm_up(make(), device)
    except torch.OutOfMemoryError:
        pass
    # Out of the handler: the exception keeps the frames, and their tensors, alive until then.
    release(device)
    return Skipped("OOM")


def _warm_up(work: Work, device: torch.device) -> tuple[Work, int] | Skipped:
    clock(work, device)
    # The first call compiles and allocates; the second shows what can be afforded.
    took = clock(work, device)
    if took > LIMIT_MS:
        return Skipped("> 2 s")
    took = min(clock(work, device) for _ in range(WARM_UP_CALLS - 2))
    return work, max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / max(took, 1e-3))))


def _rotated(names: list[str], turn: int) -> list[str]:
    if not names:
        return []
    first = turn % len(names)
    return names[first:] + names[:first]


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    """Bytes of the device that tensors hold; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(make: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `make` returns, and the most bytes that tensors held meanwhile."""
    if device.type != "cuda":
        return make(), 0
    torch.cuda.reset_peak_memory_stats(device)
    made = make()
    torch.cuda.synchronize(device)
    return made, torch.cuda.max_memory_allocated(device)
