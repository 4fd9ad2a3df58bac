"""The paper's curves again, through the product's own commands: what it claims, and what is seen here.

    python -m benchmarks.reproduction run FOLDER --corpus TEXTS...   trains, evaluates and explains what is missing
    python -m benchmarks.reproduction tell FOLDER                    prints the tables and fits, and draws the charts

`run` trains one sweep from the same batches: TopK for all --latents and --ks, the same without AuxK and BatchTopK for
the middle ones; and ReLU + L1 of the middle number of latents, a run for each of --l1. Each is evaluated on held-out
text, and with TopK of --explained latents a sample of the corpus is encoded, and atoms explained. It is a list of `sae`
commands, each of which does only what is missing, so that it goes on where it was interrupted.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", sections 3 and 4.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from benchmarks._report import markdown
from benchmarks._scaling_law import Law, fit
from sae.jobs.lake import connect

ERROR = "fvu"
"""What the paper calls normalised MSE: the error over that of always guessing the mean."""
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.set_defaults(command=run_all)
    run.add_argument("folder", type=Path)
    run.add_argument("--corpus", nargs="+", required=True, help="as corpus.paths")
    run.add_argument("--sample", nargs="+", help="texts that are encoded and explained; the corpus where absent")
    run.add_argument("--model", default="smollm2")
    run.add_argument("--hook", default="blocks.15.hook_resid_pre")
    run.add_argument("--dtype", default="float32")
    run.add_argument("--context", type=int, default=128)
    run.add_argument("--latents", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    run.add_argument("--ks", type=int, nargs="+", default=[8, 32, 128])
    run.add_argument("--l1", type=float, nargs="*", default=[0.02, 0.04, 0.08, 0.16])
    run.add_argument("--tokens", type=int, default=100_000_000)
    run.add_argument("--batch", type=int, default=16_384)
    run.add_argument("--lr", type=float, default=4e-4)
    run.add_argument("--dead-tokens", type=int, default=2_000_000)
    run.add_argument("--evaluated", type=int, default=131_072, help="tokens of held-out text")
    run.add_argument("--explained", type=int, default=32768, help="latents of the autoencoders that are explained")
    run.add_argument("--atoms", type=int, default=200, help="so many of each, the first ones")
    run.add_argument("--side-by-side", type=int, default=1, metavar="N", help="commands that share the machine")
    run.add_argument("--actors", type=int, default=1, help="processes that encode and explain, sharing the GPU")
    tell = commands.add_parser("tell")
    tell.set_defaults(command=tell_all)
    tell.add_argument("folder", type=Path)
    tell.add_argument("--charts", type=Path, help="a folder for them; that of the run where absent")
    args = parser.parse_args()
    args.command(args)


def middle(values: list[int]) -> int:
    """Of two in the middle the smaller one."""
    return sorted(values)[(len(values) - 1) // 2]


def shapes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sweep's autoencoders."""
    n, k = middle(args.latents), middle(args.ks)
    grid = [{"name": f"topk-{n}-{k}", "n_latents": n, "k": k} for n in args.latents for k in args.ks]
    batch = [{"name": f"batchtopk-{n}-{k}", "n_latents": n, "k": k, "activation": "batchtopk"} for k in args.ks]
    without = [{"name": f"noauxk-{n}-{k}", "n_latents": n, "k": k, "auxk": 0} for n in args.latents]
    return [*grid, *batch, *without]


