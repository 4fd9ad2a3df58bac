"""Ranks over gloo for all tests of this folder: starting them costs more than most of what they do."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = not ray.is_initialized()
    if started:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        ray.init(address="local", num_cpus=2, object_store_memory=10**8, **quiet)
    made = Ranks()
    yield made
    made.end()
    if started:
        ray.shutdown()
