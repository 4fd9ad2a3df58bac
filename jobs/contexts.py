"""The contexts of a corpus in memory, and padded batches of them for the subject."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor

from sae.jobs.lake import Lake, Snapshot
from sae.schemas.errors import ConfigError, IncompleteError

Array = npt.NDArray[Any]

SHARD_TOKENS: Final = 4_000_000
"""Of a file of contexts, which ends with the documents that reach them."""


@dataclass(frozen=True)
class Contexts:
    """c contexts of one corpus in order of context_id; `tokens` is their concatenation, none is longer than `width`."""

    context_id: Array
    doc_id: Array
    tokens: Array
    offsets: Array
    width: int

    def __len__(self) -> int:
        return len(self.context_id)

    @property
    def lengths(self) -> Array:
        """Tokens of each context [c]."""
        return np.diff(self.offsets)

    def padded(self, rows: Array) -> tuple[Tensor, Tensor]:
        """Token ids [b, width] of the given rows, zeros behind the end, and their lengths [b].

        The width is always the same: with others, matrix kernels may sum in another order, and the bits of a context's
        activations would depend on the batch that it is in.
        """
        lengths = self.lengths[rows]
        position = np.arange(self.width)
        inside = position < lengths[:, None]
        source = np.where(inside, self.offsets[rows][:, None] + position, 0)
        token_ids = np.where(inside, self.tokens[source], 0).astype(np.int64)
        return torch.from_numpy(token_ids), torch.from_numpy(lengths)

    def kept_tokens(self, masked_positions: tuple[int, ...]) -> Array:
        """Tokens of each context that are not at a masked position [c]."""
        lengths = self.lengths
        return lengths - sum((lengths > position).astype(np.int64) for position in set(masked_positions))


def load(lake: Lake, corpus: str, bounds: tuple[int, int] | None = None) -> Contexts:
    """The contexts of a finished corpus, or those with context_id within inclusive bounds."""
    snapshot = lake.snapshot()
    state = state_of(snapshot, corpus)
    low, high = bounds or (0, 2**63 - 1)
    files = [
        file
        for file in snapshot.select("contexts", corpus=corpus)
        if file.contexts and file.contexts[0] <= high and low <= file.contexts[1]
    ]
    inside = (pc.field("context_id") >= low) & (pc.field("context_id") <= high)
    table = lake.read(files, ["context_id", "doc_id", "token_ids"], inside).sort_by("context_id").combine_chunks()
    lists = table["token_ids"].combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    return Contexts(
        context_id=table["context_id"].to_numpy(),
        doc_id=table["doc_id"].to_numpy(),
        tokens=lists.flatten().to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        width=state["context_length"],
    )


def state_of(snapshot: Snapshot, corpus: str, model: str | None = None) -> dict[str, Any]:
    """The property of a fully tokenized corpus; raises IncompleteError where there is none.

    With a subject's name it also raises ConfigError where the corpus holds another model's tokens.
    """
    state: dict[str, Any] | None = snapshot.properties.get(f"corpus/{corpus}")
    if not state or not state["complete"]:
        raise IncompleteError(f"corpus {corpus} is not fully tokenized; run sae tokenize first")
    tokenized_for = state["made_with"]["subject.model"]
    if model not in (None, tokenized_for):
        raise ConfigError(
            f"subject.model: corpus {corpus} is tokenized for {tokenized_for}, now it is {model}; give "
            f"{tokenized_for}, or tokenize the text anew under another corpus.name"
        )
    return state
