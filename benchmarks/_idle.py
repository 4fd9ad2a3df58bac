"""How much of a stretch of work the GPU spends without a kernel."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def idle_share(work: Callable[[], object]) -> float:
    """Share of the time from the first kernel of `work` to the last in which none ran, on any stream."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return share_without((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel")


def share_without(intervals: Iterable[tuple[float, float]]) -> float:
    """Share of the span of some (start, end) that none of them covers."""
    ordered = sorted(intervals)
    start = reached = ordered[0][0]
    idle = 0.0
    for begin, end in ordered:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle / (reached - start)
