"""Tokens a second, time of a step, memory and time in communication of sharded training, mesh by mesh.

One run starts the ranks of each mesh as processes of its own, with NCCL on the GPUs there are (gloo on a CPU, to try
the command). Rows: the shape with so many rows a replica, on a mesh of (dp, tp). The first mesh is what the others
are compared with. `--losses` trains each mesh on the same data from the same start, and compares the losses instead.
"""

import argparse
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

from benchmarks import _options
from benchmarks._inputs import Dictionary
from benchmarks._report import finish, machine
from benchmarks._shapes import Shape
from benchmarks._timing import Timing, clock
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
    parser.add_argument("--losses", type=int, metavar="STEPS", help="compare the losses of so many steps instead")
    args = parser.parse_args()
    device = _options.device(args.device)
    ranks = torch.cuda.device_count() if device.type == "cuda" else 8
    meshes = args.meshes or [mesh for mesh in MESHES if mesh[0] * mesh[1] <= ranks]
    if args.losses:
        compare(args, meshes)
        return
    rows = []
    for shape in args.shapes:
        for dp, tp in meshes:
            rows.append(one(shape, dp, tp, args))
            print(" ".join(map(str, cells(rows[-1], rows))), file=sys.stderr)
    result = {
        "benchmark": "scaling",
        "command": "python -m benchmarks.scaling",
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


def one(shape: Shape, dp: int, tp: int, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one mesh; rank 0 sends them, and the others their memory."""
    found = on_ranks(dp, tp, _timed, shape, args)
    sizes, planned = Sizes(shape.batch * dp, shape.d_model, shape.n_latents, shape.k, dead=0.0), Planned(tp, dp)
    planned_ms = 1000 * sum(transfer_seconds(one, planned, Rates()) for one in transfers(sizes, planned))
    known = [rank for rank in found if rank]
    peak = max((rank["peak_bytes"] for rank in known), default=0)
    return {
        "shape": str(shape),
        "tokens": shape.batch * dp,
        "dp": dp,
        "tp": tp,
        **found[0],
        "peak_bytes": peak,
        "planned_ms": planned_ms,
    }


def on_ranks(dp: int, tp: int, work: Any, *given: Any) -> list[dict[str, Any]]:
    """What work(mesh, device, *given) gives on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = get_context("spawn").SimpleQueue()
    context = spawn(_rank, (dp, tp, port, results, work, given), nprocs=dp * tp, join=False)
    found: dict[int, dict[str, Any]] = {}
    done = False
    while not done:  # read meanwhile: a rank ends only once its answer is taken
        done = bool(context.join(timeout=0.05))
        while not results.empty():
            rank, found[rank] = results.get()
    return [found[rank] for rank in sorted(found)]


def _rank(rank: int, dp: int, tp: int, port: int, results: Any, work: Any, given: tuple[Any, ...]) -> None:
    args = given[-1]
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    backend, timeout = "gloo", timedelta(seconds=120)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        torch.set_num_threads(1)
    mesh = Mesh()
    if dp * tp > 1:
        dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", timeout, dp * tp, rank)
        mesh = Mesh.join(tp, dp, timeout)
    results.put((rank, work(mesh, device, *given)))
    if dp * tp > 1:
        dist.barrier()
        dist.destroy_process_group()


def started(mesh: Mesh, device: torch.device, shape: Shape, sample: Tensor) -> TrainStep:
    held = Autoencoder(shape.n_latents // mesh.tp.size, shape.d_model, TopK(shape.k), normalize=True, tp=mesh.tp)
    held = held.to(device)
    scale = initialise(held, sample.float(), torch.Generator().manual_seed(0), mesh.everyone)
    return TrainStep(held, StepConfig(mse_scale=scale), mesh)


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
    train, rows = started(mesh, device, shape, sample), batches(mesh, device, shape)

    def work() -> None:
        train.step(next(rows), 1e-5)

    for _ in range(WARM_UP):
        work()
    calls = 10 if device.type == "cuda" else 1
    timing = Timing.of([clock(work, device, calls) for _ in range(args.rounds)])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"ms": asdict(timing), "peak_bytes": peak, "nccl_ms": _nccl_ms(work, device)}


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


def compare(args: argparse.Namespace, meshes: list[tuple[int, int]]) -> None:
    """Print how far each mesh's losses are from the first one's, with the same rows in all."""
    for shape in args.shapes:
        whole: list[float] = []
        for dp, tp in meshes:
            losses = on_ranks(dp, tp, _losses, shape, args)[0]["losses"]
            whole = whole or losses
            apart = max(abs(mine / other - 1) for mine, other in zip(losses, whole, strict=True))
            print(f"{shape} {dp} x {tp}: loss {losses[-1]:.6f} after {len(losses)} steps, at most {apart:.2e} apart")


def _losses(mesh: Mesh, device: torch.device, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    dictionary = Dictionary(shape.d_model, shape.k, torch.Generator(device).manual_seed(7))
    train = started(mesh, device, shape, dictionary.draw(4096))
    rows = (dictionary.draw(shape.batch)[mesh.dp.share(shape.batch)] for _ in range(args.losses))
    metrics = [train.step(x, 1e-3) for x in rows]
    return {"losses": [float(one["loss"]) for one in metrics]}


if __name__ == "__main__":
    main()
