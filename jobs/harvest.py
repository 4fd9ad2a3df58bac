"""Step harvest: caches the subject's activations over a corpus, in half precision, for training.source: cached."""

import contextlib
import time
from typing import Any

import numpy as np
import torch

from sae.jobs import cluster, contexts, formats, progress, runs
from sae.jobs.activations import Live
from sae.jobs.lake import Lake
from sae.schemas.config import Run
from sae.schemas.errors import ConflictError, IncompleteError, SubjectError
from sae.subject import Subject


def run(config: Run) -> None:
    """Caches the runs that are not yet in the lake."""
    lake = Lake(config.lake)
    corpus = config.corpus.name
    contexts.state_of(lake.snapshot(), corpus, config.subject.model)
    subject = Subject.load(**config.subject.model_dump())
    owner = subject.fingerprint[:12]
    run_tokens = lake.snapshot().properties.get(f"harvest/{owner}", config.encode.run_tokens)
    plan, missing = runs.outstanding(lake.snapshot(), "harvest", owner, corpus, run_tokens)
    if not missing:
        progress.say(f"harvest: all {plan.n_runs} runs of {corpus} at {subject.hook} are cached")
        return
    state = lake.snapshot().properties[f"corpus/{corpus}"]
    lake.check_room(state["n_tokens"] * len(missing) // plan.n_runs * subject.width * np.dtype(np.float16).itemsize)
    with cluster.connected(config):
        rows = runs.each_run(
            config, "harvest", Harvester, (run_tokens, plan), config.cluster.harvest_actors, plan, missing
        )
    _, missing = runs.outstanding(lake.snapshot(), "harvest", owner, corpus, run_tokens)
    if missing:
        raise IncompleteError(f"harvest: {len(missing)} of {plan.n_runs} runs are still missing; run sae harvest again")
    progress.say(f"harvest: {rows:,} activations of width {subject.width} at {subject.place}")


class Harvester:
    """A Ray Data actor: holds the subject, turns run numbers into committed files of activations."""

    def __init__(self, config: Run, run_tokens: int, plan: runs.Plan, n_workers: int) -> None:
        self._config, self._run_tokens, self._plan = config, run_tokens, plan
        self._lake = Lake(config.lake)
        self._subject = Subject.load(**config.subject.model_dump(), device=cluster.use_device(n_workers))

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began, run = time.time(), int(batch["run"][0])
        corpus = contexts.load(self._lake, self._config.corpus.name, self._plan.bounds(run))
        batch_contexts = cluster.contexts_at_once(self._config.training.harvest_batch, corpus.width)
        live = Live(self._subject, corpus, batch_contexts)
        vectors = live.vectors(np.arange(len(corpus))).half()
        if not torch.isfinite(vectors).all():
            raise SubjectError(
                f"{self._subject.hook}: an activation is beyond 65504, the range of the cache's half precision; "
                "use training.source: live"
            )
        # Another attempt at this run may have been first, with the same rows.
        with contextlib.suppress(ConflictError):
            self._commit(run, corpus, vectors.cpu().numpy(), began)
        return {"run": [run], "tokens": [len(vectors)], "rows": [len(vectors)]}

    def _commit(self, run: int, corpus: contexts.Contexts, vectors: contexts.Array, began: float) -> None:
        owner, name = self._subject.fingerprint[:12], self._config.corpus.name
        at_row, pos = self._kept(corpus)
        context_id = corpus.context_id[at_row]
        named = {"corpus": name, "subject": owner, "run": run, "rows": len(vectors), "tokens": len(vectors)}
        with self._lake.transaction("harvest", runs.unit("harvest", owner, name, run), began) as transaction:
            runs.require_contexts(transaction, "harvest", name, self._plan, run)
            transaction.write_with(
                "activations",
                "arrow",
                lambda path: formats.write_vectors(context_id, pos, vectors, path),
                contexts=(int(corpus.context_id[0]), int(corpus.context_id[-1])),
                **named,
            )
            transaction.set(f"harvest/{owner}", self._run_tokens)

    def _kept(self, corpus: contexts.Contexts) -> tuple[contexts.Array, contexts.Array]:
        """Row and position of every kept token, in order."""
        lengths = corpus.lengths
        at_row = np.repeat(np.arange(len(corpus)), lengths)
        pos = np.arange(len(at_row)) - np.repeat(corpus.offsets[:-1], lengths)
        kept = ~np.isin(pos, self._config.subject.masked_positions)
        return at_row[kept], pos[kept].astype(np.uint16)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("harvest")
