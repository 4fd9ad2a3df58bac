"""Tokens a second, time of a step, memory and time in communication of sharded training, mesh by mesh.

One run starts a process for each rank of the largest mesh, with NCCL on the GPUs there are (gloo on a CPU, to try the
command), and these form one mesh after another. Rows: the shape with so many rows a replica, on a mesh of (dp, tp);
the first mesh of a shape is what its others are compared with. `--losses` trains each mesh on the same data from the
same start, and compares the losses instead.
"""

import argparse
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from io import StringIO
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

from benchmarks import _options
from benchmarks._inputs import Dictionary
from benchmarks._profile import show
from benchmarks._report import finish, machine
from benchmarks._shapes import Shape
from benchmarks._timing import Timing, clock, release
from sae.activations import TopK
from sae.initialise import initialise
from sae.jobs.costs import Mesh as Planned
from sae.jobs.costs import Rates, Sizes, transfer_seconds, transfers
from sae.mesh import Mesh
from sae.model import Autoencoder
from sae.training import StepConfig, TrainStep

MESHES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8))
SHAPES = (Shape(16_384, 768, 32_768, 32), Shape(16_384, 768, 131_072, 32))
COLUMNS = (
    "B a replica,d,n,k",
    "dp x tp",
    "ms a step",
    "p10-p90",
    "tokens/s",
    "times",
    "GiB a rank",
    "share",
    "NCCL, ms",
    "on paper",
)
CAPTION = (
    "Training steps of one autoencoder over ranks, each a process with a GPU of its own; medians of device-event times "
    "of rank 0. Times: tokens a second over those of the first mesh; share: of its memory. NCCL: time of its kernels, "
    "waiting for the others included, much of it beside other work; on paper: bytes over the rates of sae plan."
)
WARM_UP, BATCHES = 6, 4


def main() -> None:
    parser = _options.parser(__doc__)
    parser.set_defaults(shapes=SHAPES)
    parser.add_argument("--meshes", type=_mesh, nargs="+", metavar="DP,TP", help="all that the GPUs suffice for")
    parser.add_argument("--rows", type=_row, nargs="+", metavar="B,d,n,k@DP,TP", help="just these, in this order")
    parser.add_argument("--losses", type=int, metavar="STEPS", help="compare the losses of so many steps instead")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch our kernels one by one")
    parser.add_argument("--profile", action="store_true", help="print where the time of each row goes, to stderr")
    args = parser.parse_args()
    device = _options.device(args.device)
    ranks = torch.cuda.device_count() if device.type == "cuda" else 8
    meshes = args.meshes or [mesh for mesh in MESHES if mesh[0] * mesh[1] <= ranks]
    wanted = args.rows or [Row(shape, *mesh) for shape in args.shapes for mesh in meshes]
    if args.losses:
        compare(wanted, args)
        return
    rows: list[dict[str, Any]] = []
    for row, found in zip(wanted, on_ranks(wanted, _timed, args), strict=True):
        rows.append(numbers(row, found))
        print(" | ".join(cells(rows[-1], rows)), file=sys.stderr, flush=True)
    result = {
        "benchmark": "scaling",
        "command": "python -m benchmarks.scaling" + ("" if args.graphs else " --no-graphs"),
        "machine": machine(device),
        "caption": CAPTION,
        "columns": COLUMNS,
        "table": [cells(row, rows) for row in rows],
        "rows": rows,
    }
    finish(result, args.save, args.json)


def _mesh(text: str) -> tuple[int, int]:
    dp, tp = text.split(",")
    return int(dp), int(tp)


class Row(NamedTuple):
    """A shape, with so many rows a replica, on a mesh."""

    shape: Shape
    dp: int
    tp: int

    @property
    def ranks(self) -> int:
        return self.dp * self.tp


def _row(text: str) -> Row:
    shape, _, mesh = text.partition("@")
    return Row(Shape.parse(shape), *_mesh(mesh))


def numbers(row: Row, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of a row, of which rank 0 has the times, and each its memory."""
    shape, dp, tp = row
    sizes, planned = Sizes(shape.batch * dp, shape.d_model, shape.n_latents, shape.k, dead=0.0), Planned(tp, dp)
    planned_ms = 1000 * sum(transfer_seconds(one, planned, Rates()) for one in transfers(sizes, planned))
    return {
        "shape": str(shape),
        "tokens": shape.batch * dp,
        "dp": dp,
        "tp": tp,
        **found[0],
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "planned_ms": planned_ms,
    }


Work = Callable[[Mesh, torch.device, Shape, argparse.Namespace], dict[str, Any]]


def on_ranks(rows: Sequence[Row], work: Work, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What work(mesh, device, shape, args) gives on the ranks of each row, row by row."""
    results = get_context("spawn").SimpleQueue()
    places = [(row, _free_port()) for row in rows]
    context = spawn(_rank, (places, results, work, args), nprocs=max(row.ranks for row in rows), join=False)
    found: list[dict[int, dict[str, Any]]] = [{} for _ in rows]
    for number, row in enumerate(rows):
        while len(found[number]) < row.ranks:  # read meanwhile: a rank goes on only once its answer is taken
            context.join(timeout=0.05)
            while not results.empty():
                which, rank, answer = results.get()
                found[which][rank] = answer
        yield [found[number][rank] for rank in range(row.ranks)]
    while not context.join():
        pass


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank(rank: int, places: list[tuple[Row, int]], results: Any, work: Work, args: argparse.Namespace) -> None:
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    for number, (row, port) in enumerate(places):
        if rank >= row.ranks:
            continue
        with _joined(row, rank, port, device) as mesh:
            results.put((number, rank, work(mesh, device, row.shape, args)))
        release(device)


@contextmanager
def _joined(row: Row, rank: int, port: int, device: torch.device) -> Iterator[Mesh]:
    if row.ranks == 1:
        yield Mesh()
        return
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=120)
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", timeout, row.ranks, rank)
    yield Mesh.join(row.tp, row.dp, timeout)
    dist.barrier()
    dist.destroy_process_group()