def config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "lake": str(args.folder / "lake"),
        "subject": {"model": args.model, "hook": args.hook, "dtype": args.dtype, "masked_positions": [0]},
        "corpus": {"name": "texts", "paths": args.corpus, "context_length": args.context},
        "training": {
            "tokens": args.tokens,
            "batch_tokens": args.batch,
            "lr": args.lr,
            "decay_fraction": 0.2,
            "dead_tokens": args.dead_tokens,
            "checkpoint_tokens": args.tokens,
            "keep_checkpoints": 1,
        },
        "evaluate": {"tokens": args.evaluated, "batch_contexts": 32},
        "explain": {"atoms": [0, args.atoms - 1], "unit_atoms": -(-args.atoms // args.actors)},
        "cluster": {"encode_actors": args.actors},
    }


def run_all(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    base = config(args)
    sweep = written(args.folder / "sweep.yaml", {**base, "autoencoders": shapes(args)})
    each = {shape["name"]: written(args.folder / f"{shape['name']}.yaml", alone(base, shape)) for shape in shapes(args)}
    dense = [written(args.folder / f"relu-{l1:g}.yaml", alone(base, relu(args, l1), l1_coef=l1)) for l1 in args.l1]
    paths = args.sample or args.corpus
    sample = {**base, "corpus": {**base["corpus"], "name": "sample" if args.sample else "texts", "paths": paths}}
    explained = {
        name: written(args.folder / f"explain-{name}.yaml", alone(sample, shape))
        for shape in shapes(args)
        if shape["n_latents"] == args.explained and (name := shape["name"]).startswith("topk")
    }
    side_by_side(args, [[("tokenize", one) for one in (sweep, *list(explained.values())[:1])]])
    side_by_side(args, [[("train", one)] for one in (sweep, *dense)])
    of_explained = ("encode", "compact", "aggregate", "explain")
    lists = [[(step, one) for step in of_explained] for one in explained.values()]
    side_by_side(args, [*lists, *([("evaluate", one)] for one in (*each.values(), *dense))])


def alone(base: dict[str, Any], shape: dict[str, Any], **training: float) -> dict[str, Any]:
    """The run of one autoencoder."""
    return {**base, "autoencoder": shape, "training": {**base["training"], **training}}


def relu(args: argparse.Namespace, l1: float) -> dict[str, Any]:
    n = middle(args.latents)
    return {"name": f"relu-{n}-{l1:g}", "n_latents": n, "activation": "relu"}


def side_by_side(args: argparse.Namespace, lists: list[list[tuple[str, Path]]]) -> None:
    """Runs lists of commands, each in its order; raises CalledProcessError where one failed, once all have ended."""
    with ThreadPoolExecutor(args.side_by_side) as threads:
        try:
            for ended in as_completed([threads.submit(in_order, one) for one in lists]):
                ended.result()
        except KeyboardInterrupt:
            threads.shutdown(cancel_futures=True)
            raise


def in_order(commands: list[tuple[str, Path]]) -> None:
    for step, path in commands:
        print(f"{datetime.now():%T} sae {step} {path}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "sae.jobs.cli", step, str(path)], check=True)


def written(path: Path, run: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


class Trained(NamedTuple):
    """An autoencoder with its evaluation; k is of those that select."""

    name: str
    kind: str
    n: int
    k: int | None
    found: dict[str, float]


def trained(folder: Path) -> list[Trained]:
    """All of the lake that are evaluated, by kind, latents and k."""
    found: dict[str, dict[str, float]] = {}
    with connect(str(folder / "lake")) as lake:
        for name, metric, value in lake.sql(
            "select autoencoder, metric, value from metrics where phase = 'evaluate'"
        ).fetchall():
            found.setdefault(name, {})[metric] = value
        explained = lake.sql(
            "select autoencoder, avg(recall), avg(precision), avg(correlation) from explanations group by all"
        ).fetchall()
    for name, *scores in explained:
        if name in found:
            found[name] |= dict(zip(("recall", "precision", "correlation"), scores, strict=True))
    rows = []
    for name, metrics in found.items():
        kind, n, last = name.split("-")
        rows.append(Trained(name, kind, int(n), None if kind == "relu" else int(last), metrics))
    return sorted(rows, key=lambda row: (row.kind, row.n, row.k or 0))


def tell_all(args: argparse.Namespace) -> None:
    rows = trained(args.folder)
    grid = [row for row in rows if row.kind == "topk"]
    law = fit([row.n for row in grid], [row.k or 0 for row in grid], [row.found[ERROR] for row in grid])
    for part in (grid_table(grid, law), law_table(law), auxk_table(rows), kinds_table(rows), explained_table(rows)):
        print(part, end="\n\n")
    folder = args.charts or args.folder
    for name, figure in (("scaling-law", of_law(grid, law)), ("kinds", of_kinds(rows))):
        figure.savefig(folder / f"{name}.png", dpi=120)
    print(json.dumps({"law": law._asdict(), "rows": [row._asdict() for row in rows]}))


def grid_table(grid: list[Trained], law: Law) -> str:
    columns = ("n", "k", "FVU", "by the law", "dead", "loss recovered")
    return markdown(columns, [[*cells(row, law)] for row in grid])


def cells(row: Trained, law: Law) -> Iterator[str]:
    yield f"{row.n:,}"
    yield str(row.k)
    yield figure_of(row, ERROR)
    yield f"{law.error(row.n, row.k or 0):.4f}"
    for metric in ("dead_fraction", "loss_recovered"):
        yield figure_of(row, metric)


def figure_of(row: Trained, metric: str) -> str:
    return f"{row.found[metric]:.4f}" if metric in row.found else "-"


def law_table(law: Law) -> str:
    return markdown(law._fields, [[f"{value:.4g}" for value in law]])


def auxk_table(rows: list[Trained]) -> str:
    """Dead latents with AuxK and without."""
    without = {(row.n, row.k): row for row in rows if row.kind == "noauxk"}
    pairs = [(row, without[row.n, row.k]) for row in rows if row.kind == "topk" and (row.n, row.k) in without]
    columns = ("n", "k", "dead with AuxK", "dead without", "FVU with", "without")
    metrics = ("dead_fraction", ERROR)
    return markdown(
        columns,
        [[f"{a.n:,}", str(a.k), *(figure_of(one, metric) for metric in metrics for one in (a, b))] for a, b in pairs],
    )


def kinds_table(rows: list[Trained]) -> str:
    """TopK, BatchTopK and ReLU of one number of latents, by L0."""
    same = of_kind(rows)
    columns = ("activation", "L0", "FVU", "loss recovered")
    metrics = (ERROR, "loss_recovered")
    found = [[row.kind, f"{row.found['l0']:.1f}", *(figure_of(row, one) for one in metrics)] for row in same]
    return markdown(columns, found)


def of_kind(rows: list[Trained]) -> list[Trained]:
    sizes = {row.n for row in rows if row.kind in ("relu", "batchtopk")}
    same = [row for row in rows if row.n in sizes and row.kind != "noauxk"]
    return sorted(same, key=lambda row: (row.kind, row.found["l0"]))


def explained_table(rows: list[Trained]) -> str:
    scores = ("recall", "precision", "correlation")
    explained = [row for row in rows if scores[0] in row.found]
    return markdown(
        ("n", "k", *scores), [[f"{row.n:,}", str(row.k), *(figure_of(row, one) for one in scores)] for row in explained]
    )


def of_law(grid: list[Trained], law: Law) -> Figure:
    """Points measured and lines of the law: error by number of latents, a line for each k."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for colour, k in zip(COLOURS, sorted({row.k or 0 for row in grid}), strict=False):
        points = [row for row in grid if row.k == k]
        sizes = [row.n for row in points]
        axes.plot(sizes, [row.found[ERROR] for row in points], "o", color=colour, label=f"k = {k}")
        axes.plot(sizes, [law.error(n, k) for n in sizes], "-", color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="latents", ylabel="FVU on held-out text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def of_kinds(rows: list[Trained]) -> Figure:
    """Error by L0, a line for each activation."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    same = of_kind(rows)
    for colour, kind in zip(COLOURS, sorted({row.kind for row in same}), strict=False):
        points = [(row.found["l0"], row.found[ERROR]) for row in same if row.kind == kind]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=kind)
    axes.set(xscale="log", yscale="log", xlabel="active latents of a token (L0)", ylabel="FVU on held-out text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
