"""Milliseconds of encoding: the product and exact top-k in one, the same as torch writes it (linear, torch.topk), and
the bare product. They take turns in one process; medians of device-event times. Beside them what a user calls:
`Autoencoder.nonzeros` on activations in float32.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _options
from benchmarks._baselines import bare_product
from benchmarks._problem import Problem
from benchmarks._report import Result, finish, machine, milliseconds, rate, ratio, spread
from benchmarks._shapes import ENCODE_TARGETS, Shape
from benchmarks._timing import Work, measure, release
from sae.kernels.encode import encode_topk

CHECKED_ROWS = 256
COLUMNS = (
    *("B,d,n,k", "ours, ms", "p10-p90", "linear + topk", "bare linear", "ours / bare", "target", "torch / ours"),
    *("tokens/s", "nonzeros, ms", "tokens/s", "wrong rows"),
)
CAPTION = (
    "Milliseconds: medians of device-event times, all in turns in one process. bfloat16 with a bias; `nonzeros` "
    "includes normalisation, values and selection in float32, and the list of positive latents. Wrong rows: of "
    "{checked}, those where a latent was left out whose pre-activation in float64 is above a selected one by more than "
    "bfloat16 can tell."
)


def main() -> None:
    args = _options.parser(__doc__).parse_args()
    device = _options.device(args.device)
    rows = [one(shape, args, device) for shape in args.shapes]
    finish(result(rows, device), args.save, args.json)


@torch.no_grad()
def one(shape: Shape, args: Namespace, device: torch.device) -> dict[str, Any]:
    release(device)
    problem = Problem.draw(shape, "zipf", args.seed, device, normalize=True)
    model = problem.start()
    dtype = problem.sample.dtype
    weight = model.encoder.weight.to(dtype)
    bias = torch.addmv(model.latent_bias, model.encoder.weight, model.pre_bias, alpha=-1)
    rounded = model.rounded_encoder()

    def turns(encode: Callable[[Tensor], object]) -> Work:
        batches = cycle(problem.batches)
        return lambda: encode(next(batches))

    makers: dict[str, Callable[[], Work]] = {
        "ours": lambda: turns(lambda x: encode_topk(x, weight, bias, shape.k)),
        "torch": lambda: turns(lambda x: F.linear(x, weight, bias.to(dtype)).topk(shape.k, dim=1, sorted=False)),
        "gemm": lambda: bare_product(weight, problem.batches),
        "nonzeros": lambda: turns(lambda x: model.nonzeros(x.float(), rounded)),
    }
    outcomes = measure(makers, device, args.rounds, args.budget)
    return {
        "shape": str(shape),
        "tokens": shape.batch,
        "target": ENCODE_TARGETS.get(shape),
        "wrong_rows": wrong_rows(problem.sample[:CHECKED_ROWS], weight, bias, shape.k),
        "ms": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def wrong_rows(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> int:
    """Rows of x [m, d] in which a latent that was left out is clearly above a selected one."""
    pre_act = F.linear(x.double(), weight.double(), bias.double())
    selected = encode_topk(x, weight, bias, k).indices.to(torch.int64)
    least = pre_act.gather(1, selected).amin(dim=1)
    greatest_left = pre_act.scatter(1, selected, -torch.inf).amax(dim=1)
    # Each of the two may be off by half a unit in the last of bfloat16's 8 places.
    return int((greatest_left - least > 2.0**-7 * greatest_left.abs()).sum())


def result(rows: list[dict[str, Any]], device: torch.device) -> Result:
    return {
        "benchmark": "encode",
        "command": "python -m benchmarks.encode",
        "machine": machine(device),
        "caption": CAPTION.format(checked=CHECKED_ROWS),
        "columns": COLUMNS,
        "table": [cells(row) for row in rows],
        "rows": rows,
    }


def cells(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    ours, nonzeros = ms["ours"], ms["nonzeros"]
    return [
        row["shape"],
        *(milliseconds(ours), spread(ours), milliseconds(ms["torch"]), milliseconds(ms["gemm"])),
        ratio(ours, ms["gemm"]),
        f"{row['target']:g}" if row["target"] else "-",
        ratio(ms["torch"], ours),
        rate(row["tokens"], ours),
        milliseconds(nonzeros),
        rate(row["tokens"], nonzeros),
        str(row["wrong_rows"]),
    ]


if __name__ == "__main__":
    main()
