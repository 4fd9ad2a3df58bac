"""Ranks that run by themselves end after the same step, and soon."""

import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from sae.jobs.halt import Halt


def run(halt: Halt, paces: list[int], lead: threading.Semaphore, behind: threading.Semaphore) -> int:
    """Steps until told to end; a step takes as many turns of the interpreter as its pace says. The last step."""
    step = 0
    while True:
        step += 1
        lead.acquire()
        halt.begin(step)
        for _ in range(paces[step % len(paces)]):
            threading.Event().wait(0)
        last = halt.is_last(step)
        behind.release()
        if last:
            return step


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=2, max_size=2), st.integers(0, 40))
def test_ranks_end_after_one_step_that_none_had_begun(paces: list[list[int]], turns: int) -> None:
    """One may be a step ahead of the other, as far as a collective lets it."""
    halts = [Halt(), Halt()]
    tokens = [threading.Semaphore(2), threading.Semaphore(2)]
    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(run, halts[rank], paces[rank], tokens[rank], tokens[1 - rank]) for rank in range(2)]
        for _ in range(turns):
            threading.Event().wait(0)
        reached = max(halt.hold() for halt in halts)
        for halt in halts:
            halt.end_after(reached + 1)
        assert [one.result(timeout=30) for one in ended] == [reached + 1] * 2


def test_a_rank_that_has_not_begun_ends_after_its_first_step() -> None:
    halt = Halt()
    assert halt.hold() == 0
    halt.end_after(1)
    halt.begin(7)
    assert halt.is_last(7)


def test_a_rank_that_nobody_stops_goes_on() -> None:
    halt = Halt()
    for step in range(1, 5):
        halt.begin(step)
        assert not halt.is_last(step)
    assert halt.hold() == 4
