"""Evaluations that the lake holds: read back for reports, tables and comparisons."""

from collections import defaultdict
from typing import Any, Final

import numpy as np

from sae.jobs import report, storage
from sae.jobs.lake import DataFile, Lake, Snapshot
from sae.jobs.report import Evaluation
from sae.schemas.config import Run
from sae.schemas.tables import SCHEMAS

Metrics = dict[str, float]
_CURVES: Final = ("fvu", "loss")
_FOLDER: Final = "reports"


def metrics_of(lake: Lake, snapshot: Snapshot, corpus: str) -> dict[str, Metrics]:
    """Of each autoencoder that is evaluated on a corpus, by name."""
    files = snapshot.select("metrics", corpus=corpus)
    names = sorted({file.autoencoder for file in files if file.autoencoder})
    return {name: _metrics(lake, [file for file in files if file.autoencoder == name]) for name in names}


def _metrics(lake: Lake, files: list[DataFile]) -> Metrics:
    rows = lake.read(files, ["metric", "value"])
    return dict(zip(rows["metric"].to_pylist(), rows["value"].to_pylist(), strict=True))


def of(lake: Lake, snapshot: Snapshot, name: str, corpus: str, metrics: Metrics) -> Evaluation:
    """All that a report shows of an evaluated autoencoder, whose metrics are given."""
    about = _about(snapshot, name, corpus)
    return Evaluation(name, metrics, _bins(lake, snapshot, name, corpus), _curves(lake, snapshot, name), about)


def _bins(lake: Lake, snapshot: Snapshot, name: str, corpus: str) -> dict[str, list[tuple[float, float, int]]]:
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for file in snapshot.select("distributions", corpus=corpus, autoencoder=name):
        for row in lake.read([file]).sort_by([("distribution", "ascending"), ("bin", "ascending")]).to_pylist():
            found[row["distribution"]].append((row["lower"], row["upper"], row["n"]))
    return found


def _curves(lake: Lake, snapshot: Snapshot, name: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    files = [file for file in snapshot.select("metrics", autoencoder=name) if file.corpus is None]
    if not files:
        return found
    rows = lake.read(files, ["phase", "tokens", "metric", "value"])
    phase, metric = (np.array(rows[key].to_pylist()) for key in ("phase", "metric"))
    tokens, value = (rows[key].to_numpy() for key in ("tokens", "value"))
    for one in _CURVES:
        for part in ("train", "validation"):
            chosen = np.flatnonzero((metric == one) & (phase == part))
            order = chosen[np.argsort(tokens[chosen], kind="stable")]
            if len(order):
                points = zip(tokens[order].tolist(), value[order].tolist(), strict=True)
                found.setdefault(one, {})[part] = [(float(at), height) for at, height in points]
    return found


def _about(snapshot: Snapshot, name: str, corpus: str) -> dict[str, str]:
    state: dict[str, Any] = snapshot.properties[f"autoencoder/{name}"]
    config = state["config"]
    k = config.get("k")
    return {
        "subject": str(state["model"]),
        "hook": str(state["hook"]),
        "corpus": corpus,
        "latents": f"{state['n_latents']:,}",
        "width of the activations": f"{config['d_model']:,}",
        "activation": f"{config['activation']}{f', k = {k}' if k else ''}",
        "trained on": f"{state['tokens']:,} tokens",
        "lake version": str(snapshot.version),
    }


def explained(lake: Lake, snapshot: Snapshot, name: str) -> tuple[list[str], Metrics]:
    """What the explanations of an autoencoder's atoms are worth: means over atoms; and which files say so."""
    files = snapshot.select("explanations", autoencoder=name)
    known = SCHEMAS["explanations"].names if "explanations" in SCHEMAS else []
    columns = [column for column in ("recall", "precision", "correlation") if column in known]
    rows = lake.read(files, columns) if files and columns else None
    if rows is None or not rows.num_rows:
        return [], {}
    values = {column: rows[column].to_numpy(zero_copy_only=False).astype(float) for column in columns}
    means = {f"n2g_{name}": float(np.nanmean(each)) for name, each in values.items() if not np.isnan(each).all()}
    return sorted(file.sha256 for file in files), {**means, "n2g_atoms": float(rows.num_rows)}


def report_path(lake: Lake, config: Run) -> str:
    """Where the report of an autoencoder is."""
    name = config.autoencoder.name
    if config.evaluate.report is not None:
        return config.evaluate.report.replace("{name}", name)
    return storage.join(lake.path, _FOLDER, f"evaluation-{name}.html")


def comparison_path(lake: Lake, config: Run) -> str:
    """Where that of several ones is."""
    if config.evaluate.report is not None:
        return config.evaluate.report.replace("{name}", "comparison")
    return storage.join(lake.path, _FOLDER, "comparison.html")


def write_report(path: str, lake: Lake, snapshot: Snapshot, corpus: str, names: list[str]) -> dict[str, Metrics]:
    """Of autoencoders that are evaluated; returns their metrics."""
    everyone = metrics_of(lake, snapshot, corpus)
    chosen = {name: everyone[name] for name in names}
    report.write(path, [of(lake, snapshot, name, corpus, metrics) for name, metrics in chosen.items()], everyone)
    return chosen
