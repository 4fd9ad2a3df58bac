"""Statistics of an autoencoder with very many latents: seconds and memory of `atoms` and of `examples`, each by itself.

The lake is benchmarks.lake's synthetic one, made in --folder unless it is there: 13 runs hold 109 million nonzeros.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import torch

from benchmarks._report import RESULTS, finish, machine
from benchmarks._synthetic_lake import NAME, Shape, grow
from sae.jobs import partials
from sae.jobs.lake import Lake

COLUMNS = ("what", "seconds", "own memory, GB", "with mapped files, GB", "target")
GIGA = 1e9
Work = Callable[[Lake], Iterator[pa.Table]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="keep the lake there; a temporary one otherwise")
    parser.add_argument("--runs", type=int, default=13)
    parser.add_argument("--latents", type=int, default=1 << 24)
    parser.add_argument("--save", metavar="FOLDER", nargs="?", const=RESULTS, type=Path, help="append the table there")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wide-benchmark-") as scratch:
        folder = args.folder or f"{scratch}/lake"
        grow(folder, Shape(262_144, args.latents, 32), args.runs)
        table = [measured(folder, *each) for each in (("atoms", atoms, "1 GB"), ("examples", examples, "-"))]
        n = sum(file.rows for file in Lake(folder).snapshot().select("latents"))
    result = {
        "benchmark": "wide",
        "command": "python -m benchmarks.wide",
        "machine": machine(torch.device("cpu")),
        "caption": f"{args.latents:,} latents, {n / 1e6:.0f}M nonzeros in {args.runs} runs, one process each.",
        "columns": COLUMNS,
        "table": table,
        "rows": [dict(zip(COLUMNS, cells, strict=True)) for cells in table],
    }
    finish(result, args.save, args.json)


def measured(folder: str, name: str, work: Work, target: str) -> list[str]:
    """In a process of its own, so that its memory is only what the work takes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, folder, work))
    process.start()
    seconds, own, whole = ours.recv()
    process.join()
    return [name, f"{seconds:.1f}", f"{own / GIGA:.2f}", f"{whole / GIGA:.2f}", target]


def _work(pipe: multiprocessing.connection.Connection, folder: str, work: Work) -> None:
    lake, ended, peak = Lake(folder), threading.Event(), [0, 0]
    me = psutil.Process()
    before = me.memory_full_info()

    def watch() -> None:
        while not ended.wait(0.05):
            now = me.memory_info()
            peak[0] = max(peak[0], now.rss - now.shared - (before.rss - before.shared))
            peak[1] = max(peak[1], now.rss - before.rss)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    for _ in work(lake):
        pass
    seconds = time.perf_counter() - began
    ended.set()
    watching.join()
    pipe.send((seconds, *peak))


def atoms(lake: Lake) -> Iterator[pa.Table]:
    snapshot = lake.snapshot()
    n_latents = snapshot.properties[f"autoencoder/{NAME}"]["n_latents"]
    return partials.atoms(lake, snapshot.select("moments", autoencoder=NAME), n_latents)


def examples(lake: Lake) -> Iterator[pa.Table]:
    snapshot = lake.snapshot()
    n_latents = snapshot.properties[f"autoencoder/{NAME}"]["n_latents"]
    top, samples = (snapshot.select(table, autoencoder=NAME) for table in ("top", "samples"))
    return partials.examples(lake, top, samples, [], n_latents, 50, 0)


if __name__ == "__main__":
    main()
