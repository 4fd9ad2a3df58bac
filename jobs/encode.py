"""Step encode: runs subject and autoencoder over a corpus, and writes each run's latents and partial statistics."""

import contextlib
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sae import device_statistics
from sae.jobs import checkpoints, cluster, contexts, progress, runs
from sae.jobs.activations import kept_activations
from sae.jobs.lake import Lake, Transaction, write_views
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, ConflictError, IncompleteError, LakeError
from sae.schemas.tables import SCHEMAS
from sae.statistics import Columns, RunStatistics
from sae.subject import Subject


def run(config: Run) -> None:
    """Encodes the runs that are not yet in the lake."""
    lake = Lake(config.lake)
    name, corpus = config.autoencoder.name, config.corpus.name
    contexts.state_of(lake.snapshot(), corpus, config.subject.model)
    encoding = _encoding(lake, config)
    plan, missing = runs.outstanding(lake.snapshot(), "encode", name, corpus, encoding["run_tokens"])
    if not missing:
        progress.say(f"encode: all {plan.n_runs} runs of {corpus} are in the lake")
        return
    with cluster.connected(config):
        n_actors = config.cluster.encode_actors
        rows = runs.each_run(config, "encode", Encoder, (encoding, plan), n_actors, plan, missing, overlap=True)
    _, missing = runs.outstanding(lake.snapshot(), "encode", name, corpus, encoding["run_tokens"])
    write_views(lake)
    if missing:
        raise IncompleteError(f"encode: {len(missing)} of {plan.n_runs} runs are still missing; run sae encode again")
    progress.say(f"encode: {rows:,} latents in {plan.n_runs} runs of {corpus}")


def _encoding(lake: Lake, config: Run) -> dict[str, Any]:
    """With what the autoencoder's latents are made; raises ConfigError where those in the lake were made otherwise."""
    snapshot = lake.snapshot()
    name = config.autoencoder.name
    checkpoints.check_made_with(checkpoints.state_of(snapshot, name), config, checkpoints.is_of_subject)
    encoding = {
        "checkpoint": checkpoints.identity(snapshot, name, config.encode.weights, config.encode.checkpoint),
        "seed": config.seed,
        **config.encode.model_dump(include={"run_tokens", "bin_width", "examples"}),
    }
    for key, known in snapshot.properties.get(f"encode/{name}", encoding).items():
        if encoding[key] != known:
            if key == "checkpoint":
                raise checkpoints.other_weights(snapshot, config, known)
            where = "seed" if key == "seed" else f"encode.{key}"
            raise ConfigError(
                f"{where}: the latents of {name} in {config.lake} were made with {known}, now it is {encoding[key]}; "
                f"keep {known}, or delete them with: sae drop {config.lake} --latents {name}"
            )
    return encoding


