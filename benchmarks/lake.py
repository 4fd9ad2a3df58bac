"""Bytes, seconds and memory of a lake of synthetic runs (n_latents 32768, k 32, context 64, power-law densities),
beside plain ways to keep and ask the same: token-major Parquet with a writer's defaults, DuckDB's ORDER BY, and a
safetensors cache of locations and activations.

The lake is made in --folder, or added to where one is there already; --runs 12 hold 95 million nonzeros, 64 hold 500.
Each question is asked of the runs, of the compacted runs, and of token-major Parquet, by a new connection each time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from benchmarks._report import RESULTS, finish, machine
from benchmarks._synthetic_lake import CORPUS, NAME, VOCABULARY, Shape, drawn, grow
from sae.jobs import aggregate, by_token, formats, partials
from sae.jobs.cluster import cpu_count
from sae.jobs.lake import Lake, connect
from sae.jobs.token_cache import open_tokens
from sae.schemas.tables import SCHEMAS
from sae.statistics import SortedRun

COLUMNS = ("what", "ours", "alternative", "which", "target")
PARTS = ("run", "order", "questions", "pages", "tokens")
MEMORY_LIMIT = "1GB"
Cells = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the lake there; a temporary one otherwise")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--run-tokens", type=int, default=262_144)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--save", metavar="FOLDER", nargs="?", const=RESULTS, help="append the table to <date>.md there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    shape = Shape(args.run_tokens, args.latents, 32)
    table = []
    with tempfile.TemporaryDirectory(prefix="lake-benchmark-") as scratch:
        folder = args.folder or Path(scratch) / "lake"
        grow(str(folder), shape, args.runs)
        for cells in measured(folder, Path(scratch), shape, args.rounds, args.parts):
            print("  ".join(cells), file=sys.stderr, flush=True)
            table.append(cells)
    caption = f"{args.runs} runs of {shape.run_tokens:,} tokens, {cpu_count()} cores; medians of {args.rounds}."
    result = {
        "benchmark": "lake",
        "command": f"python -m benchmarks.lake --runs {args.runs}",
        "machine": machine(torch.device("cpu")),
        "caption": caption,
        "columns": COLUMNS,
        "table": table,
        "rows": [dict(zip(COLUMNS, cells, strict=True)) for cells in table],
    }
    finish(result, args.save, args.json)


def measured(folder: Path, scratch: Path, shape: Shape, rounds: int, parts: Sequence[str]) -> Iterator[Cells]:
    copy, plain = scratch / "compact", scratch / "plain"
    shutil.copytree(folder, copy, copy_function=os.link)
    if "run" in parts:
        yield from of_a_run(scratch, shape, rounds)
    yield from of_compaction(folder, copy, scratch, "order" in parts)
    if "questions" in parts:
        write_plain(folder, plain)
        yield from of_questions("runs", folder, plain, rounds)
        yield from of_questions("compact", copy, plain, rounds)
    if "tokens" in parts or "pages" in parts:
        aggregate.merge(Lake(str(copy)), NAME)
        open_tokens(Lake(str(copy)), Lake(str(copy)).snapshot(), CORPUS)
        yield from of_a_page(copy, rounds)
    if "pages" in parts:
        yield of_export(copy, scratch)
    if "tokens" in parts:
        yield from of_tokens(copy, rounds)


def write_plain(lake: Path, folder: Path) -> None:
    """The runs' rows in the order of tokens, as Parquet with a writer's defaults."""
    folder.mkdir()
    for file in Lake(str(lake)).snapshot().select("latents"):
        rows = pq.read_table(lake / file.path)
        order = np.lexsort((rows["pos"].to_numpy(), rows["context_id"].to_numpy()))
        pq.write_table(rows.take(pa.array(order)), folder / f"{file.run}.parquet")


def of_a_run(scratch: Path, shape: Shape, rounds: int) -> Iterator[Cells]:
    rows, ours, plain = drawn(shape, 0), scratch / "run.parquet", scratch / "plain.parquet"
    token_major = pa.table(dict(zip(SCHEMAS["latents"].names, rows, strict=True))).cast(SCHEMAS["latents"])

    def partials() -> None:
        run = SortedRun.from_rows(*rows)
        tables = {"moments": run.moments(), "histograms": run.histogram(0.2), "top": run.top(50)}
        for name, columns in {"latents": run.rows(), **tables, "samples": run.samples(50, 0)}.items():
            named = {"run": np.zeros(len(columns["atom"]), np.int32), **columns}
            schema = SCHEMAS[name]
            formats.write(name, [pa.table(named).select(schema.names).cast(schema)], str(scratch / f"{name}.parquet"))
        os.replace(scratch / "latents.parquet", ours)

    # Of one core each, so processor time: other processes do not count.
    mine = statistics.median(processor_seconds(partials) for _ in range(rounds))
    theirs = statistics.median(processor_seconds(lambda: pq.write_table(token_major, plain)) for _ in range(rounds))
    n = len(rows[0])
    millions = [f"{n / seconds / 1e6:.1f}M nonzeros/s a core" for seconds in (mine, theirs)]
    yield ["sort, partials, write", millions[0], millions[1], "token-major Parquet, nothing else", "8M"]
    cache = scratch / "cache.safetensors"
    locations = np.stack([rows[1], rows[2], rows[0]], axis=1)
    save_file({"locations": locations, "activations": rows[3]}, cache)
    size = f"{ours.stat().st_size / n:.2f} B a nonzero"
    yield ["a run", size, f"{plain.stat().st_size / n:.2f}", "token-major Parquet", "2.95"]
    yield ["a run", size, f"{cache.stat().st_size / n:.2f}", "safetensors", "2.95"]


def of_compaction(runs: Path, copy: Path, scratch: Path, ordered: bool) -> Iterator[Cells]:
    config = scratch / "run.yaml"
    config.write_text(json.dumps(run_config(copy)))
    command = [sys.executable, "-m", "sae.jobs.compact", str(config)]
    began = time.perf_counter()
    with peak_memory() as peak:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mine = time.perf_counter() - began
    files = Lake(str(copy)).snapshot().select("latents")
    rows = sum(file.rows for file in files)
    theirs = order_by(runs, scratch) if ordered else "-"
    yield [
        f"compact {rows / 1e6:.0f}M rows, the command",
        f"{mine:.1f} s, {peak[0] / 1e9:.2f} GB",
        theirs,
        "DuckDB ORDER BY at 2 GB",
        "60 s of 500M, 2 GB",
    ]
    bytes_ = sum(file.bytes for file in files)
    yield ["compact", f"{bytes_ / rows:.2f} B a nonzero", "-", "-", "2.85"]


def order_by(runs: Path, scratch: Path) -> str:
    out = scratch / "ordered.parquet"
    query = f"copy (select * from latents order by atom, context_id, pos) to '{out}' (format parquet)"
    began = time.perf_counter()
    with peak_memory() as peak:
        connection = connect(str(runs))
        connection.execute(f"set memory_limit = '2GB'; set temp_directory = '{scratch}/spill'")
        connection.execute(query)
    seconds = time.perf_counter() - began
    out.unlink()
    return f"{seconds:.1f} s, {peak[0] / 1e9:.2f} GB"


def run_config(lake: Path) -> dict[str, Any]:
    return {
        "export": {"folder": str(lake.parent / "json")},
        "lake": str(lake),
        "subject": {"model": "none", "hook": "none"},
        "corpus": {"name": "synthetic", "paths": ["none"], "context_length": 64},
        "autoencoder": {"name": NAME, "n_latents": 32_768, "k": 32},
        "training": {"tokens": 64, "batch_tokens": 64},
    }


ONE_ATOM = "select count(*), sum(act), max(act) from {} where atom = $1"
EVERY = "select atom, count(*), sum(act::double), sum(act::double ** 2), max(act) from {} group by atom"


def of_questions(name: str, folder: Path, plain: Path, rounds: int) -> Iterator[Cells]:
    lake, tokens = Lake(str(folder)), f"read_parquet('{plain}/*.parquet')"
    which = "token-major Parquet"

    def every(connection: duckdb.DuckDBPyConnection, table: str) -> str:
        connection.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
        return f"{median(lambda: connection.execute(EVERY.format(table)).fetchall(), rounds):.2f} s"

    mine, theirs = every(connect(lake.path), "latents"), every(duckdb.connect(), tokens)
    yield [f"{name}: statistics of all atoms, from rows, at 1 GB", mine, theirs, which, "3 s of 100M"]
    moments = lake.snapshot().select("moments", autoencoder=NAME)
    n_latents = lake.snapshot().properties[f"autoencoder/{NAME}"]["n_latents"]
    if name == "runs":
        took = median(lambda: list(partials.atoms(lake, moments, n_latents)), rounds)
        yield [f"{name}: statistics of all atoms, from partials", f"{took:.2f} s", theirs, which, "1 s of 500M"]
    counts = connect(lake.path).execute("select atom from moments group by atom order by sum(n_active) desc, atom")
    atoms = [atom for (atom,) in counts.fetchall()]
    for title, at in (("hot", 0), ("middle", len(atoms) // 2), ("rare", len(atoms) - len(atoms) // 100 - 1)):
        asked = [atoms[at]]
        pruned = partial(connect, lake.path, atoms=(atoms[at], atoms[at]))
        ours = median(lambda: pruned().execute(ONE_ATOM.format("latents"), asked).fetchall(), 5 * rounds)  # noqa: B023
        bare = median(lambda: duckdb.connect().execute(ONE_ATOM.format(tokens), asked).fetchall(), rounds)  # noqa: B023
        yield [f"{name}: one atom, {title}", f"{ours * 1000:.1f} ms", f"{bare * 1000:.0f} ms", which, "10 ms"]
    first = f"{first_connection(lake.path, atoms[0]) * 1000:.0f} ms"
    bare_first = f"{median(lambda: duckdb.connect().close(), rounds) * 1000:.0f} ms"
    yield [f"{name}: the first connection of a process, and a hot atom", first, bare_first, "duckdb.connect alone", "-"]


def first_connection(path: str, atom: int) -> float:
    program = (
        "import time; from sae.jobs import databases; from sae.jobs.lake import connect; start = time.perf_counter()\n"
        f"connect({path!r}, atoms=({atom}, {atom})).execute({ONE_ATOM.format('latents')!r}, [{atom}]).fetchall()\n"
        "print(time.perf_counter() - start)"
    )
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def of_a_page(folder: Path, rounds: int) -> Iterator[Cells]:
    atoms = connect(str(folder)).execute("select atom from atoms order by n_active desc").fetchall()
    for title, at in (("hot", 0), ("middle", len(atoms) // 2), ("rare", len(atoms) - len(atoms) // 100 - 1)):
        query = f"from atom_examples('{NAME}', {atoms[at][0]}, 'top')"
        already, new = open_and_new(str(folder), query, 3 * rounds)
        what = f"compact: top 50 with tokens, {title}, new connection"
        yield [what, f"{new * 1000:.0f} ms", f"{already * 1000:.0f} ms", "connected already", "40 ms"]


def of_export(folder: Path, scratch: Path) -> Cells:
    config = scratch / "export.yaml"
    config.write_text(json.dumps(run_config(folder)))
    began = time.perf_counter()
    with peak_memory() as peak:
        subprocess.run(
            [sys.executable, "-m", "sae.jobs.export", str(config)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    took = time.perf_counter() - began
    files = [file.stat().st_size for file in (scratch / "json").rglob("atoms/*.json")]
    what = f"JSON of {len(files):,} atoms, {sum(files) / 1e9:.1f} GB"
    return [what, f"{took:.1f} s, {peak[0] / 1e9:.2f} GB", "-", "-", "45 s of 100M, 2 GB"]


def of_tokens(folder: Path, rounds: int) -> Iterator[Cells]:
    """Questions that begin with a document or a token, beside the same without the copy."""
    lake = Lake(str(folder))
    context = lake.snapshot().properties[f"corpus/{CORPUS}"]["n_contexts"] // 2
    questions = {
        "atoms of a document": (f"from document_atoms('{NAME}', {context})", "-"),
        "latents of a context": (f"from context_latents('{NAME}', {context})", "-"),
        "atoms on a rare token": (f"from token_atoms('{NAME}', ' w{VOCABULARY - 257}')", "-"),
        "atoms on a frequent token": (f"from token_atoms('{NAME}', ' w3')", "-"),
    }
    without = [open_and_new(lake.path, query, rounds) for query, _ in questions.values()]
    began = time.perf_counter()
    by_token.refresh(lake, NAME, 800 * 10**6)
    took = time.perf_counter() - began
    for (title, (query, target)), plain in zip(questions.items(), without, strict=True):
        mine = open_and_new(lake.path, query, rounds)
        for how, ours, theirs in zip(("connected already", "with connecting"), mine, plain, strict=True):
            which = "without copy by token"
            yield [f"compact: {title}, {how}", f"{ours * 1000:.0f} ms", f"{theirs * 1000:.0f} ms", which, target]
    files = lake.snapshot().select(by_token.TABLE)
    n = sum(file.rows for file in files)
    yield ["copy by token", f"{sum(file.bytes for file in files) / n:.2f} B a nonzero", "-", "-", "-"]
    yield ["copy by token of compacted runs, one process", f"{n / took / 1e6:.1f}M nonzeros/s", "-", "-", "-"]


def open_and_new(path: str, query: str, rounds: int) -> tuple[float, float]:
    """Seconds of a query when connected already, and with connecting."""
    connection = connect(path)
    already = median(lambda: connection.execute(query).fetchall(), rounds)
    return already, median(lambda: connect(path).execute(query).fetchall(), rounds)


def median(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Most bytes that this process' children, Ray's among them, or it itself held beyond what it held before."""
    found, ended = [0], threading.Event()
    me = psutil.Process()
    before = me.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.1):
            total = max(0, me.memory_info().rss - before)
            for child in me.children(recursive=True):
                try:
                    info = child.memory_info()
                    total += info.rss - info.shared
                except psutil.Error:
                    continue
            found[0] = max(found[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
