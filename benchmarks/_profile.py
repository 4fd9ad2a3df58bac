"""Where the time of a step goes: the kernels of some calls by the time they take."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._timing import Work, clock

CALLS = 5
LINES = 30


def show(title: str, work: Work, device: torch.device) -> None:
    """Print the longest kernels: milliseconds and launches a call, and the name."""
    clock(work, device)
    took = clock(work, device, CALLS)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        clock(work, device, CALLS)
    rows = [
        (microseconds / CALLS / 1000, event.count / CALLS, event.key)
        for event in profiler.key_averages()
        # An annotation spans kernels that are listed themselves.
        if (microseconds := event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        and not event.is_user_annotation
    ]
    rows.sort(reverse=True)
    print(f"\n{title}: {took:.3f} ms a call unprofiled, {sum(row[0] for row in rows):.3f} ms of kernels")
    for ms, launches, name in rows[:LINES]:
        print(f"{ms:9.3f} ms {launches:7.1f} x  {name[:90]}")
