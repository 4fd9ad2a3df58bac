"""Evaluations as one HTML file that loads nothing: tables of figures, and charts with their data in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from sae.jobs import figures, storage, svg

_POINTS: Final = 400
_STYLE: Final = """
body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #111; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: 2px 12px; border-bottom: 1px solid #ddd; text-align: left; white-space: pre-wrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.group th { padding-top: 14px; }
td.best { font-weight: bold; }
.charts { display: flex; flex-wrap: wrap; gap: 16px; }
.quiet { color: #555; }
"""


@dataclass(frozen=True)
class Evaluation:
    """What is known of an autoencoder.

    metrics: by name; bins: (lower, upper, n) by distribution; curves: (tokens, value) by metric and phase; about: what
    it is, by what people call it.
    """

    name: str
    metrics: Mapping[str, float]
    bins: Mapping[str, Sequence[tuple[float, float, int]]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def write(path: str, shown: Sequence[Evaluation], all_metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Writes the report of some autoencoders, among all that are evaluated: their metrics by name.

    Raises StorageError as storage.write_atomic.
    """
    storage.write_atomic(path, html(shown, all_metrics).encode())


def html(shown: Sequence[Evaluation], all_metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The page; see `write`."""
    names = ", ".join(one.name for one in shown)
    frontier = _frontier([one.name for one in shown], all_metrics)
    parts = [
        f"<h1>{escape(f'Evaluation of {names}')}</h1>",
        _about(shown),
        _table(shown),
        '<div class="charts">',
        *_curves(shown),
        frontier,
        *(chart for one in shown for chart in _histograms(one, len(shown) > 1)),
        "</div>",
        '<p class="quiet">Every bar and point tells its numbers when it is pointed at. The lake\'s tables metrics and '
        "distributions hold them all.</p>",
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>{escape(f"Evaluation of {names}")}'
        f"</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _about(shown: Sequence[Evaluation]) -> str:
    keys = list(dict.fromkeys(key for one in shown for key in one.about))
    rows = [_row(key, "", [one.about.get(key, "") for one in shown], set()) for key in keys]
    return f"<table>\n{_head('', shown)}\n" + "\n".join(rows) + "\n</table>"


def _table(shown: Sequence[Evaluation]) -> str:
    rows = [_head("figure", shown)]
    for title, of_group in figures.groups([name for one in shown for name in one.metrics]).items():
        rows.append(f'<tr class="group"><th colspan="{2 + len(shown)}">{escape(title)}</th></tr>')
        for figure in of_group:
            values = [one.metrics.get(figure.metric) for one in shown]
            best = figures.best(figure, values)
            rows.append(
                _row(figure.label, figure.unit, [figures.shown(value) for value in values], best, figure.metric)
            )
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _head(first: str, shown: Sequence[Evaluation]) -> str:
    names = "".join(f'<th class="number">{escape(one.name)}</th>' for one in shown)
    return f"<tr><th>{first}</th><th>unit</th>{names}</tr>"


def _row(label: str, unit: str, cells: Sequence[str], best: set[int], metric: str = "") -> str:
    kinds = ["number best" if at in best else "number" for at in range(len(cells))]
    values = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True))
    named = f' title="{escape(metric)}"' if metric else ""
    return f"<tr><td{named}>{escape(label)}</td><td>{escape(unit)}</td>{values}</tr>"


def _curves(shown: Sequence[Evaluation]) -> list[str]:
    charts = []
    for metric, title, label in (
        ("fvu", "FVU in training", "FVU, log scale"),
        ("loss", "Loss in training", "loss, log scale"),
    ):
        series = {
            (f"{one.name}, {phase}" if len(shown) > 1 else phase): thinned(points)
            for one in shown
            for phase, points in one.curves.get(metric, {}).items()
        }
        if series:
            charts.append(svg.curves(title, "tokens", label, series, log=True))
    return charts


def _frontier(names: Sequence[str], all_metrics: Mapping[str, Mapping[str, float]]) -> str:
    found = [
        svg.Label(metrics["l0"], metrics["fvu"], name, name in names)
        for name, metrics in all_metrics.items()
        if {"l0", "fvu"} <= metrics.keys()
    ]
    title = "FVU against L0, all evaluated autoencoders"
    return svg.scatter(title, "latents per token (L0), log scale", "FVU on held-out text", found, log=True)


def _histograms(one: Evaluation, several: bool) -> list[str]:
    of = f": {one.name}" if several else ""
    bins = {name: [svg.Bar(*each) for each in found] for name, found in one.bins.items()}
    zeros = sum(int(bar.n) for bar in bins.get("density", []) if bar.upper == 0)
    density = [bar for bar in bins.get("density", []) if bar.upper > 0]
    silent = f" ({zeros:,} active on no token are left out)" if zeros else ""
    return [
        svg.bars(f"Density{of}", f"fraction of tokens, log scale{silent}", "latents", density, log=True),
        svg.bars(f"Largest activations{of}", "largest activation of a latent", "latents", bins.get("max_act", [])),
        svg.bars(f"Active latents{of}", "latents active on a token", "tokens", bins.get("l0", [])),
    ]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Few enough to draw, the last one among them."""
    step = -(-len(points) // _POINTS) or 1
    return [point for at, point in enumerate(points) if at % step == 0 or at == len(points) - 1]
