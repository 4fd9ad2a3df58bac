"""Training sees every token once an epoch, in an order that can be resumed anywhere."""

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.devices import Check, no_check
from sae.jobs.stream import Lanes, TokenStream, held_out
from sae.schemas.errors import SubjectError

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Numbered:
    """A source whose activations tell which token they are: rows [context, position]."""

    kept: Array

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        pairs = [(row, pos) for row in rows.tolist() for pos in range(self.kept[row])]
        return torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2), no_check


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Array, Array]:
    """Kept tokens of each context, some with none, and the contexts that are trained on."""
    kept = draw(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any))
    chosen = draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))
    rows = np.flatnonzero(chosen)
    lengths = np.array(kept)
    return lengths, rows if lengths[rows].sum() else np.arange(len(kept))


CPU = torch.device("cpu")
SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 100)


def stream(corpus: tuple[Array, Array], batch: int, buffer: int, seed: int) -> TokenStream:
    kept, rows = corpus
    return TokenStream(Numbered(kept), rows, kept[rows], batch, buffer, seed)


def tokens(batches: Iterator[Tensor], n: int) -> list[tuple[float, ...]]:
    """The first n tokens of a stream."""
    flat = itertools.chain.from_iterable(batch.tolist() for batch in batches)
    return [tuple(token) for token in itertools.islice(flat, n)]


@given(corpora(), SIZES, SIZES, SEEDS)
def test_every_kept_token_comes_once_an_epoch(corpus: tuple[Array, Array], batch: int, buffer: int, seed: int) -> None:
    kept, rows = corpus
    everything = sorted((row, pos) for row in rows.tolist() for pos in range(kept[row]))
    made = stream(corpus, batch, buffer, seed)
    assert made.epoch_tokens == len(everything)
    seen = tokens(made.batches(), 3 * len(everything))
    for epoch in range(3):
        assert sorted(seen[epoch * len(everything) :][: len(everything)]) == everything


@given(corpora(), SIZES, SIZES, SEEDS, st.integers(0, 300))
def test_from_any_position_on_comes_what_a_stream_from_the_start_gives_there(
    corpus: tuple[Array, Array], batch: int, buffer: int, seed: int, position: int
) -> None:
    made = stream(corpus, batch, buffer, seed)
    whole = tokens(made.batches(), position + 60)
    assert tokens(made.batches(position), 60) == whole[position:]


@given(corpora(), SIZES, SIZES, SEEDS)
def test_all_batches_are_full(corpus: tuple[Array, Array], batch: int, buffer: int, seed: int) -> None:
    sizes = {len(part) for part in itertools.islice(stream(corpus, batch, buffer, seed).batches(), 10)}
    assert sizes == {batch}


@given(corpora(), SIZES, st.integers(41, 80), SIZES, SEEDS)
def test_batch_size_does_not_change_the_order(
    corpus: tuple[Array, Array], batch: int, other: int, buffer: int, seed: int
) -> None:
    assert tokens(stream(corpus, batch, buffer, seed).batches(), 100) == tokens(
        stream(corpus, other, buffer, seed).batches(), 100
    )


@given(corpora(), SIZES, SIZES, SEEDS, st.integers(0, 300))
def test_a_stream_made_ahead_is_the_same_stream(
    corpus: tuple[Array, Array], batch: int, buffer: int, seed: int, position: int
) -> None:
    made = stream(corpus, batch, buffer, seed)
    expected = tokens(made.batches(position), 100)
    with closing(made.batches(position, CPU)) as batches:
        assert tokens(batches, 100) == expected


@dataclass(frozen=True)
class Doubtful(Numbered):
    """Its check finds fault with the context of number `bad`."""

    bad: int

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        def check() -> None:
            if self.bad in rows:
                raise SubjectError("NaN")

        return super().launch(rows)[0], check


