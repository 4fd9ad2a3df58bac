"""Where activations come from: the subject run on the spot, or the activations table."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae.devices import Check, no_check, send
from sae.jobs import formats
from sae.jobs.contexts import Contexts
from sae.jobs.lake import DataFile, Lake
from sae.schemas.errors import IncompleteError
from sae.subject import Subject

Array = npt.NDArray[Any]


class Source(Protocol):
    """Gives the activations of whole contexts."""

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        """Activations [m, d] of all kept tokens of the given rows of the contexts, in order of (row, pos).

        On a GPU they may still be on their way on the current stream; the check is called before they are used.
        """
        ...


class Live:
    """Runs the subject up to its hook."""

    def __init__(self, subject: Subject, contexts: Contexts, batch: int) -> None:
        self._subject, self._contexts, self._batch = subject, contexts, batch

    def vectors(self, rows: Array) -> Tensor:
        """As `launch`, checked."""
        vectors, check = self.launch(rows)
        check()
        return vectors

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        """See Source."""
        if not len(rows):
            return torch.empty(0, self._subject.width), no_check
        batches = (rows[start : start + self._batch] for start in range(0, len(rows), self._batch))
        parts, checks = zip(*map(self._launch, batches), strict=True)

        def check() -> None:
            for of_part in checks:
                of_part()

        return torch.cat(parts), check

    def _launch(self, rows: Array) -> tuple[Tensor, Check]:
        token_ids, lengths = self._contexts.padded(rows)
        keep = self._subject.keep_mask(lengths, token_ids.shape[1])
        acts, check = self._subject.launch(token_ids)
        return _selected(acts, keep), check


class Cached:
    """Reads the activations table through memory maps, onto the subject's device."""

    def __init__(self, lake: Lake, contexts: Contexts, corpus: str, subject: Subject) -> None:
        self._contexts = contexts
        self._kept = contexts.kept_tokens(subject.masked_positions)
        files = lake.snapshot().select("activations", corpus=corpus, subject=subject.fingerprint[:12])
        mapped = (_mapped(lake, file) for file in files)
        self._files = [(ids, vectors) for ids, vectors in mapped if len(ids)]
        if sum(len(context_id) for context_id, _ in self._files) != self._kept.sum():
            raise IncompleteError(
                f"{lake.path}: the activations of corpus {corpus} at {subject.hook} are not fully cached; "
                "run sae harvest first, or set training.source: live"
            )
        self._width, self._device = subject.width, subject.device
        self._first = np.array([context_id[0] for context_id, _ in self._files])

    def vectors(self, rows: Array) -> Tensor:
        """As `launch`."""
        return self.launch(rows)[0]

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        """See Source. float16."""
        shape = int(self._kept[rows].sum()), self._width
        vectors = torch.empty(shape, dtype=torch.float16, pin_memory=self._device.type == "cuda")
        if len(rows):
            np.concatenate([self._of_context(row) for row in rows], out=vectors.numpy())
        return send(vectors, self._device), no_check

    def _of_context(self, row: int) -> Array:
        context_id = self._contexts.context_id[row]
        ids, vectors = self._files[np.searchsorted(self._first, context_id, side="right") - 1]
        start = np.searchsorted(ids, context_id)
        found: Array = vectors[start : start + self._kept[row]]
        return found


def _mapped(lake: Lake, file: DataFile) -> tuple[Array, Array]:
    with lake.local(file) as path:
        return formats.map_vectors(path)


def kept_activations(subject: Subject, contexts: Contexts, rows: Array) -> tuple[Tensor, tuple[Array, Array]]:
    """Activations [m, d] of the kept tokens of some contexts, with (index into rows, position) of each."""
    token_ids, lengths = contexts.padded(rows)
    keep = subject.keep_mask(lengths, token_ids.shape[1])
    acts = subject.activations(token_ids)
    at_row, at_pos = keep.nonzero(as_tuple=True)
    return _selected(acts, keep), (at_row.numpy(), at_pos.numpy())


def _selected(acts: Tensor, keep: Tensor) -> Tensor:
    """acts[keep] for a mask on the CPU; a mask on the GPU would make the host wait for its count."""
    return acts.flatten(0, 1).index_select(0, send(keep.flatten().nonzero().squeeze(1), acts.device))
