"""A benchmark as a picture: `python -m benchmarks._chart step.json [--out step.png]`.

step.json is what `python -m benchmarks.step --json` printed, or benchmarks.scaling: its last line is the object.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._report import RESULTS, Result, load

# Okabe and Ito's colours, which the colour-blind can tell apart.
BARS = {
    "gemm": ("bare encoder product", "#999999"),
    "ours": ("this project", "#0072B2"),
    "torch": ("plain torch, sparse", "#E69F00"),
    "dense": ("plain torch, dense", "#D55E00"),
}
WIDTH = 0.2
CASES = {"zipf": "", "dead": "\n10% dead", "hot": "\none hot latent"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--out", type=Path, help="benchmarks/results/BENCHMARK.png where absent")
    args = parser.parse_args()
    result = load(args.output)
    name = result["benchmark"]
    drawn = {"step": steps, "scaling": scaling}[name](result)
    drawn.savefig(args.out or RESULTS / f"{name}.png", dpi=120)


def scaling(result: Result) -> Figure:
    """Bars of tokens a second, with how many times those of the first mesh of their shape they are."""
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    rows = sorted(result["rows"], key=lambda row: shapes.index(row["shape"]))
    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 1.5), 4.4), layout="constrained")
    axes = figure.subplots()
    places = [i + shapes.index(row["shape"]) for i, row in enumerate(rows)]  # a gap between shapes
    rates = [row["tokens"] / row["ms"]["median"] / 1000 for row in rows]
    bars = axes.bar(places, rates, 0.8, color=["#999999" if row["dp"] * row["tp"] == 1 else "#0072B2" for row in rows])
    first = {row["shape"]: rate for row, rate in reversed(list(zip(rows, rates, strict=True)))}
    times = [f"{rate / first[row['shape']]:.2f}x" for row, rate in zip(rows, rates, strict=True)]
    axes.bar_label(bars, times, fontsize=8, padding=1)
    axes.set_ylabel("million tokens a second (more is better)")
    axes.set_xticks(places, [f"{_shape(row)}\ndp {row['dp']}, tp {row['tp']}" for row in rows], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    of = result["machine"]
    axes.set_title(f"Sharded TopK training step on {of['device']}, {of['date']}, torch {of['torch']}", fontsize=10)
    return figure


def steps(result: Result) -> Figure:
    """Grouped bars, one group a row of the table; a black line where the target is."""
    rows = result["rows"]
    figure = Figure(figsize=(max(6.0, 1.3 * len(rows) + 1.5), 4.8), layout="constrained")
    axes = figure.subplots()
    for place, (name, (label, colour)) in enumerate(BARS.items()):
        _bars(axes, rows, name, label, colour, (place - (len(BARS) - 1) / 2) * WIDTH)
    _targets(axes, rows)
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 2, top * 1.5)
    axes.margins(x=0.02)
    axes.set_ylabel("milliseconds a training step (less is better)")
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    of = result["machine"]
    axes.set_title(f"TopK training step on {of['device']}, {of['date']}, torch {of['torch']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(BARS) + 1, fontsize=8, frameon=False)
    return figure


def _bars(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, colour: str, shift: float) -> None:
    timings = [(i + shift, _of(row, name)) for i, row in enumerate(rows)]
    places = [place for place, timing in timings if "median" in timing]
    heights = [timing["median"] for _, timing in timings if "median" in timing]
    if places:
        bars = axes.bar(places, heights, WIDTH, label=label, color=colour)
        axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=1)
    for place, timing in timings:
        if "reason" in timing:
            at_foot = axes.get_xaxis_transform()
            axes.text(place, 0.02, timing["reason"], transform=at_foot, fontsize=6, rotation=90, ha="center")


def _of(row: dict[str, Any], name: str) -> dict[str, Any]:
    timing: dict[str, Any] = row["ms"].get(name, {})
    return timing


def _targets(axes: Axes, rows: list[dict[str, Any]]) -> None:
    targets = [(i, row["target_ms"]) for i, row in enumerate(rows) if row["target_ms"]]
    if targets:
        places, heights = ([target[side] for target in targets] for side in (0, 1))
        # Across the bar of ours and a little more.
        left, right = ([place + edge * WIDTH for place in places] for edge in (-1.3, 0.3))
        axes.hlines(heights, left, right, color="black", linewidth=1.2, label="target of this project")


def _label(row: dict[str, Any]) -> str:
    return f"{_shape(row)}{CASES[row['case']]}"


def _shape(row: dict[str, Any]) -> str:
    batch, d_model, n_latents, k = row["shape"].split(",")
    return f"B {batch}, d {d_model}\nn {n_latents}, k {k}"


if __name__ == "__main__":
    main()
