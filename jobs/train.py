"""Step train: a Ray actor trains the autoencoder from batches of activations and commits checkpoints to the lake."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError, RayError
from torch import Tensor

from sae.activations import ReLU, TopK
from sae.initialise import initialise
from sae.jobs import checkpoints, cluster, contexts, progress
from sae.jobs.activations import Cached, Live
from sae.jobs.lake import Lake, Snapshot, write_views
from sae.jobs.loggers import Logger
from sae.jobs.stream import TokenStream, held_out
from sae.metrics import reconstruction
from sae.model import Autoencoder
from sae.schedule import learning_rate
from sae.schemas.config import Run
from sae.schemas.errors import AutoencoderError, ConflictError, CorpusError, IncompleteError
from sae.schemas.tables import METRICS
from sae.subject import Subject
from sae.training import StepConfig, TrainStep

_SAMPLE_ROWS: Final = 32_768
_LOGGED_STEPS: Final = 10_000
_REPORT_EVERY_S: Final = 0.5
# Compiling takes about half a minute, in which a GPU trains on as many tokens of a small model.
_COMPILE_FROM_TOKENS: Final = 50_000_000


def run(config: Run) -> None:
    """Trains to training.tokens, from the last checkpoint if there is one."""
    lake = Lake(config.lake)
    name = config.autoencoder.name
    contexts.state_of(lake.snapshot(), config.corpus.name, config.subject.model)
    state = _known_state(lake.snapshot(), config)
    total = n_steps(config) * config.training.batch_tokens
    if state is not None and state["tokens"] >= total:
        if not state["complete"]:  # it was interrupted, and training.tokens lowered since
            with lake.transaction("train") as transaction:
                transaction.set(f"autoencoder/{name}", {**state, "complete": True})
        progress.say(f"train: {name} is trained on {state['tokens']:,} tokens")
        return
    with (
        cluster.connected(config),
        progress.bar("train", total, "tokens", state["tokens"] if state else 0) as bar,
    ):
        report = _follow(config, bar)
    write_views(lake)
    if lake.snapshot().properties[f"autoencoder/{name}"]["tokens"] < total:
        raise IncompleteError(f"train: {name} stopped before {total:,} tokens; run sae train again to go on")
    progress.say(f"train: {name}, {total:,} tokens; held out: {report}")


def n_steps(config: Run) -> int:
    return -(-config.training.tokens // config.training.batch_tokens)


def _follow(config: Run, bar: progress.Bar) -> str:
    """Runs the actor and shows its reports; an interrupt lets it save a checkpoint first."""
    trainer: Any = ray.remote(Trainer).options(max_concurrency=2, **cluster.worker_options(config, 1)).remote(config)
    reports = trainer.train.options(num_returns="streaming").remote()
    note = ""
    try:
        try:
            for reference in reports:
                tokens, note = ray.get(reference)
                bar.advance(tokens - bar.done, note)
        except KeyboardInterrupt:
            progress.say("train: interrupted, saving a checkpoint")
            ray.get(trainer.stop.remote())
            for reference in reports:
                ray.get(reference)
            raise
    except RayActorError as error:
        raise IncompleteError(
            f"train: the training worker died ({cluster.first_line(error)}); "
            "run sae train again to go on from the last checkpoint"
        ) from None
    except RayError as error:
        raise cluster.cause(error) from None
    return note


def _known_state(snapshot: Snapshot, config: Run) -> dict[str, Any] | None:
    """The autoencoder's property in the lake, if any, checked against the config."""
    state: dict[str, Any] | None = snapshot.properties.get(f"autoencoder/{config.autoencoder.name}")
    if state is None:
        return None
    checkpoints.check_made_with(state, config, lambda key: True)
    return state