def started(mesh: Mesh, device: torch.device, shape: Shape, sample: Tensor, graphs: bool = True) -> TrainStep:
    held = Autoencoder(shape.n_latents // mesh.tp.size, shape.d_model, TopK(shape.k), normalize=True, tp=mesh.tp)
    held = held.to(device)
    scale = initialise(held, sample.float(), torch.Generator().manual_seed(0), mesh.everyone)
    return TrainStep(held, StepConfig(mse_scale=scale, graphs=graphs), mesh)


def batches(mesh: Mesh, device: torch.device, shape: Shape) -> Iterator[Tensor]:
    """This replica's rows, of which its ranks have read a part each and exchange them, as in a training."""
    seed = mesh.everyone.rank
    dictionary = Dictionary(shape.d_model, shape.k, torch.Generator(device).manual_seed(seed))
    read = [dictionary.draw(shape.batch // mesh.tp.size) for _ in range(BATCHES)]
    begun = mesh.tp.begin_gather(read[0])
    for number in range(1, sys.maxsize):
        following = mesh.tp.begin_gather(read[number % BATCHES])
        begun[1]()
        yield begun[0]
        begun = following


def _timed(mesh: Mesh, device: torch.device, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    sample = Dictionary(shape.d_model, shape.k, torch.Generator(device).manual_seed(99)).draw(4096)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    train, rows = started(mesh, device, shape, sample, args.graphs), batches(mesh, device, shape)

    def work() -> None:
        train.step(next(rows), 1e-5)

    for _ in range(WARM_UP):
        work()
    calls = 10 if on_gpu else 1
    timing = Timing.of([clock(work, device, calls) for _ in range(args.rounds)])
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    found = {"ms": asdict(timing), "peak_bytes": peak, "nccl_ms": _nccl_ms(work, device)}
    if args.profile:  # each rank, since they wait for each other
        with redirect_stdout(sys.stderr if mesh.everyone.rank == 0 else StringIO()):
            show(f"{shape} {mesh.dp.size} x {mesh.tp.size}", work, device)
    train.end()
    return found


def _nccl_ms(work: Any, device: torch.device, calls: int = 5) -> float | None:
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        clock(work, device, calls)
    events = [
        event for event in profiler.key_averages() if "nccl" in event.key.lower() and not event.is_user_annotation
    ]
    return float(sum(event.self_device_time_total for event in events)) / calls / 1000


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    first = next(other for other in rows if other["shape"] == row["shape"])
    rate, base = (one["tokens"] / one["ms"]["median"] * 1000 for one in (row, first))
    ms = row["ms"]
    return [
        row["shape"],
        f"{row['dp']} x {row['tp']}",
        f"{ms['median']:.2f}",
        f"{ms['p10']:.2f}-{ms['p90']:.2f}",
        f"{rate:,.0f}",
        f"{rate / base:.2f}",
        f"{row['peak_bytes'] / 2**30:.2f}",
        f"{row['peak_bytes'] / first['peak_bytes']:.2f}" if first["peak_bytes"] else "-",
        f"{row['nccl_ms']:.2f}" if row["nccl_ms"] is not None else "-",
        f"{row['planned_ms']:.2f}",
    ]


def compare(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print how far each mesh's losses are from the first one's of the shape, with the same rows in all."""
    whole: dict[Shape, list[float]] = {}
    for row, found in zip(rows, on_ranks(rows, _losses, args), strict=True):
        losses = found[0]["losses"]
        first = whole.setdefault(row.shape, losses)
        apart = max(abs(mine / other - 1) for mine, other in zip(losses, first, strict=True))
        print(
            f"{row.shape} {row.dp} x {row.tp}: loss {losses[-1]:.6f} after {len(losses)} steps, at most {apart:.2e} "
            "apart",
            flush=True,
        )


def _losses(mesh: Mesh, device: torch.device, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    dictionary = Dictionary(shape.d_model, shape.k, torch.Generator(device).manual_seed(7))
    train = started(mesh, device, shape, dictionary.draw(4096), args.graphs)
    rows = (dictionary.draw(shape.batch)[mesh.dp.share(shape.batch)] for _ in range(args.losses))
    metrics = [train.step(x, 1e-3) for x in rows]
    found = {"losses": [float(one["loss"]) for one in metrics]}
    train.end()
    return found


if __name__ == "__main__":
    main()
