"""Runs: a corpus cut into ranges of contexts, each a unit of work that any worker can do, once or again."""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayError

from sae.jobs import cluster, progress, ranges
from sae.jobs.lake import Range, Snapshot, Transaction
from sae.schemas import errors
from sae.schemas.config import Run
from sae.schemas.errors import LakeError, SaeError
from sae.schemas.tables import CORPUS_SHIFT


@dataclass(frozen=True)
class Plan:
    """How a corpus is cut: runs of `contexts_per_run` contexts, the last one shorter.

    Contexts that were dropped still count: what a run is called and where it begins never changes.
    """

    corpus_number: int
    n_contexts: int
    contexts_per_run: int
    dropped: tuple[Range, ...] = ()

    @property
    def n_runs(self) -> int:
        return -(-self.n_contexts // self.contexts_per_run)

    def size(self, run: int) -> int:
        """Contexts of a run."""
        return min(self.contexts_per_run, self.n_contexts - run * self.contexts_per_run)

    def bounds(self, run: int) -> tuple[int, int]:
        """First and last context_id of a run, both included."""
        first = run * self.contexts_per_run
        last = first + self.size(run) - 1
        base = self.corpus_number << CORPUS_SHIFT
        return base + first, base + last

    def left(self, run: int) -> list[Range]:
        """Ranges of the run's contexts that were not dropped."""
        return ranges.without(self.bounds(run), self.dropped)

    def holds(self, snapshot: Snapshot, corpus: str, run: int) -> bool:
        """Whether the corpus is still there, and of this run just what was when the plan was made."""
        state = snapshot.properties.get(f"corpus/{corpus}")
        if state is None or state["number"] != self.corpus_number:
            return False
        return ranges.without(self.bounds(run), dropped_contexts(snapshot, corpus)) == self.left(run)


def unit(step: str, owner: str, corpus: str, run: int) -> str:
    """Name of a run's unit of work; the owner is an autoencoder or a subject."""
    return f"{step}/{owner}/{corpus}/{run}"


def outstanding(snapshot: Snapshot, step: str, owner: str, corpus: str, run_tokens: int) -> tuple[Plan, list[int]]:
    """How a tokenized corpus is cut for a step and owner, and the runs that are not in the lake.

    A run whose contexts were all dropped is not missing.
    """
    state = snapshot.properties[f"corpus/{corpus}"]
    dropped = dropped_contexts(snapshot, corpus)
    n_contexts = state["n_contexts"] + ranges.size(dropped)
    plan = Plan(state["number"], n_contexts, max(1, run_tokens // state["context_length"]), dropped)
    missing = (run for run in range(plan.n_runs) if unit(step, owner, corpus, run) not in snapshot.units)
    return plan, [run for run in missing if plan.left(run)]


def dropped_contexts(snapshot: Snapshot, corpus: str) -> tuple[Range, ...]:
    """Ranges of contexts that were taken out of a corpus for good."""
    state = snapshot.properties.get(f"corpus/{corpus}", {})
    return tuple((low, high) for low, high in state.get("dropped", []))


def require_contexts(transaction: Transaction, step: str, corpus: str, plan: Plan, run: int) -> None:
    """Raises LakeError unless the run's contexts are those of the plan, and lets nothing be committed once they go."""
    if not plan.holds(transaction.base, corpus, run):
        raise LakeError(f"{step}: contexts of {corpus} were dropped meanwhile; run sae {step} again")
    key = f"corpus/{corpus}"
    state = transaction.base.properties[key]
    transaction.require(lambda now: now.properties.get(key) == state, f"{key}: changed")


def drop_mark(owner: str, corpus: str, run: int) -> str:
    """The property that tells a run which was dropped from one that was never encoded."""
    return f"dropped/{owner}/{corpus}/{run}"


class _Worker:
    """Makes the worker at its first run, and hands back its errors as rows: Ray Data would keep only their text."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._make = functools.partial(worker, *arguments)
        self._making = threading.Lock()

    @functools.cached_property
    def _worker(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        made: Callable[[dict[str, Any]], dict[str, Any]] = self._make()
        return made

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            with self._making:
                worker = self._worker
            return {**worker(batch), "error": [""], "message": [""]}
        except SaeError as error:
            nothing = {"run": batch["run"], "tokens": [0], "rows": [0]}
            return {**nothing, "error": [type(error).__name__], "message": [str(error)]}


def each_run(
    config: Run,
    step: str,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    n_workers: int,
    plan: Plan,
    missing: list[int],
    overlap: bool = False,
) -> int:
    """Does the missing runs with a pool of Ray Data actors; returns the rows that were written.

    `worker(config, *arguments, n_workers)` is called on {"run": [i]} and gives {"run", "tokens", "rows"}, a value each;
    with `overlap` by several threads, so that one run can be computed while others are written. A worker that dies is
    replaced and its runs done again.
    """
    sizes = {run: plan.size(run) for run in missing}
    return each_unit(config, step, worker, arguments, n_workers, sizes, plan.n_contexts, "contexts", overlap)


def each_unit(
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
    """As `each_run`, for units of work that are given by number, with how many of the `total` things each has."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    n_workers = min(n_workers, len(sizes))
    rows = 0
    try:
        done = ray.data.from_items([{"run": unit} for unit in sizes], override_num_blocks=len(sizes)).map_batches(
            _Worker,
            fn_constructor_args=(worker, (config, *arguments, n_workers)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=n_workers,
                max_concurrent_calls_per_actor=cluster.runs_at_once(config) if overlap else 1,
                enable_true_multi_threading=overlap,
            ),
            **cluster.worker_options(config, n_workers),
        )
        with progress.bar(step, total, things, total - sum(sizes.values())) as bar:
            for row in done.iter_rows():
                if row["error"]:
                    raise cast(SaeError, getattr(errors, row["error"])(row["message"]))
                rows += row["rows"]
                bar.advance(sizes[row["run"]])
    except RayError as error:
        raise cluster.cause(error) from None
    return rows
