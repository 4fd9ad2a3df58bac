"""Steps of the command line whose Ray workers do their work in this process: nothing to start, the same lines.

That Ray's workers give the same rows and hand back the same errors is what tests/jobs asks of the steps.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import ray

from sae.jobs import cluster, progress, runs, train
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run


class _Task:
    """What `ray.remote` makes of a function: it is done when it is asked for, and its answer is the value itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **_: Any) -> "_Task":
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _remote(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _Task if function is None else _Task(function)


def _wait(pending: list[Any]) -> tuple[list[Any], list[Any]]:
    return pending[:1], pending[1:]


def _each_unit(
    config: Run,
    step: str,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    n_workers: int,
    sizes: Mapping[int, int],
    total: int,
    things: str,
    overlap: bool = False,
) -> int:
    working, rows = worker(config, *arguments, 1), 0
    with progress.bar(step, total, things, total - sum(sizes.values())) as bar:
        for unit, size in sizes.items():
            rows += working({"run": [unit]})["rows"][0]
            bar.advance(size)
    return rows


def _trained(config: Run, bar: progress.Bar, lake: Lake) -> None:
    for tokens, note in Trainer(config).train():
        bar.advance(tokens - bar.done, note)


@contextmanager
def without_ray() -> Iterator[None]:
    """For the length of the block no step starts Ray."""
    places: list[tuple[Any, str, Any]] = [
        (ray, "is_initialized", lambda: True),
        (ray, "remote", _remote),
        (ray, "get", lambda answer: answer),
        (ray, "wait", _wait),
        (ray, "nodes", lambda: [{"Alive": True, "Resources": {}}]),
        (cluster, "worker_options", lambda config, n_workers: {}),
        (runs, "each_unit", _each_unit),
        (train, "_trained", _trained),
    ]
    with ExitStack() as stack:
        for module, name, instead in places:
            stack.enter_context(patch.object(module, name, instead))
        yield
