"""What an atom does to the predictions: its contribution is taken out of one position, and the subject runs on.

Shapes: c contexts of up to T tokens, e examples, d width at the hook, V vocabulary, p pairs of an example and a later
token, m of them at once, v votes.

x_ablated = x - act * decoder row (times the standard deviation that `normalize` took out of x): what the autoencoder
does not explain stays. Of a transcoder x is what it reconstructs, at the output hook. The act is the one that the
autoencoder gives in this very run of the subject: a stored one is rounded to 10 mantissa bits, so that up to 1/2000 of
the contribution would stay too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sae.kernels.changes import Changes, changes
from sae.model import Autoencoder
from sae.onward import Clean, Onward

# Of logits [m, V] in float32 that are made at once, and of those that are compared at once: on a CPU these are to stay
# in its caches, which takes half the time, while the product with the unembedding wants more rows; both are to fill a
# GPU.
_LOGITS_BYTES: Final = {"cpu": 16 << 20, "cuda": 512 << 20}
_COMPARED_BYTES: Final = {"cpu": 3 << 19, "cuda": 512 << 20}


class Examples(NamedTuple):
    """Where atoms are ablated: rows of contexts, in ascending order, positions and atoms, int64 [e] each."""

    context: Tensor
    pos: Tensor
    atom: Tensor


class Effects(NamedTuple):
    """Of e examples in order: their acts [e], how many later tokens each has [e], and the changes of all these [p].

    Exactly zero where the atom is not active.
    """

    act: Tensor
    n_later: Tensor
    changes: Changes


class Ablation:
    """Effects of an autoencoder's atoms on a subject.

    votes: tokens in a list; batch: examples, or contexts, that the subject runs at once.
    """

    def __init__(self, onward: Onward, autoencoder: Autoencoder, votes: int, batch: int) -> None:
        self._onward, self._autoencoder = onward, autoencoder
        self._votes, self._batch = min(votes, onward.vocab_size), batch
        self._rounded_encoder = autoencoder.rounded_encoder()

    @torch.no_grad()
    def effects(self, token_ids: Tensor, lengths: Tensor, examples: Examples) -> Iterator[Effects]:
        """Of examples in token_ids [c, T] int64, of `lengths` [c], on the CPU: a batch after the other.

        Every context has an example; it runs once without a change, however many examples it has.
        """
        runs = _CleanRuns(self._onward, token_ids, self._batch)
        for context, pos, atom in zip(*(column.split(self._batch) for column in examples), strict=True):
            first, last = int(context[0]), int(context[-1])
            clean, rows = runs.of(first, last), slice(first, last + 1)
            device = clean.acts.device
            part = Examples(*(column.to(device) for column in (context - first, pos, atom)))
            yield self._of(clean, token_ids[rows].to(device), lengths[rows].to(device), part)

    def _of(self, clean: Clean, token_ids: Tensor, lengths: Tensor, examples: Examples) -> Effects:
        """Of some examples in contexts whose clean runs are given."""
        act, acts = self._ablated(clean, examples)
        final = self._onward.run(acts, clean.entering[examples.context])
        pairs = _Pairs.of(examples, lengths[examples.context] - 1 - examples.pos, acts.shape[1])
        return Effects(act, pairs.n_later, self._changes(clean.final, final, token_ids, pairs, act > 0))

    def _ablated(self, clean: Clean, examples: Examples) -> tuple[Tensor, Tensor]:
        """Act [e] of each atom, and activations [e, T, d] without its contribution."""
        context, pos, atom = examples
        at = torch.arange(len(pos), device=pos.device)
        acts = clean.acts[context]
        x = clean.encoded[context, pos].float()
        row, latent, value = self._autoencoder.nonzeros(x, self._rounded_encoder)
        mine = latent == atom[row]
        act = x.new_zeros(len(x)).index_put((row[mine],), value[mine].to(x.dtype))
        scale = self._autoencoder.preprocess(x)[1].get("std", x.new_ones(()))
        contribution = act[:, None] * self._autoencoder.decoder_rows[atom] * scale
        acts[at, pos] = (acts[at, pos].float() - contribution).to(acts.dtype)
        return act, acts

    def _changes(self, clean: Tensor, final: Tensor, token_ids: Tensor, pairs: "_Pairs", active: Tensor) -> Changes:
        """From the streams behind the last block: clean [c, T, D], and final [e, T, D] of each example."""
        width, parts = clean.shape[1], [Changes(*_no_changes(self._votes, clean.device))]
        made, compared = (
            max(1, size[clean.device.type] // (4 * self._onward.vocab_size))
            for size in (_LOGITS_BYTES, _COMPARED_BYTES)
        )
        for chunk in pairs.by_place.split(made) if len(pairs.by_place) else ():
            example, place = pairs.example[chunk], pairs.place[chunk]
            places, shared = place.unique_consecutive(return_inverse=True)
            rows = torch.cat([clean.flatten(0, 1)[places], final[example, place % width]])
            logits = self._onward.logits(rows)
            following = token_ids[place // width, place % width + 1]
            for few in torch.arange(len(chunk), device=chunk.device).split(compared):
                first, last = int(shared[few[0]]), int(shared[few[-1]])
                own, others = logits[first : last + 1], logits[len(places) + few]
                parts.append(changes(own, others, shared[few] - first, following[few], self._votes))
        back, active = pairs.by_place.argsort(), active[pairs.example]
        together = [torch.cat(column)[back] for column in zip(*parts, strict=True)]
        return Changes(*(_zero_unless(active, column) for column in together))


def _zero_unless(active: Tensor, column: Tensor) -> Tensor:
    if not column.is_floating_point():
        return column
    return column.where(active.view(-1, *[1] * (column.ndim - 1)), 0)


def _no_changes(votes: int, device: torch.device) -> Iterator[Tensor]:
    for name in Changes._fields:
        shape = (0,) if name in ("loss_diff", "kl") else (0, votes)
        kind = torch.int64 if "tokens" in name else torch.float32
        yield torch.zeros(shape, dtype=kind, device=device)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of an example and a later token, one example's after the other's.

    example, place: [p] whose prediction it is, and where it is made, as row * T + position; by_place: [p] the pairs in
    an order in which those of one place follow each other, so that its clean prediction is made once.
    """

    n_later: Tensor
    example: Tensor
    place: Tensor
    by_place: Tensor

    @classmethod
    def of(cls, examples: Examples, n_later: Tensor, width: int) -> "_Pairs":
        example = torch.arange(len(n_later), device=n_later.device).repeat_interleave(n_later)
        first = n_later.cumsum(0) - n_later
        later = torch.arange(len(example), device=n_later.device) - first[example]
        place = examples.context[example] * width + examples.pos[example] + later
        return cls(n_later, example, place, place.argsort(stable=True))


class _CleanRuns:
    """Clean runs of contexts in order: made in full batches, ahead of their use, and let go once they are passed."""

    def __init__(self, onward: Onward, token_ids: Tensor, batch: int) -> None:
        self._onward, self._left = onward, iter(token_ids.split(batch))
        self._first, self._held = 0, onward.clean(next(self._left))

    def of(self, first: int, last: int) -> Clean:
        """Those of contexts from first to last; those before the first are let go."""
        self._held, self._first = self._held.of(slice(first - self._first, None)), first
        while first + len(self._held.acts) <= last:
            self._held = self._held.followed_by(self._onward.clean(next(self._left)))
        return self._held.of(slice(last + 1 - first))
