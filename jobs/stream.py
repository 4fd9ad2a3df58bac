"""The order in which training sees tokens: a pure function of the seed, so that any position can be resumed.

Each epoch permutes the contexts, cuts them into chunks of about `buffer_tokens` tokens, and shuffles the tokens of a
chunk. Batches are consecutive slices of that stream, across chunks and epochs; a position is a number of tokens.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae.devices import no_check, send
from sae.jobs.activations import Source
from sae.jobs.prefetch import Chunk, ahead

Array = npt.NDArray[Any]


class TokenStream:
    """Batches [batch_tokens, d] of activations of the given contexts, for ever."""

    def __init__(self, source: Source, rows: Array, kept: Array, batch: int, buffer: int, *seed: int) -> None:
        """`rows` are the contexts to train on, `kept` [len(rows)] how many tokens each gives."""
        self._source, self._batch, self._buffer, self._seed = source, batch, buffer, seed
        self._latest: tuple[tuple[int, int], Chunk] | None = None
        useful = kept > 0
        self._rows, self._kept = rows[useful], kept[useful]

    @property
    def epoch_tokens(self) -> int:
        return int(self._kept.sum())

    def batches(self, position: int = 0, overlap: torch.device | None = None) -> Generator[Tensor, None, None]:
        """Batches from a position, in tokens, on.

        With `overlap` a thread makes the next chunk, on that device, while the present one is in use: close the
        iterator to end it, and let nothing else read from this stream meanwhile.
        """
        chunks = self._chunks(*divmod(position, self.epoch_tokens))
        if overlap is not None:
            chunks = ahead(chunks, overlap)
        with closing(chunks):
            yield from self._cut(chunks)

    def _cut(self, chunks: Iterator[Chunk]) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        missing = self._batch
        for vectors, check in chunks:
            check()
            if len(vectors) < missing:
                waiting.append(vectors)
                missing -= len(vectors)
                continue
            yield torch.cat([*waiting, vectors[:missing]])
            starts = range(missing, len(vectors) - self._batch + 1, self._batch)
            for start in starts:
                yield vectors[start : start + self._batch]
            # A copy, so that the memory of the chunk becomes free.
            waiting = [vectors[missing + len(starts) * self._batch :].clone()]
            missing = self._batch - len(waiting[0])
            del vectors

    def _chunks(self, epoch: int, skip: int) -> Generator[Chunk, None, None]:
        while True:
            rows, ends = self._epoch(epoch)
            for number, (start, stop) in enumerate(self._cuts(ends)):
                before = int(ends[start - 1]) if start else 0
                n_tokens = int(ends[stop - 1]) - before
                if skip < n_tokens:
                    vectors, check = self._shuffled(rows[start:stop], epoch, number)
                    yield vectors[skip:], check
                    del vectors
                skip = max(0, skip - n_tokens)
            epoch += 1

    def _epoch(self, epoch: int) -> tuple[Array, Array]:
        """The epoch's order of contexts, and the tokens seen at the end of each."""
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._rows))
        return self._rows[order], np.cumsum(self._kept[order])

    def _cuts(self, ends: Array) -> Iterator[tuple[int, int]]:
        n_chunks = max(1, round(int(ends[-1]) / self._buffer))
        marks = np.searchsorted(ends, np.arange(1, n_chunks + 1) * (int(ends[-1]) / n_chunks) - 0.5) + 1
        marks = np.unique(np.append(np.minimum(marks, len(ends)), len(ends)))
        yield from zip(np.concatenate([[0], marks[:-1]]).tolist(), marks.tolist(), strict=True)

    def _shuffled(self, rows: Array, epoch: int, chunk: int) -> Chunk:
        # The first chunk is asked for twice: to start from, and to train on.
        if self._latest is None or self._latest[0] != (epoch, chunk):
            self._latest = None  # frees the memory of the chunk before
            self._latest = (epoch, chunk), self._made(rows, epoch, chunk)
        return self._latest[1]

    def _made(self, rows: Array, epoch: int, chunk: int) -> Chunk:
        vectors, check = self._source.launch(rows)
        order = np.random.default_rng([*self._seed, epoch, chunk]).permutation(len(vectors))
        return vectors[send(torch.from_numpy(order), vectors.device)], check


class Lanes:
    """Batches that each of several ranks reads its own rows of.

    The contexts are dealt out to lanes, each a stream of its own; a batch is as many rows of each, lane after lane. So
    the batches depend on the number of lanes and not on that of ranks, and a rank runs the subject on little more than
    what it gives: on nothing more where ranks divide lanes or are as many.
    """

    def __init__(
        self,
        source: Source,
        rows: Array,
        kept: Array,
        *,
        batch: int,
        buffer: int,
        seed: int,
        n_lanes: int = 1,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        """`rows` and `kept` as of TokenStream; batch and buffer are those of all lanes, which divide them."""
        self._n_lanes = min(n_lanes, int((kept > 0).sum()))
        while batch % self._n_lanes:
            self._n_lanes -= 1
        self.epoch_tokens, self._of_lane = int(kept.sum()), batch // self._n_lanes
        self._useful, self._kept = rows[kept > 0], kept[kept > 0]
        share = batch // n_ranks
        first, last = rank * share, (rank + 1) * share
        numbers = range(first // self._of_lane, -(-last // self._of_lane))
        self._cuts = [
            slice(max(first - lane * self._of_lane, 0), min(last - lane * self._of_lane, self._of_lane))
            for lane in numbers
        ]
        each = max(1, buffer // self._n_lanes)
        self._streams = [self._lane(source, lane, each, seed) for lane in numbers]

    def _lane(self, source: Source, lane: int, buffer: int, seed: int) -> TokenStream:
        rows, kept = (values[lane :: self._n_lanes] for values in (self._useful, self._kept))
        named = () if self._n_lanes == 1 else (lane,)
        return TokenStream(source, rows, kept, self._of_lane, buffer, seed, *named)

    def batches(self, position: int = 0, overlap: torch.device | None = None) -> Generator[Tensor, None, None]:
        """This rank's rows of each batch, from a position of whole batches, in tokens, on; see TokenStream.batches."""
        at = position // self._n_lanes
        if len(self._streams) == 1:
            with closing(self._streams[0].batches(at, overlap)) as batches:
                for rows in batches:
                    yield rows[self._cuts[0]]
            return
        # The lanes take turns with the subject: one thread makes the batches of all.
        made: Generator[Chunk, None, None] = self._together(at)
        if overlap is not None:
            made = ahead(made, overlap)
        with closing(made):
            for rows, _ in made:
                yield rows

    def _together(self, position: int) -> Generator[Chunk, None, None]:
        streams = [stream.batches(position) for stream in self._streams]
        try:
            for parts in zip(*streams, strict=True):
                yield torch.cat([rows[cut] for rows, cut in zip(parts, self._cuts, strict=True)]), no_check
        finally:
            for stream in streams:
                stream.close()


def held_out(doc_id: Array, fraction: float, seed: int) -> Array:
    """bool [c]: contexts held out for validation, whole documents drawn at random, at least one.

    A corpus of fewer than ten documents is split by context instead.
    """
    if fraction == 0.0:
        return np.zeros(len(doc_id), bool)
    documents, inverse = np.unique(doc_id, return_inverse=True)
    if len(documents) < 10:
        documents, inverse = np.arange(len(doc_id)), np.arange(len(doc_id))
    draws = np.random.default_rng([seed, len(documents)]).random(len(documents))
    chosen = draws < fraction
    chosen[np.argmin(draws)] = True
    return chosen[inverse]
