"""What the metrics of an evaluation are called, in which unit they are, and whether more of them is better."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

Better = Literal["less", "more", ""]


class Figure(NamedTuple):
    metric: str
    label: str
    unit: str = ""
    better: Better = ""


_LOSS: Final = "nats/token"
GROUPS: Final[dict[str, tuple[Figure, ...]]] = {
    "Reconstruction of held-out activations": (
        Figure("fvu", "FVU: squared error / squared distance from their mean", "", "less"),
        Figure("fvu_train_mean", "  / from the mean of training text (normalised MSE of Gao et al.)", "", "less"),
        Figure("normalized_mse", "normalised MSE: mean over tokens of squared error / squared norm", "", "less"),
        Figure("cosine", "cosine with the activation", "", "more"),
        Figure("fvu_input", "FVU of the raw activations", "", "less"),
        Figure("fvu_train_mean_input", "  / from the mean of training text", "", "less"),
        Figure("normalized_mse_input", "normalised MSE of the raw activations", "", "less"),
        Figure("cosine_input", "cosine with the raw activation", "", "more"),
        Figure("fvu_pca", "FVU of PCA with as many components as L0"),
        Figure("fvu_untrained", "FVU of an untrained autoencoder"),
    ),
    "Sparsity": (
        Figure("l0", "latents per token (L0), mean", "latents"),
        Figure("l0_p05", "  5th percentile", "latents"),
        Figure("l0_p25", "  25th percentile", "latents"),
        Figure("l0_p50", "  median", "latents"),
        Figure("l0_p75", "  75th percentile", "latents"),
        Figure("l0_p95", "  95th percentile", "latents"),
        Figure("l0_max", "  most", "latents"),
        Figure("dead_fraction", "latents that were dead at the end of training", "", "less"),
        Figure("silent_fraction", "latents active on no evaluated token"),
        Figure("dense_fraction", "latents active on over a tenth of the tokens", "", "less"),
        Figure("tokens_evaluated", "tokens evaluated", "tokens"),
    ),
    "Predictions of the subject": (
        Figure("loss_clean", "loss", _LOSS),
        Figure("loss_reconstructed", "  with reconstructed activations", _LOSS, "less"),
        Figure("loss_zero_ablated", "  with zeros in their place", _LOSS),
        Figure("loss_mean_ablated", "  with their mean in their place", _LOSS),
        Figure("loss_recovered", "loss recovered, against zeros", "", "more"),
        Figure("loss_recovered_mean", "loss recovered, against the mean", "", "more"),
        Figure("kl_reconstructed", "KL(clean || reconstructed)", _LOSS, "less"),
        Figure("ablation_sparsity", "logits that ablating a latent changes, effective fraction", "", "less"),
    ),
    "Explanations": (
        Figure("n2g_recall", "N2G: recall on held-out text, mean over atoms", "", "more"),
        Figure("n2g_precision", "N2G: precision", "", "more"),
        Figure("n2g_correlation", "N2G: correlation with the activations", "", "more"),
        Figure("n2g_atoms", "N2G: atoms explained", "atoms"),
    ),
}
_KNOWN: Final = frozenset(figure.metric for figures in GROUPS.values() for figure in figures)


def groups(metrics: Sequence[str]) -> dict[str, list[Figure]]:
    """The figures of some metrics, in order; those that are not described above come last, under their own names."""
    found = {title: [one for one in figures if one.metric in metrics] for title, figures in GROUPS.items()}
    others = sorted(set(metrics) - _KNOWN)
    probes = [_probe(name) for name in others if name.startswith("probe_")]
    found["Probes of document labels: cross-entropy on held-out documents"] = probes
    found["Others"] = [Figure(name, name.replace("_", " ")) for name in others if not name.startswith("probe_")]
    return {title: figures for title, figures in found.items() if figures}


def _probe(metric: str) -> Figure:
    """probe_COLUMN_chance, probe_COLUMN_kK or probe_COLUMN_pca_kK."""
    stem, _, last = metric.removeprefix("probe_").rpartition("_")
    if last == "chance":
        return Figure(metric, f"{stem}: of the classes' shares alone", "nats")
    k = last.removeprefix("k")
    several = "" if k == "1" else "s"
    if stem.endswith("_pca"):
        column = stem.removesuffix("_pca")
        return Figure(metric, f"{column}: {k} principal component{several} of the activations", "nats")
    return Figure(metric, f"{stem}: {k} latent{several}", "nats", "less")


def shown(value: float | None) -> str:
    """A number for people."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def best(figure: Figure, values: Sequence[float | None]) -> set[int]:
    """Which of several autoencoders have the best value; none where it can't be said, or all are alike."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not figure.better or len(known) < 2 or min(known) == max(known):
        return set()
    wanted = min(known) if figure.better == "less" else max(known)
    return {at for at, value in enumerate(values) if value == wanted}


def show(evaluations: Mapping[str, Mapping[str, float]], *, on_stderr: bool) -> None:
    """Prints a table with a column for each autoencoder, its metrics by name."""
    console = Console(stderr=on_stderr, width=None, soft_wrap=False)
    if not console.is_terminal:
        console = Console(stderr=on_stderr, width=78 + 16 * len(evaluations))
    table = Table("figure", "unit", *evaluations, title="Evaluation on held-out text")
    for title, figures in groups([name for metrics in evaluations.values() for name in metrics]).items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for figure in figures:
            values = [metrics.get(figure.metric) for metrics in evaluations.values()]
            chosen = best(figure, values)
            cells = [
                f"[bold]{shown(value)}[/bold]" if at in chosen else shown(value) for at, value in enumerate(values)
            ]
            table.add_row(figure.label.replace("[", "\\["), figure.unit, *cells)
    console.print(table)
