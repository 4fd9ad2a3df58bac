"""Whoever watches the ranks of a training notices that they stand still, not only that they die."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

from sae.jobs import ranks
from sae.jobs.ranks import Lost, Reports
from sae.schemas.errors import ConfigError
from tests.in_process import run_of
from tests.tiny_run import Lab


class Stuck:
    """A rank that makes one step and waits for ever, as in a collective that another one never joins."""

    def address(self) -> str:
        return ""

    def train(self, address: str) -> Iterator[tuple[int, str]]:
        yield 1, address
        threading.Event().wait()


def test_a_torch_without_nccl_is_told_before_ranks_look_for_each_other(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    told = "^cluster: tp and dp on GPUs need a torch with NCCL, which this one lacks; install another$"
    config = run_of(lab, cluster__dp=2)
    with pytest.raises(ConfigError, match=told), ranks.joined(config, 0, 2, "tcp://127.0.0.1:1"):
        pass


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
