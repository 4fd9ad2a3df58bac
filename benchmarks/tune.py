"""Milliseconds of each candidate of the ops that have tuned launch settings, in turns, and the entries of `shipped` in
kernels/launches.py for this GPU: of each op, the candidate that loses the least against the fastest, over all shapes.
With --device cpu and TRITON_INTERPRET=1 it shows that the command works, at tiny --shapes.
"""

import json
import math
import sys
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import _options
from benchmarks._report import machine
from benchmarks._shapes import Shape
from benchmarks._timing import Timing, Work, measure, release
from sae.kernels import tuning
from sae.kernels.dispatch import interpreter
from sae.kernels.encode import pre_activations, product_op
from sae.kernels.launches import OPS, Settings
from sae.kernels.order import latent_index
from sae.kernels.reconstruct import reconstruct
from sae.kernels.topk import group_maxima, select, select_op
from sae.kernels.update import Hyper, Latents, Parameter, SparseGradient, update, update_op

AUXK = 256
MOST = 512


def main() -> None:
    args = _options.parser(__doc__).parse_args()
    device = _options.device(args.device)
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        sys.exit("--device cpu needs TRITON_INTERPRET=1: there are kernels only")
    with interpreter() if device.type == "cpu" else nullcontext():
        rows = [row for shape in args.shapes for row in measured(shape, args, device)]
    for row in rows:
        print(f"{row['shape']:24} {row['op']:14} {row['ms']:8.3f}  {dict(row['settings'])}")
    best = fastest(rows)
    for op, settings in best.items():
        print(f"{op}: {settings}")
    if args.json:
        print(json.dumps({"benchmark": "tune", "machine": machine(device), "shipped": best, "rows": rows}))


@torch.no_grad()
def measured(shape: Shape, args: Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row for each candidate that this device can launch."""
    rows = []
    for op, work in works(shape, device).items():
        release(device)
        able = [settings for settings in OPS[op].candidates if tuning.runs(partial(launched, op, work), settings)]
        makers = {str(number): partial(partial, launched, op, work, settings) for number, settings in enumerate(able)}
        outcomes = measure(makers, device, args.rounds, args.budget, head_start=True)
        for settings, outcome in zip(able, outcomes.values(), strict=True):
            if isinstance(outcome, Timing):
                rows.append({"shape": str(shape), "op": op, "settings": settings, "ms": outcome.median})
    return rows


def works(shape: Shape, device: torch.device) -> dict[str, Work]:
    """By op, a call at a shape; those that a device or a shape has no use for are left out."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight = normal(shape.batch, shape.d_model, dtype=half), normal(shape.n_latents, shape.d_model, dtype=half)
    bias = normal(shape.n_latents)
    pre, maxima = pre_activations(x, weight, bias)
    latents, indices = select(pre, maxima, shape.k, shape.n_latents)
    found: dict[str, Work] = {"reconstruct": lambda: reconstruct(latents.relu(), indices, weight, x)}
    product = partial(pre_activations, x, weight, bias)
    found[product_op(x, weight)] = product
    # Dead latents are few, of which many are selected; encoding selects many of many.
    few = pre[:, : max(1, shape.n_latents // 10)].contiguous()
    for k, of in ((shape.k, pre), (min(AUXK, few.shape[1]), few), (min(MOST, pre.shape[1]), pre)):
        tops = maxima if of is pre else group_maxima(of)
        found.setdefault(select_op(tops.shape[1], min(k, tops.shape[1])), partial(select, of, tops, k, of.shape[1]))
    found[update_op(shape.d_model)] = updating(latents.relu(), indices, x, shape.n_latents)
    return found


def updating(values: Tensor, indices: Tensor, x: Tensor, n: int) -> Work:
    """The update of all latents, with averages, and copies in the type of x."""
    hyper = Hyper(torch.tensor([1e-3, 1.0, 1.0], device=x.device), 1e-3)

    def parameter(*size: int) -> Parameter:
        weight, exp_avg, exp_avg_sq, average = (torch.full(size, 0.01, device=x.device) for _ in range(4))
        return Parameter(weight, exp_avg, exp_avg_sq, average, x.new_empty(size) if len(size) > 1 else None)

    moved = Latents(*(parameter(*size) for size in ((n, x.shape[1]), (n,), (n, x.shape[1]))))
    index = latent_index(indices, n)
    # Made anew each time, so that the sums of whole chunks are in it.
    return lambda: update(moved, SparseGradient(index, values, values, x, x, 1e-3), hyper)


def fastest(rows: list[dict[str, Any]]) -> dict[str, Settings]:
    """Of each op, the settings that lose the least over the shapes at which all of its candidates ran."""
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        at = row["shape"], row["op"]
        least[at] = min(least.get(at, math.inf), row["ms"])
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        by_settings = losses.setdefault(row["op"], {})
        by_settings.setdefault(json.dumps(row["settings"]), []).append(row["ms"] / least[row["shape"], row["op"]])
    return {op: json.loads(_least_loss(by_settings)) for op, by_settings in losses.items()}


def _least_loss(by_settings: dict[str, list[float]]) -> str:
    shapes = max(len(lost) for lost in by_settings.values())
    complete = {settings: sum(lost) for settings, lost in by_settings.items() if len(lost) == shapes}
    return min(complete, key=complete.__getitem__)


def launched(op: str, work: Work, settings: Settings) -> None:
    with tuning.forced(op, settings):
        work()


if __name__ == "__main__":
    main()