class Trainer:
    """The training actor: harvests, trains, validates, commits. A resumed run gives the same bits on a CPU."""

    def __init__(self, config: Run) -> None:
        self._config, self._lake = config, Lake(config.lake)
        self._device = cluster.use_device(1)
        self._on_gpu = self._device != "cpu"
        self._stopping = False

    def stop(self) -> None:
        """Makes `train` end after the present step, with a checkpoint."""
        self._stopping = True

    def train(self) -> Iterator[tuple[int, str]]:
        """Yields (tokens seen, a note) about twice a second and after the last step."""
        config = self._config
        self._prepare()
        state = _known_state(self._lake.snapshot(), config)
        self._checkpoints: list[Any] = state["checkpoints"] if state else []
        position = state["tokens"] if state else 0
        mse_scale = state["mse_scale"] if state else self._initialise()
        self._step = TrainStep(self._autoencoder, _step_config(config, mse_scale))
        if state:
            last = self._lake.snapshot().files[state["checkpoints"][-1]["state"]]
            self._step.load_state_dict(checkpoints.read_tensors(self._lake, last))
        yield from self._loop(position, mse_scale)

    def _prepare(self) -> None:
        config = self._config
        corpus = contexts.load(self._lake, config.corpus.name)
        subject = Subject.load(**config.subject.model_dump(), device=self._device)
        live = config.training.source == "live"
        if live and self._on_gpu and config.training.tokens >= _COMPILE_FROM_TOKENS:
            subject = subject.compiled(config.training.harvest_batch, corpus.width)
        source = (
            Live(subject, corpus, config.training.harvest_batch)
            if live
            else Cached(self._lake, corpus, config.corpus.name, subject)
        )
        kept = corpus.kept_tokens(config.subject.masked_positions)
        validation = held_out(corpus.doc_id, config.training.validation, config.seed)
        rows = np.flatnonzero(~validation)
        if kept[rows].sum() == 0:
            raise CorpusError(
                f"corpus {config.corpus.name}: no token is left to train on once {config.training.validation:.0%} is "
                "held out; add text or set training.validation: 0"
            )
        training = config.training
        self._stream = TokenStream(source, rows, kept[rows], training.batch_tokens, training.buffer_tokens, config.seed)
        self._held_out = self._validation_vectors(source, np.flatnonzero(validation), kept)
        self._subject = subject
        self._autoencoder = new_autoencoder(config, subject.d_model).to(self._device)

    def _validation_vectors(self, source: Live | Cached, rows: Any, kept: Any) -> Tensor | None:
        """A sample of validation_tokens held-out activations [m, d]; None where nothing is held out."""
        if not len(rows):
            return None
        limit = self._config.training.validation_tokens
        rows = np.random.default_rng(self._config.seed).permutation(rows)
        n_rows = int(np.searchsorted(np.cumsum(kept[rows]), limit)) + 1
        vectors = source.vectors(rows[:n_rows])[:limit]
        return vectors if len(vectors) > 1 else None

    def _initialise(self) -> float:
        sample: list[Tensor] = []
        for batch in self._stream.batches():
            sample.append(batch)
            if sum(map(len, sample)) >= min(_SAMPLE_ROWS, self._stream.epoch_tokens):
                break
        vectors = torch.cat(sample)[:_SAMPLE_ROWS].float().to(self._device)
        return initialise(self._autoencoder, vectors, torch.Generator().manual_seed(self._config.seed))

    def _loop(self, position: int, mse_scale: float) -> Iterator[tuple[int, str]]:
        training = self._config.training
        batch, last_step = training.batch_tokens, n_steps(self._config)
        log_every = max(1, last_step // _LOGGED_STEPS)
        logged: list[tuple[int, dict[str, Tensor]]] = []
        reported = 0.0
        # Two busy cores are better left to the subject and the autoencoder in turn.
        overlap = torch.device(self._device) if self._on_gpu else None
        with Logger(self._config, self._lake) as logger, closing(self._stream.batches(position, overlap)) as batches:
            for step, x in enumerate(batches, start=position // batch + 1):
                metrics = self._step.step(x.to(self._device).float(), self._lr(step))
                if step % log_every == 0 or step == last_step:
                    logged.append((step, metrics))
                done = step == last_step or self._stopping
                if (
                    done
                    or step * batch // training.checkpoint_tokens > (step - 1) * batch // training.checkpoint_tokens
                ):
                    rows = _metric_rows("train", batch, logged) + self._validate(step)
                    self._commit(step, mse_scale, rows)
                    logger.log(rows)
                    logged = []
                if done:
                    break
                if time.monotonic() - reported > _REPORT_EVERY_S:
                    reported = time.monotonic()
                    yield step * batch, f"fvu {float(metrics['fvu']):.3f}, dead {float(metrics['dead']):.1%}"
        yield step * batch, ", ".join(f"{row[3]} {row[4]:.4g}" for row in rows if row[0] == "validation")

    def _lr(self, step: int) -> float:
        training = self._config.training
        return learning_rate(
            (step - 1) * training.batch_tokens,
            training.batch_tokens,
            total_tokens=training.tokens,
            peak=training.lr,
            schedule=training.schedule,
            warmup_tokens=training.warmup_tokens,
            decay_fraction=training.decay_fraction,
        )

    def _validate(self, step: int) -> list[Any]:
        """Metric rows of the averaged weights on held-out tokens."""
        if self._held_out is None:
            return []
        with self._averaged():
            metrics = reconstruction(self._autoencoder, self._held_out.to(self._device).float())
        return _metric_rows("validation", self._config.training.batch_tokens, [(step, metrics)])

    def _averaged(self) -> Any:
        return self._step.ema.swap(self._autoencoder) if self._step.ema is not None else nullcontext()

    def _commit(self, step: int, mse_scale: float, rows: list[Any]) -> None:
        """Weights, training state, metrics and the autoencoder's property, in one commit."""
        config = self._config
        name = config.autoencoder.name
        if not all(math.isfinite(row[4]) for row in rows):
            raise AutoencoderError(
                f"autoencoder {name}: training diverged before step {step} (a metric is NaN or infinite); lower "
                "training.lr, or set training.clip_norm, and run sae train again to go on from the last checkpoint"
            )
        tokens = step * config.training.batch_tokens
        with self._lake.transaction("train") as transaction:
            known = transaction.base.properties.get(f"autoencoder/{name}", {"checkpoints": []})
            if known["checkpoints"] != self._checkpoints:
                raise ConflictError(f"autoencoder {name}: another training of it commits too; let only one go on")
            with self._averaged():
                model = checkpoints.write_tensors(transaction, "checkpoints", name, self._autoencoder.tensors())
            state = checkpoints.write_tensors(transaction, "training_states", name, self._step.state_dict())
            transaction.write("metrics", _metrics_table(rows), autoencoder=name)
            checkpoint = {"step": step, "tokens": tokens, "model": model, "state": state}
            kept = [*known["checkpoints"], checkpoint][-config.training.keep_checkpoints :]
            dropped = [old for old in known["checkpoints"] if old not in kept]
            transaction.remove(transaction.base.files[old[kind]] for old in dropped for kind in ("model", "state"))
            transaction.set(f"autoencoder/{name}", self._property(tokens, step, mse_scale, kept))
        self._checkpoints = kept

    def _property(self, tokens: int, step: int, mse_scale: float, kept: list[Any]) -> dict[str, Any]:
        config = self._config
        return {
            "model": config.subject.model,
            "hook": self._subject.hook,
            "masked_positions": list(config.subject.masked_positions),
            "corpus": config.corpus.name,
            "d_model": self._subject.d_model,
            "n_latents": config.autoencoder.n_latents,
            "k": config.autoencoder.k,
            "config": self._autoencoder.config(),
            "made_with": checkpoints.made_with(config),
            "mse_scale": mse_scale,
            "step": step,
            "tokens": tokens,
            "complete": step == n_steps(config),
            "checkpoints": kept,
        }


def new_autoencoder(config: Run, d_model: int) -> Autoencoder:
    """An autoencoder of the config's shape, not yet initialised."""
    shape = config.autoencoder
    if shape.k > d_model and shape.activation == "topk":
        raise AutoencoderError(
            f"autoencoder.k: got {shape.k}, more than the {d_model} dimensions at {config.subject.hook}; lower k"
        )
    activation = TopK(shape.k) if shape.activation == "topk" else ReLU()
    return Autoencoder(shape.n_latents, d_model, activation, tied=shape.tied, normalize=shape.normalize)


def _step_config(config: Run, mse_scale: float) -> StepConfig:
    training = config.training
    return StepConfig(
        mse_scale=mse_scale,
        auxk=config.autoencoder.auxk,
        auxk_coef=training.auxk_coef,
        dead_after_tokens=training.dead_tokens,
        l1_coef=training.l1_coef,
        clip=training.clip_norm,
        ema_decay=training.ema or None,
    )


def _metric_rows(phase: str, batch: int, logged: list[tuple[int, dict[str, Tensor]]]) -> list[Any]:
    return [
        (phase, step, step * batch, name, float(value)) for step, metrics in logged for name, value in metrics.items()
    ]


def _metrics_table(rows: list[Any]) -> pa.Table:
    return pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=METRICS)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("train")
