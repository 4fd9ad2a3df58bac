"""Whoever watches the ranks of a training notices that they stand still, not only that they die."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import ray

from sae.jobs import ranks
from sae.jobs.ranks import Lost, Reports


class Stuck:
    """A rank that makes one step and waits for ever, as in a collective that another one never joins."""

    def address(self) -> str:
        return ""

    def train(self, address: str) -> Iterator[tuple[int, str]]:
        yield 1, address
        threading.Event().wait()


def test_ranks_that_nothing_is_heard_of_are_lost(one_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = ray.remote(Stuck)
    actor = made.options(num_cpus=0, max_concurrency=2).remote()
    try:
        reports = Reports([actor])
        assert next(reports) == (1, "")
        monkeypatch.setattr(ranks, "_APART", timedelta(seconds=1))
        with pytest.raises(Lost, match="nothing was heard of any rank for 0:00:01"):
            next(reports)
    finally:
        ray.kill(actor)