@pytest.mark.parametrize("overlap", [None, torch.device("cpu")])
def test_no_token_of_a_chunk_that_fails_its_check_is_given(overlap: torch.device | None) -> None:
    kept = np.full(30, 8)
    made = TokenStream(Doubtful(kept, bad=17), np.arange(30), kept, 8, 40, 0)
    seen: list[float] = []
    with pytest.raises(SubjectError, match="NaN"):
        seen.extend(float(token) for batch in made.batches(0, overlap) for token in batch[:, 0])
    assert seen
    assert 17 not in seen
    assert len(seen) % 40 == 0


def test_buffer_bounds_how_far_tokens_are_shuffled_and_what_is_held() -> None:
    """Consecutive chunks of about the buffer's size hold whole contexts, each shuffled over its chunk."""
    corpus = np.full(100, 8), np.arange(100)
    for buffer in (8, 80, 800):
        seen = tokens(stream(corpus, 8, buffer, 0).batches(), 800)
        chunks = [seen[start : start + buffer] for start in range(0, 800, buffer)]
        assert [len({row for row, _ in chunk}) for chunk in chunks] == [buffer // 8] * (800 // buffer)
        spread = [abs(seen[i][0] - seen[i + 1][0]) > 0 for i in range(799)]
        assert (np.mean(spread) > 0.5) == (buffer > 8)


def test_seeds_and_epochs_give_other_orders() -> None:
    corpus = np.full(20, 5), np.arange(20)
    first, second = (tokens(stream(corpus, 10, 50, seed).batches(), 200) for seed in (0, 1))
    assert first != second
    assert first[:100] != first[100:]


@dataclass(frozen=True)
class Lists(Numbered):
    """It also remembers what it was asked for."""

    asked: list[int] = field(default_factory=list)

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        self.asked.extend(rows.tolist())
        return super().launch(rows)


@dataclass(frozen=True)
class Reading:
    """How ranks read a corpus in lanes."""

    corpus: tuple[Array, Array]
    batch: int
    buffer: int
    seed: int
    n_lanes: int
    n_ranks: int

    def by(self, rank: int = 0, n_ranks: int = 1, source: Numbered | None = None) -> Lanes:
        kept, rows = self.corpus
        return Lanes(
            source or Numbered(kept), rows, kept[rows], batch=self.batch, buffer=self.buffer, seed=self.seed,
            n_lanes=self.n_lanes, rank=rank, n_ranks=n_ranks,
        )  # fmt: skip

    @property
    def lanes(self) -> int:
        """As many as asked for, if there are as many contexts with a token, and they divide a batch."""
        kept, rows = self.corpus
        most = min(self.n_lanes, int((kept[rows] > 0).sum()))
        return max(n for n in range(1, most + 1) if self.batch % n == 0)


@st.composite
def readings(draw: st.DrawFn) -> Reading:
    n_ranks = draw(st.integers(1, 6))
    batch = n_ranks * draw(st.integers(1, 8))
    return Reading(draw(corpora()), batch, draw(SIZES), draw(SEEDS), draw(st.integers(1, 9)), n_ranks)


def first(batches: Iterator[Tensor], n: int) -> list[list[list[float]]]:
    return [batch.tolist() for batch in itertools.islice(batches, n)]


@given(readings(), st.integers(0, 20))
def test_ranks_give_together_what_one_rank_reads_from_any_step_on(reading: Reading, step: int) -> None:
    whole = first(reading.by().batches(), step + 5)[step:]
    parts = [
        first(reading.by(rank, reading.n_ranks).batches(step * reading.batch), 5) for rank in range(reading.n_ranks)
    ]
    assert [list(itertools.chain.from_iterable(of_ranks)) for of_ranks in zip(*parts, strict=True)] == whole
    assert {len(rows) for part in parts for rows in part} == {reading.batch // reading.n_ranks}


@given(readings())
def test_every_lane_gives_each_of_its_tokens_once_an_epoch(reading: Reading) -> None:
    kept, rows = reading.corpus
    batches, of_lane, seen = reading.by().batches(), reading.batch // reading.lanes, []
    made = first(batches, -(-2 * int(kept[rows].sum()) // of_lane))
    for lane in range(reading.lanes):
        given = [tuple(token) for batch in made for token in batch[lane * of_lane : (lane + 1) * of_lane]]
        contexts = sorted({int(row) for row, _ in given})
        everything = [(row, pos) for row in contexts for pos in range(kept[row])]
        for epoch in range(2):
            assert sorted(given[epoch * len(everything) :][: len(everything)]) == everything
        seen += everything
    assert sorted(seen) == [(row, pos) for row in sorted(rows.tolist()) for pos in range(kept[row])]


@given(readings())
def test_a_rank_runs_the_subject_for_its_own_lanes_only(reading: Reading) -> None:
    sources = [Lists(reading.corpus[0]) for _ in range(reading.n_ranks)]
    for rank, source in enumerate(sources):
        first(reading.by(rank, reading.n_ranks, source).batches(), 5)
    readers = [sum(row in source.asked for source in sources) for row in reading.corpus[1].tolist()]
    share, of_lane = reading.batch // reading.n_ranks, reading.batch // reading.lanes
    assert max(readers) <= -(-of_lane // share) + (of_lane % share > 0)
    if reading.lanes % reading.n_ranks == 0:
        assert max(readers) == 1


@given(readings(), st.integers(0, 20))
def test_lanes_made_ahead_are_the_same_lanes(reading: Reading, step: int) -> None:
    rank = reading.n_ranks - 1
    position = step * reading.batch
    expected = first(reading.by(rank, reading.n_ranks).batches(position), 8)
    with closing(reading.by(rank, reading.n_ranks).batches(position, CPU)) as batches:
        assert first(batches, 8) == expected


def test_the_buffer_is_shared_by_the_lanes() -> None:
    corpus = np.full(64, 8), np.arange(64)
    source = Lists(corpus[0])
    next(Reading(corpus, 32, 128, 0, 4, 1).by(source=source).batches())
    assert len(source.asked) * 8 == 128


@pytest.mark.parametrize("overlap", [None, torch.device("cpu")])
@pytest.mark.parametrize("n_lanes", [1, 3])
def test_lanes_give_no_token_of_a_chunk_that_fails_its_check(overlap: torch.device | None, n_lanes: int) -> None:
    kept = np.full(30, 8)
    source = Doubtful(kept, bad=17)
    made = Lanes(source, np.arange(30), kept, batch=12, buffer=60, seed=0, n_lanes=n_lanes)
    seen: list[float] = []
    with pytest.raises(SubjectError, match="NaN"):
        seen.extend(float(token) for batch in made.batches(0, overlap) for token in batch[:, 0])
    assert seen
    assert 17 not in seen


DOCUMENTS = st.lists(st.integers(1, 5), min_size=10, max_size=60).map(
    lambda lengths: np.repeat(np.arange(len(lengths)) * 3, lengths)
)


@given(DOCUMENTS, st.floats(0.01, 0.9), SEEDS)
def test_held_out_documents_never_straddle(doc_id: Array, fraction: float, seed: int) -> None:
    mask = held_out(doc_id, fraction, seed)
    assert mask.any()
    assert not set(doc_id[mask]) & set(doc_id[~mask])
    assert (held_out(doc_id, fraction, seed) == mask).all()


@given(DOCUMENTS, SEEDS)
def test_nothing_is_held_out_when_nothing_is_asked_for(doc_id: Array, seed: int) -> None:
    assert not held_out(doc_id, 0.0, seed).any()


def test_about_the_fraction_is_held_out() -> None:
    doc_id = np.repeat(np.arange(10_000), 2)
    # Five standard deviations of a binomial count of 10,000 draws.
    assert abs(held_out(doc_id, 0.1, 0).mean() - 0.1) < 5 * 0.003


@given(st.integers(2, 30), st.floats(0.01, 0.5), SEEDS)
def test_a_corpus_of_one_document_is_split_by_context(n: int, fraction: float, seed: int) -> None:
    assert held_out(np.zeros(n, np.int64), fraction, seed).any()
