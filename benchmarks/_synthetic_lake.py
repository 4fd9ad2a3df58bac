"""A lake that was never encoded: contexts of random tokens, and runs of latents with power-law densities.

Activations are bounded below, as top-k leaves them. Every run is made from its own seed, so that a lake grows.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae.jobs.cluster import cpu_count
from sae.jobs.encode import commit_run
from sae.jobs.lake import Lake, write_views
from sae.jobs.runs import Plan
from sae.schemas.tables import SCHEMAS
from sae.statistics import SortedRun

CONTEXT = 64
CORPUS = "synthetic"
VOCABULARY = 50_257
NAME = "zipf"
EXPONENT = 0.9
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """tokens of a run, latents of the autoencoder, latents a token."""

    run_tokens: int
    n_latents: int
    k: int

    def plan(self, n_runs: int) -> Plan:
        return Plan(0, n_runs * self.run_tokens // CONTEXT, self.run_tokens // CONTEXT)

    @property
    def encoding(self) -> dict[str, Any]:
        return {"checkpoint": "none", "seed": 0, "run_tokens": self.run_tokens, "bin_width": 0.2, "examples": 50}


def grow(path: str, shape: Shape, n_runs: int) -> None:
    """Add what a lake lacks to n_runs runs; contexts are those of all of them."""
    lake = Lake(path, create=True)
    with lake.transaction("synthetic") as transaction:
        transaction.remove(lake.snapshot().select("contexts"))
        transaction.remove(lake.snapshot().select("documents"))
        transaction.remove(lake.snapshot().select("vocabulary"))
        _write_corpus(transaction, shape.plan(n_runs).n_contexts)
        transaction.set(f"corpus/{CORPUS}", _corpus(shape.plan(n_runs).n_contexts))
        transaction.set(f"autoencoder/{NAME}", _autoencoder(shape))
    missing = [run for run in range(n_runs) if f"encode/{NAME}/{CORPUS}/{run}" not in lake.snapshot().units]
    with ProcessPoolExecutor(cpu_count()) as pool:
        for _ in pool.map(partial(_add, path, shape, n_runs), missing):
            pass
    write_views(lake)


def drawn(shape: Shape, run: int) -> tuple[Array, Array, Array, Array]:
    """Rows of a run in the order of tokens: atom, context_id, pos, act."""
    generator = np.random.default_rng(run)
    weights = np.arange(1, shape.n_latents + 1) ** -EXPONENT
    steps = np.cumsum(weights / weights.sum())
    # Which atom has which rank is the same in all runs.
    by_rank = np.random.default_rng(2**32).permutation(shape.n_latents)
    rank = np.searchsorted(steps, generator.random(shape.run_tokens * shape.k)).clip(max=shape.n_latents - 1)
    token = np.repeat(np.arange(shape.run_tokens), shape.k)
    key = np.sort((token << 32) | by_rank[rank])
    key = key[np.append(True, key[1:] != key[:-1])]
    token, atom = key >> 32, (key & 0xFFFFFFFF).astype(np.int32)
    act = (0.5 + generator.exponential(0.8, len(atom))).astype(np.float32)
    first = shape.plan(run + 1).bounds(run)[0]
    return atom, first + token // CONTEXT, token % CONTEXT, act


def _add(path: str, shape: Shape, n_runs: int, run: int) -> None:
    latents = SortedRun.from_rows(*drawn(shape, run))
    commit_run(Lake(path), NAME, CORPUS, shape.encoding, shape.plan(n_runs), run, latents, shape.run_tokens)


def _corpus(n_contexts: int) -> dict[str, Any]:
    counts = {"n_contexts": n_contexts, "n_documents": n_contexts, "n_tokens": n_contexts * CONTEXT}
    return {"number": 0, "complete": True, "context_length": CONTEXT, "made_with": {}, **counts}


def _autoencoder(shape: Shape) -> dict[str, Any]:
    subject = {"model": "none", "hook": "none", "masked_positions": [], "d_model": 1}
    return {**subject, "n_latents": shape.n_latents, "k": shape.k, "complete": True, "tokens": 0, "checkpoints": []}


def _write_corpus(transaction: Any, n_contexts: int) -> None:
    transaction.write("contexts", _contexts(n_contexts), corpus=CORPUS)
    every = np.arange(n_contexts)
    documents = {"doc_id": every, "source": ["synthetic"] * n_contexts, "external_id": every.astype(str)}
    documents["n_tokens"] = np.full(n_contexts, CONTEXT)
    transaction.write("documents", pa.table(documents).cast(SCHEMAS["documents"]), corpus=CORPUS)
    words = {"token_id": np.arange(VOCABULARY), "token": [f" w{number}" for number in range(VOCABULARY)]}
    transaction.write("vocabulary", pa.table(words).cast(SCHEMAS["vocabulary"]), corpus=CORPUS)


def _contexts(n_contexts: int, at_once: int = 65_536) -> Iterator[pa.Table]:
    for start in range(0, n_contexts, at_once):
        ids = np.arange(start, min(start + at_once, n_contexts))
        # The square makes small token ids the frequent ones.
        tokens = (np.random.default_rng(start).random(len(ids) * CONTEXT) ** 2 * VOCABULARY).astype(np.int32)
        lists = pa.ListArray.from_arrays(np.arange(len(ids) + 1, dtype=np.int32) * CONTEXT, tokens)
        columns = {"context_id": ids, "doc_id": ids, "start": np.zeros(len(ids)), "token_ids": lists}
        yield pa.table(columns).cast(SCHEMAS["contexts"])