class Encoder:
    """A Ray Data actor for several threads: holds subject and autoencoder, turns run numbers into committed runs."""

    def __init__(self, config: Run, encoding: dict[str, Any], plan: runs.Plan, n_workers: int) -> None:
        device = cluster.use_device(n_workers)
        self._config, self._encoding, self._plan = config, encoding, plan
        name, chosen = config.autoencoder.name, (config.encode.weights, config.encode.checkpoint)
        self._lake = Lake(config.lake)
        self._subject = Subject.load(**config.subject.model_dump(), device=device)
        self._autoencoder = checkpoints.load(self._lake, name, *chosen).to(device)
        # Asked once they are loaded: weights can only be newer than the command's before that.
        if checkpoints.identity(self._lake.snapshot(), name, *chosen) != encoding["checkpoint"]:
            raise LakeError(f"autoencoder {name} was trained on meanwhile; run sae encode again")
        checkpoints.check_fit(self._autoencoder, self._subject, name)
        self._rounded_encoder = self._autoencoder.rounded_encoder()
        width = contexts.state_of(self._lake.snapshot(), config.corpus.name)["context_length"]
        self._contexts_at_once = cluster.contexts_at_once(config.encode.batch_contexts, width)
        # Of the whole corpus, not of what is missing: compiled or not, all its runs have the same bits.
        if cluster.worth_compiling(plan.n_contexts * width):
            self._subject = self._subject.compiled(self._contexts_at_once, width)
        # Held by the one call whose run is computed; the others write theirs.
        self._device = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began, run = time.time(), int(batch["run"][0])
        corpus = contexts.load(self._lake, self._config.corpus.name, self._plan.bounds(run))
        with self._device:
            tables = run_tables(self._latents(corpus), self._encoding)
        tokens = int(corpus.kept_tokens(self._config.subject.masked_positions).sum())
        # Another attempt at this run may have been first, with the same rows.
        with contextlib.suppress(ConflictError):
            name, corpus_name = self._config.autoencoder.name, self._config.corpus.name
            commit_tables(self._lake, name, corpus_name, self._encoding, self._plan, run, tables, tokens, began)
        return {"run": [run], "tokens": [tokens], "rows": [len(tables["latents"]["atom"])]}

    @torch.inference_mode()
    def _latents(self, corpus: contexts.Contexts) -> RunStatistics:
        found = device_statistics.RunBuilder(device_statistics.room(self._autoencoder.pre_bias.device))
        for start in range(0, len(corpus), self._contexts_at_once):
            rows = np.arange(start, min(start + self._contexts_at_once, len(corpus)))
            acts, (at_row, at_pos) = kept_activations(self._subject, corpus, rows)
            row, latent, value = self._autoencoder.nonzeros(acts.float(), self._rounded_encoder)
            context_id, pos = (
                torch.from_numpy(ids).to(row.device) for ids in (corpus.context_id[rows[at_row]], at_pos)
            )
            found.add(latent, context_id[row], pos[row], value)
        return found.sorted()


def commit_run(
    lake: Lake,
    name: str,
    corpus: str,
    encoding: dict[str, Any],
    plan: runs.Plan,
    run: int,
    latents: RunStatistics,
    tokens: int,
) -> None:
    """`commit_tables` of latents."""
    commit_tables(lake, name, corpus, encoding, plan, run, run_tables(latents, encoding), tokens)


def run_tables(latents: RunStatistics, encoding: dict[str, Any]) -> dict[str, Columns]:
    """The latents of a run and its partial statistics, by table, in host memory."""
    return {
        "latents": latents.rows(),
        "moments": latents.moments(),
        "histograms": latents.histogram(encoding["bin_width"]),
        "top": latents.top(encoding["examples"]),
        "samples": latents.samples(encoding["examples"], encoding["seed"]),
    }


def commit_tables(
    lake: Lake,
    name: str,
    corpus: str,
    encoding: dict[str, Any],
    plan: runs.Plan,
    run: int,
    tables: dict[str, Columns],
    tokens: int,
    began: float | None = None,
) -> None:
    """Commits what `run_tables` gave of a run of `tokens` kept tokens; see `Lake.transaction` for `began`.

    Raises ConflictError where the run is in the lake, LakeError where others were encoded otherwise meanwhile, or some
    of its contexts were dropped since the plan was made.
    """
    with lake.transaction("encode", runs.unit("encode", name, corpus, run), began) as transaction:
        runs.require_contexts(transaction, "encode", corpus, plan, run)
        base = transaction.base
        if base.properties.get(f"encode/{name}", encoding) != encoding:
            raise LakeError(f"encode: another command encodes with {name} in another way; let only one go on")
        write_tables(transaction, name, corpus, plan, run, tables, tokens)
        transaction.set(f"encode/{name}", encoding)
        if (mark := runs.drop_mark(name, corpus, run)) in base.properties:
            transaction.set(mark, None)


def write_tables(
    transaction: Transaction,
    name: str,
    corpus: str,
    plan: runs.Plan,
    run: int,
    tables: dict[str, Columns],
    tokens: int,
) -> None:
    """Adds one file of each table of a run of `tokens` kept tokens."""
    for table, columns in tables.items():
        schema = SCHEMAS[table]
        if "run" in schema.names:
            columns = {"run": np.full(len(columns["atom"]), run, np.int32), **columns}
        data = pa.table(columns).select(schema.names).cast(schema)
        named: dict[str, Any] = {"corpus": corpus, "autoencoder": name, "run": run, "tokens": tokens}
        transaction.write(table, data, contexts=plan.bounds(run), **named)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("encode")
