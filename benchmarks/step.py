"""Milliseconds of a whole training step: ours, the same in plain torch with sparse and with dense latents, and the
bare product of the encoder. They take turns in one process; medians of device-event times.

Rows: activations from a Zipf dictionary ("zipf"), the same with a tenth of the latents dead ("dead"), and the first
shape with one latent that fires on every token ("hot").
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import _options, _profile
from benchmarks._baselines import DenseStep, TorchStep, bare_product
from benchmarks._problem import CASES, LR, Problem, training
from benchmarks._report import Result, finish, machine, milliseconds, rate, ratio, spread
from benchmarks._shapes import STEP_TARGETS, Shape
from benchmarks._timing import WARM_UP_CALLS, Work, allocated, measure, peak, release
from sae.model import Autoencoder
from sae.training import Metrics, StepConfig, TrainStep

CONTENDERS = ("ours", "torch", "dense", "gemm")
COLUMNS = (
    *("B,d,n,k", "inputs", "dead", "ours, ms", "p10-p90", "target", "torch", "dense", "bare GEMM", "torch / ours"),
    *("ours / GEMM", "tokens/s", "peak GiB", "of it ours"),
)
CAPTION = (
    "Milliseconds a training step (auxk 256, average of the weights kept{normalize}): medians of device-event times, "
    "all in turns in one process. The baselines compute no metric but the loss. Peak memory of a process that trains "
    "with ours alone; the rest of it is the benchmark's batches."
)


def main() -> None:
    parser = _options.parser(__doc__)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=CONTENDERS)
    parser.add_argument("--no-normalize", dest="normalize", action="store_false", help="train on raw inputs")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch our kernels one by one")
    parser.add_argument("--profile", action="store_true", help="what the kernels of 5 of our steps take, instead")
    args = parser.parse_args()
    device = _options.device(args.device)
    rows = [row for shape, case in plan(args) if (row := one(shape, case, args, device)) is not None]
    if rows:
        finish(result(rows, args, device), args.save, args.json)


def plan(args: Namespace) -> list[tuple[Shape, str]]:
    shapes = list(args.shapes)
    return [(shape, case) for shape in shapes for case in args.cases if case != "hot" or shape == shapes[0]]


def one(shape: Shape, case: str, args: Namespace, device: torch.device) -> dict[str, Any] | None:
    """A row of numbers; none when profiling."""
    release(device)
    problem = Problem.draw(shape, case, args.seed, device, args.normalize)
    if args.profile:
        _profile.show(f"{shape} {case}", ours(problem, args.graphs)[0], device)
        return None
    row = measured(problem, args, device)
    print(" ".join(f"{column}: {text};" for column, text in zip(COLUMNS, cells(row), strict=True)), file=sys.stderr)
    return row


def measured(problem: Problem, args: Namespace, device: torch.device) -> dict[str, Any]:
    release(device)
    before = allocated(device)
    (work, model), highest = peak(lambda: ours(problem, args.graphs), device)
    losses: dict[str, float] = {}

    def baseline(name: str, kind: type[TorchStep]) -> Work:
        step = training(kind(problem.start(), problem.shape.k, StepConfig()).step, problem)
        losses[name] = float(step())
        return step

    makers: dict[str, Callable[[], Work]] = {
        "ours": lambda: work,
        "torch": partial(baseline, "torch", TorchStep),
        "dense": partial(baseline, "dense", DenseStep),
        "gemm": lambda: bare_product(problem.start().encoder.weight, problem.batches),
    }
    outcomes = measure({name: makers[name] for name in args.only}, device, args.rounds, args.budget)
    return {
        "shape": str(problem.shape),
        "tokens": problem.shape.batch,
        "case": problem.case,
        "dead": float(work()["dead"]),
        "hot": problem.hot_share(model) if problem.case == "hot" else None,
        "first_loss": {"ours": first_loss(problem), **losses},
        "peak_bytes": highest,
        "ours_bytes": highest - before,
        "target_ms": STEP_TARGETS.get(problem.case, {}).get(problem.shape),
        "ms": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def ours(problem: Problem, graphs: bool) -> tuple[Callable[[], Metrics], Autoencoder]:
    """Our training step, some steps in: compiled, tuned, all memory taken."""
    model = problem.start()
    work = training(TrainStep(model, StepConfig(graphs=graphs)).step, problem)
    for _ in range(WARM_UP_CALLS):
        work()
    return work, model


def first_loss(problem: Problem) -> float:
    """Of ours, to be compared with the baselines': all start alike."""
    return float(TrainStep(problem.start(), StepConfig()).step(problem.batches[0], LR)["loss"])


def result(rows: list[dict[str, Any]], args: Namespace, device: torch.device) -> Result:
    normalize = ", inputs normalised" if args.normalize else ""
    normalize += "" if args.graphs else ", kernels launched one by one"
    return {
        "benchmark": "step",
        "command": "python -m benchmarks.step",
        "machine": machine(device),
        "caption": CAPTION.format(normalize=normalize) + notes(rows),
        "columns": COLUMNS,
        "table": [cells(row) for row in rows],
        "rows": rows,
    }


def cells(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    own = ms.get("ours", {})
    case = row["case"] if row["hot"] is None else f"hot ({row['hot']:.0%} of tokens)"
    return [
        row["shape"],
        case,
        f"{row['dead']:.1%}",
        milliseconds(own),
        spread(own),
        f"{row['target_ms']:g}" if row["target_ms"] else "-",
        *(milliseconds(ms.get(name, {})) for name in ("torch", "dense", "gemm")),
        *(ratio(ms.get("torch", {}), own), ratio(own, ms.get("gemm", {}))),
        rate(row["tokens"], own),
        *(f"{row[name] / 2**30:.2f}" for name in ("peak_bytes", "ours_bytes")),
    ]


def notes(rows: list[dict[str, Any]]) -> str:
    """What the table's reader must know of these numbers."""
    found = ""
    first = {row["case"]: row["ms"].get("ours", {}) for row in reversed(rows)}
    if "hot" in first and "zipf" in first:
        found += f" Hot over Zipf: {ratio(first['hot'], first['zipf'])}."
    apart = max(max(losses) / min(losses) - 1 for row in rows if (losses := list(row["first_loss"].values())))
    return found + f" First losses of the contenders are within {apart:.2%} of each other."


if __name__ == "__main__":
    main()
