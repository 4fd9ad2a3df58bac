"""Activations of an autoencoder's atoms in a sample of contexts, from the table `latents`: all of it is passed over."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from sae.jobs import formats, ranges
from sae.jobs.lake import DataFile, Lake, Range, Snapshot
from sae.jobs.token_cache import open_tokens
from sae.neighbours import Activity
from sae.schemas.tables import CORPUS_SHIFT, LATENTS

SAMPLE_ROWS: Final = 1 << 23
"""Rows of latents of a sample, about: 262,144 tokens with 32 latents each."""

_MOST_POSITIONS: Final = 1 << 16
Ids = npt.NDArray[np.int64]


def sampled(lake: Lake, snapshot: Snapshot, name: str, seed: int, device: str, rows: int = SAMPLE_ROWS) -> Activity:
    """Of as many contexts, drawn uniformly, as have about so many rows; of all where there are no more."""
    files = [file for file in snapshot.select("latents", autoencoder=name) if file.rows]
    encoded = _encoded(snapshot, name)
    share = min(1.0, rows / max(1, sum(file.rows for file in files)))
    contexts = _drawn(encoded, max(1, round(share * ranges.size(encoded))), seed)
    atom, token, act = (torch.from_numpy(column).to(device) for column in _read(lake, files, contexts))
    state = snapshot.properties[f"autoencoder/{name}"]
    n_tokens = _kept_tokens(lake, snapshot, contexts, state["masked_positions"])
    return Activity.of(atom, token, act, state["n_latents"], n_tokens)


def _read(lake: Lake, files: Sequence[DataFile], contexts: Ids) -> Iterator[npt.NDArray[Any]]:
    """Atom, number of the token, and act of the rows of some contexts."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for path in lake.verified(files):
        opened = formats.parquet(path)
        for group in formats.row_groups(path):
            low, high = np.searchsorted(contexts, [group.contexts[0], group.contexts[1] + 1])
            if low < high:
                rows = formats.columns(path, opened, group.number, LATENTS.names)
                at = np.searchsorted(contexts, rows["context_id"])
                mine = contexts[np.minimum(at, len(contexts) - 1)] == rows["context_id"]
                token = at[mine] * _MOST_POSITIONS + rows["pos"][mine]
                found.append((rows["atom"][mine].astype(np.int64), token, rows["act"][mine]))
    return map(np.concatenate, zip(*found, strict=True))


def _encoded(snapshot: Snapshot, name: str) -> list[Range]:
    """The contexts of the autoencoder's runs."""
    moments = snapshot.select("moments", autoencoder=name)
    whole = ranges.united(file.contexts for file in moments if file.contexts)
    dropped = [
        (low, high)
        for key, state in snapshot.properties.items()
        if key.startswith("corpus/")
        for low, high in state.get("dropped", [])
    ]
    return [part for bounds in whole for part in ranges.without(bounds, dropped)]


def _drawn(encoded: Sequence[Range], n: int, seed: int) -> Ids:
    """n of the contexts, in order."""
    chosen = np.sort(np.random.default_rng(seed).choice(ranges.size(encoded), n, replace=False))
    first, last = np.array(encoded, np.int64).T
    ends = np.cumsum(last + 1 - first)
    which = np.searchsorted(ends, chosen, side="right")
    drawn: Ids = last[which] + 1 - (ends[which] - chosen)
    return drawn


def _kept_tokens(lake: Lake, snapshot: Snapshot, contexts: Ids, masked: Sequence[int]) -> int:
    """Tokens of the contexts that are not at masked positions."""
    named = {value["number"]: key for key, value in snapshot.properties.items() if key.startswith("corpus/")}
    kept = 0
    for number in np.unique(contexts >> CORPUS_SHIFT).tolist():
        tokens = open_tokens(lake, snapshot, named[number].removeprefix("corpus/"))
        lengths = np.diff(tokens.of_each(contexts[contexts >> CORPUS_SHIFT == number])[1])
        kept += int(lengths.sum() - sum((lengths > position).sum() for position in set(masked)))
    return kept
