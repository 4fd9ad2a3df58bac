"""What a thread makes ahead: the same chunks, no more of them than allowed, and its errors and its end."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.devices import no_check
from sae.jobs.prefetch import Chunk, ahead

CPU = torch.device("cpu")


class Chunks:
    """Numbered chunks; remembers how many were made, and by whom."""

    def __init__(self, numbers: Iterator[int], fails_at: int = -1) -> None:
        self._numbers, self._fails_at = numbers, fails_at
        self.n_made = 0
        self.maker: threading.Thread | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        number = next(self._numbers)
        self.maker = threading.current_thread()
        if number == self._fails_at:
            raise OSError("no such chunk")
        self.n_made += 1
        return torch.tensor([number]), no_check


@given(st.integers(0, 20), st.integers(1, 5))
def test_the_same_chunks_come_and_then_the_end(n: int, depth: int) -> None:
    assert [int(vectors) for vectors, _ in ahead(Chunks(iter(range(n))), CPU, depth)] == list(range(n))


@given(st.integers(1, 10), st.integers(1, 5))
def test_no_more_chunks_than_allowed_are_in_existence(used: int, depth: int) -> None:
    chunks = Chunks(count())
    made = ahead(chunks, CPU, depth)
    for number, _ in enumerate(islice(made, used)):
        # The chunks before this one are used up.
        assert number < chunks.n_made <= number + depth
    made.close()


@given(st.integers(0, 10))
def test_an_error_is_raised_in_its_place_and_ends_the_thread(place: int) -> None:
    chunks = Chunks(count(), fails_at=place)
    made = ahead(chunks, CPU)
    assert [int(vectors) for vectors, _ in islice(made, place)] == list(range(place))
    with pytest.raises(OSError, match="no such chunk"):
        next(made)
    assert chunks.maker is not None
    assert not chunks.maker.is_alive()


def test_closing_ends_the_thread_even_if_it_waits() -> None:
    chunks = Chunks(count())
    made = ahead(chunks, CPU)
    next(made)
    made.close()
    assert chunks.maker is not None
    assert chunks.maker is not threading.current_thread()
    assert not chunks.maker.is_alive()


@pytest.mark.gpu
def test_a_chunk_stays_as_it_was_made_until_it_is_used_up() -> None:
    """The next chunks are made while a slow reader is at work on another stream."""
    cuda, size, n = torch.device("cuda"), 1 << 22, 12
    weight = torch.eye(2048, device=cuda)

    def chunks() -> Iterator[Chunk]:
        for number in range(n):
            yield torch.full((size,), number, device=cuda) + torch.zeros(size, device=cuda), no_check

    sums: list[Tensor] = []
    for vectors, _ in ahead(chunks(), cuda):
        slow = vectors.view(-1, 2048)
        for _ in range(20):
            slow = slow @ weight
        sums.append(slow.min() + slow.max())
        del vectors, slow
    assert torch.stack(sums).tolist() == [2.0 * number for number in range(n)]
