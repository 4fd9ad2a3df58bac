"""Milliseconds of each op of `sae.kernels`: the kernel, its plain torch twin on the same device, and what torch has for
it, in turns in one process; medians of device-event times. The tensors are those of a training step.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import _options
from benchmarks._operands import Batch, Case, Op, cases, in_turns, prepare, topk_case
from benchmarks._problem import Problem
from benchmarks._report import Result, finish, machine, milliseconds, ratio, spread
from benchmarks._shapes import SHAPES, Shape
from benchmarks._timing import Timing, measure, release
from benchmarks._twins import twins

COLUMNS = ("B,d,n,k", "op", "ours, ms", "p10-p90", "twin", "torch", "twin / ours", "torch / ours", "from the twin")
CAPTION = (
    "Milliseconds: medians of device-event times, all in turns in one process. From the twin: norm of the difference "
    "between the two results over the norm of the twin's."
)


def main() -> None:
    parser = _options.parser(__doc__)
    parser.set_defaults(shapes=(SHAPES[0], SHAPES[3]))
    parser.add_argument("--ops", nargs="+", help="only these")
    args = parser.parse_args()
    device = _options.device(args.device)
    rows = [row for shape in args.shapes for row in measured(shape, args, device)]
    finish(result(rows, device), args.save, args.json)


def measured(shape: Shape, args: Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    release(device)
    weights, batches = prepare(Problem.draw(shape, "zipf", args.seed, device, normalize=True))
    for name, case in cases(weights, shape.k).items():
        if not args.ops or name in args.ops:
            yield {"shape": str(shape), "op": name, **one(case, batches, args, device)}
    if not args.ops or "topk" in args.ops:
        case, batches = topk_case(batches, weights, shape.k)
        yield {"shape": str(shape), "op": "topk", **one(case, batches, args, device)}


@torch.no_grad()
def one(case: Case, batches: list[Batch], args: Namespace, device: torch.device) -> dict[str, Any]:
    """Times by contender, and how far the kernel's result is from its twin's."""
    release(device)
    ops = {"ours": case.ours, "twin": twin_of(case.ours)} | ({"torch": case.plain} if case.plain else {})
    makers = {name: partial(in_turns, op, batches) for name, op in ops.items()}
    outcomes = measure(makers, device, args.rounds, args.budget, head_start=True)
    return {
        "ms": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "difference": difference(case.ours, batches[0]) if case.same and isinstance(outcomes["twin"], Timing) else None,
    }


def twin_of(op: Op) -> Op:
    def run(batch: Batch) -> object:
        with twins():
            return op(batch)

    return run


def difference(op: Op, batch: Batch) -> float:
    """Norm of what kernel and twin differ by over the norm of the twin's result: the worst of the results."""
    pairs = zip(tensors(op(batch)), tensors(twin_of(op)(batch)), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def tensors(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in tensors(part)] if isinstance(found, tuple) else []


def result(rows: list[dict[str, Any]], device: torch.device) -> Result:
    return {
        "benchmark": "kernels",
        "command": "python -m benchmarks.kernels",
        "machine": machine(device),
        "caption": CAPTION,
        "columns": COLUMNS,
        "table": [cells(row) for row in rows],
        "rows": rows,
    }


def cells(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    ours, twin, plain = ms["ours"], ms["twin"], ms.get("torch", {})
    return [
        *(row["shape"], row["op"], milliseconds(ours), spread(ours), milliseconds(twin), milliseconds(plain)),
        *(ratio(twin, ours), ratio(plain, ours)),
        "-" if row["difference"] is None else f"{row['difference']:.1e}",
    ]


if __name__ == "__main__":
    main()
