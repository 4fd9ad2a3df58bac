"""Where activations come from: the subject run on the spot, or the activations table."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae.jobs import formats
from sae.jobs.contexts import Contexts
from sae.jobs.lake import Lake
from sae.schemas.errors import IncompleteError
from sae.subject import Subject

Array = npt.NDArray[Any]


class Source(Protocol):
    """Gives the activations of whole contexts."""

    def vectors(self, rows: Array) -> Tensor:
        """Activations [m, d] of all kept tokens of the given rows of the contexts, in order of (row, pos)."""
        ...


class Live:
    """Runs the subject up to its hook."""

    def __init__(self, subject: Subject, contexts: Contexts, batch: int) -> None:
        self._subject, self._contexts, self._batch = subject, contexts, batch

    def vectors(self, rows: Array) -> Tensor:
        batches = (rows[start : start + self._batch] for start in range(0, len(rows), self._batch))
        parts = [kept_activations(self._subject, self._contexts, batch)[0] for batch in batches]
        return torch.cat(parts) if parts else torch.empty(0, self._subject.d_model)


class Cached:
    """Reads the activations table through memory maps."""

    def __init__(self, lake: Lake, contexts: Contexts, corpus: str, subject: Subject) -> None:
        self._contexts = contexts
        self._kept = contexts.kept_tokens(subject.masked_positions)
        files = lake.snapshot().select("activations", corpus=corpus, subject=subject.fingerprint[:12])
        mapped = (formats.map_vectors(path) for path in lake.verified(files))
        self._files = [(ids, vectors) for ids, vectors in mapped if len(ids)]
        if sum(len(context_id) for context_id, _ in self._files) != self._kept.sum():
            raise IncompleteError(
                f"{lake.path}: the activations of corpus {corpus} at {subject.hook} are not fully cached; "
                "run sae harvest first, or set training.source: live"
            )
        self._nothing = np.zeros((0, subject.d_model), np.float16)
        self._first = np.array([context_id[0] for context_id, _ in self._files])

    def vectors(self, rows: Array) -> Tensor:
        parts = [self._nothing]
        for row in rows:
            context_id = self._contexts.context_id[row]
            ids, vectors = self._files[np.searchsorted(self._first, context_id, side="right") - 1]
            start = np.searchsorted(ids, context_id)
            parts.append(vectors[start : start + self._kept[row]])
        return torch.from_numpy(np.concatenate(parts))


def kept_activations(subject: Subject, contexts: Contexts, rows: Array) -> tuple[Tensor, tuple[Array, Array]]:
    """Activations [m, d] of the kept tokens of some contexts, with (index into rows, position) of each."""
    token_ids, lengths = contexts.padded(rows)
    keep = subject.keep_mask(lengths, token_ids.shape[1])
    acts = subject.activations(token_ids)
    at_row, at_pos = keep.nonzero(as_tuple=True)
    return acts[keep.to(acts.device)], (at_row.numpy(), at_pos.numpy())
