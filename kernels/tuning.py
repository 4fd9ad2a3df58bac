"""How a kernel is launched: settings are shipped for some GPUs, and on others the fastest is found once and kept.

`launches.OPS` holds what is shipped and what is tried. What was found for a GPU lies in the folder
$SAE_CACHE/tuning/<GPU>-triton<version> (~/.cache/sae where SAE_CACHE is not set), one file a choice: the first of
several processes to finish is followed by the others, so that all runs on a GPU give the same bits. Delete the folder
to measure again.
"""

import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from sae.kernels.launches import OPS, Capability, Settings

MIN_ROWS = 1024
"""Fewer rows are not worth measuring with: launching takes longer than the work."""

ROUNDS = 5
LAUNCH_OPTIONS = ("num_warps", "num_stages")

Launch = Callable[[Settings], object]
Clock = Callable[[Callable[[], object]], float]

_known: dict[Hashable, Settings] = {}
_forced: dict[str, Settings] = {}


def settings(op: str, x: Tensor, shape: tuple[int, ...], launch: Launch) -> Settings:
    """How to launch an op on x [B, ...]; shape is what else the choice depends on.

    On a GPU for which nothing is shipped, `launch` is called with every candidate, once in the life of the machine:
    calling it again and again must be harmless.
    """
    key = op, shape, x.device, len(x) >= MIN_ROWS
    found = _forced.get(op) or _known.get(key)
    if found is None:
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return OPS[op].default
        found = _known[key] = _choose(op, x, shape, launch)
    return found


def _choose(op: str, x: Tensor, shape: tuple[int, ...], launch: Launch) -> Settings:
    if x.device.type != "cuda" or triton.knobs.runtime.interpret:
        return OPS[op].default
    tuner = _tuner(x.device)
    shipped = OPS[op].shipped.get(tuner.capability)
    if shipped is not None:
        return shipped
    return tuner.best(op, shape, launch) if len(x) >= MIN_ROWS else OPS[op].default


@lru_cache
def _tuner(device: torch.device) -> "Tuner":
    name, version = torch.cuda.get_device_name(device), triton.__version__
    # Not Path.expanduser, which raises where there is no home.
    cache = Path(os.path.expanduser(os.environ.get("SAE_CACHE") or "~/.cache/sae"))
    folder = cache / "tuning" / re.sub(r"[^\w.+-]+", "-", f"{name}-triton{version}")
    return Tuner(torch.cuda.get_device_capability(device), folder, _milliseconds)


@dataclass(frozen=True)
class Tuner:
    """Finds the fastest settings on one kind of GPU and keeps them in a folder, where it can be written."""

    capability: Capability
    folder: Path
    clock: Clock

    def best(self, op: str, shape: tuple[int, ...], launch: Launch) -> Settings:
        path = self.folder / f"{'-'.join([op, *map(str, shape)])}.json"
        return self._read(path, op) or self._keep(path, op, self._fastest(op, launch))

    def _fastest(self, op: str, launch: Launch) -> Settings:
        able = [candidate for candidate in OPS[op].candidates if runs(launch, candidate)]
        # In turns, so that a GPU that warms up or is shared meanwhile favours none.
        times: list[list[float]] = [[] for _ in able]
        for _ in range(ROUNDS):
            for candidate, taken in zip(able, times, strict=True):
                taken.append(self.clock(lambda candidate=candidate: launch(candidate)))  # type: ignore[misc]
        medians = [statistics.median(taken) for taken in times]
        return able[medians.index(min(medians))] if able else OPS[op].default

    def _read(self, path: Path, op: str) -> Settings | None:
        """What is kept there, unless it is damaged or no candidate any more."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return next((candidate for candidate in OPS[op].candidates if candidate == found), None)

    def _keep(self, path: Path, op: str, chosen: Settings) -> Settings:
        """Write what was chosen, and return it, or what another process wrote first."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp") as file:
                json.dump(chosen, file)
                file.flush()
                if path.exists() and self._read(path, op) is None:
                    path.unlink(missing_ok=True)
                with suppress(FileExistsError):
                    os.link(file.name, path)
            return self._read(path, op) or chosen
        return chosen


def runs(launch: Launch, candidate: Settings) -> bool:
    """Whether the device has room for a candidate."""
    try:
        launch(candidate)
    except (OutOfResources, PTXASError):
        return False
    return True


def _milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def forced(op: str, chosen: Settings) -> Iterator[None]:
    """Launch an op in one way inside the block: to measure it, or to check it."""
    before = dict(_forced)
    _forced[op] = chosen
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def split(chosen: Settings) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of a kernel, and its launch options."""
    constants = {name: value for name, value in chosen.items() if name not in LAUNCH_OPTIONS}
    return constants, {name: chosen[name] for name in LAUNCH_OPTIONS if name in chosen}


def variants(op: str) -> list[tuple[Settings, tuple[int, ...]]]:
    """Each of the shipped settings of an op, and the architectures to compile it for; 80 is sm_80.

    The default may be launched on any of them.
    """
    shipped = OPS[op].shipped
    wanted = [(chosen, capability) for capability, chosen in shipped.items()]
    wanted += [(OPS[op].default, capability) for capability in shipped]
    architectures: dict[tuple[tuple[str, int], ...], set[int]] = {}
    for chosen, (major, minor) in wanted:
        architectures.setdefault(tuple(chosen.items()), set()).add(10 * major + minor)
    return [(dict(items), tuple(sorted(found))) for items, found in architectures.items()]
