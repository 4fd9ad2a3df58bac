"""What SAEDashboard and Neuronpedia are told of an atom, both in the same words."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any, Final, NamedTuple

import numpy as np

from sae.jobs.atom_tables import AtomTables
from sae.jobs.lake import Range
from sae.jobs.site import SiteTables
from sae.schemas.origin import Origin
from sae.schemas.saedashboard import Activation

PER_BATCH: Final = 128  # atoms in a file
_BARS: Final = 50
_INTERVALS: Final = 10  # of activations, by which random examples are grouped
_ALIGNED: Final = 3  # neurons of the decoder row
_LAYER: Final = re.compile(r"\.(\d+)(\.|$)")

Row = Mapping[str, Any]


class Told(NamedTuple):
    """An atom: its page, the fields of schemas.saedashboard.Statistics, and its activations."""

    page: Row
    statistics: dict[str, Any]
    activations: list[Activation]


class Corpora(NamedTuple):
    """The text: names, how many contexts there are, and the length of the longest."""

    names: str
    n_contexts: int
    width: int


class Dashboards:
    """Tells of atoms of an autoencoder at one version of the lake."""

    def __init__(self, tables: AtomTables, bin_width: float) -> None:
        self._tables, self._made, self._bin_width = tables, SiteTables(tables), bin_width

    def told(self, atoms: Range) -> Iterator[Told]:
        """Of an inclusive range, all of whose examples are in memory at once."""
        rows = self._made.sequences(atoms).to_pylist()
        sequences = {atom: list(each) for atom, each in groupby(rows, key=lambda row: row["atom"])}
        directions = self._tables.directions(atoms)
        for page in self._made.pages(atoms).to_pylist():
            atom = page["atom"]
            statistics = _statistics(page, directions.get(atom, []), self._bin_width)
            yield Told(page, statistics, list(_activations(page, sequences.get(atom, []), self._bin_width)))

    def corpora(self, origin: Origin) -> Corpora:
        """What the atoms were seen in."""
        states = [self._tables.snapshot.properties[f"corpus/{name}"] for name in origin.corpora]
        n_contexts = sum(state["n_contexts"] for state in states)
        return Corpora(", ".join(origin.corpora), n_contexts, max(state["context_length"] for state in states))


def layer(hook: str) -> int:
    """The layer that a hook's name tells, 0 where it tells none."""
    found = _LAYER.search(hook)
    return int(found[1]) if found else 0


def identifier(text: str) -> str:
    """A name as such programs take it: letters, digits, - and _."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", text).strip("-")[:100] or "x"


def model_id(origin: Origin) -> str:
    """Of the subject: the last part of its name."""
    return identifier(PurePath(origin.model).name).lower()


def _statistics(page: Row, direction: Sequence[float], bin_width: float) -> dict[str, Any]:
    values, heights = _bars(page["hist_bin"], page["hist_n"], bin_width)
    indices, aligned, shares = _alignment(direction)
    return {
        "neuron_alignment_indices": indices,
        "neuron_alignment_values": aligned,
        "neuron_alignment_l1": shares,
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": page["coactive"],
        "correlated_features_l1": [],
        "correlated_features_pearson": page["coactive_correlation"],
        "neg_str": page["down_tokens"],
        "neg_values": page["down_logits"],
        "pos_str": page["up_tokens"],
        "pos_values": page["up_logits"],
        "frac_nonzero": page["density"],
        "freq_hist_data_bar_values": values,
        "freq_hist_data_bar_heights": heights,
        "logits_hist_data_bar_values": [],
        "logits_hist_data_bar_heights": [],
        "decoder_weights_dist": [],
        "vector": list(direction),
    }


def _bars(bins: Sequence[int], n: Sequence[float], bin_width: float) -> tuple[list[float], list[float]]:
    """Centres and counts of at most 50 bars of equal width, from the first bin that counts something to the last."""
    if not bins:
        return [], []
    first, last = bins[0], bins[-1]
    width = -(-(last + 1 - first) // _BARS)
    heights = np.zeros(-(-(last + 1 - first) // width))
    np.add.at(heights, (np.array(bins) - first) // width, n)
    # Bin b ends at b * bin_width.
    centres = (first - 1 + (np.arange(len(heights)) + 0.5) * width) * bin_width
    return centres.tolist(), heights.tolist()


def _alignment(direction: Sequence[float]) -> tuple[list[int], list[float], list[float]]:
    """Coordinates of a decoder row in which it is largest, there, and their share of its L1 norm."""
    values = np.array(direction)
    found = np.argsort(-np.abs(values), kind="stable")[:_ALIGNED]
    share = np.abs(values[found]) / max(float(np.abs(values).sum()), 1e-30)
    return found.tolist(), values[found].tolist(), share.tolist()


def _activations(page: Row, sequences: Sequence[Row], bin_width: float) -> Iterator[Activation]:
    """The strongest ones first, then the random ones by interval, the highest first."""
    top = [row for row in sequences if row["kind"] == "top"]
    for row in top:
        yield _activation(row, -1.0, page["max_act"], -1.0)
    random = sorted((row for row in sequences if row["kind"] == "random"), key=lambda row: -row["act"])
    bins, n = np.array(page["hist_bin"]), np.array(page["hist_n"])
    width = -(-int(bins[-1]) // _INTERVALS) if len(bins) else 1
    for row in random:
        interval = (int(np.ceil(row["act"] / bin_width)) - 1) // width
        inside = ((bins - 1) // width) == interval
        bounds = interval * width * bin_width, (interval + 1) * width * bin_width
        yield _activation(row, *bounds, float(n[inside].sum() / n.sum()))


def _activation(row: Row, low: float, high: float, share: float) -> Activation:
    values = np.zeros(len(row["tokens"]))
    values[row["pos"]] = row["acts"]
    return Activation(
        bin_min=low,
        bin_max=high,
        bin_contains=share,
        tokens=row["tokens"],
        values=values.tolist(),
        qualifying_token_index=row["idx"],
    )
