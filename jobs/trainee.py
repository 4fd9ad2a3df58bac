"""One autoencoder in training, on this rank: its step, its checkpoints, its metrics."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sae.activations import Activation, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from sae.collectives import Group
from sae.initialise import initialise
from sae.jobs import checkpoints, claims
from sae.jobs.history import Clock, History, Row, rows_of
from sae.jobs.lake import DataFile, Lake, Snapshot, Transaction
from sae.jobs.loggers import Logger
from sae.matryoshka import Nested
from sae.mesh import Mesh
from sae.metrics import reconstruction
from sae.model import Autoencoder
from sae.schedule import learning_rate
from sae.schemas.config import Autoencoder as Shape
from sae.schemas.config import Run
from sae.schemas.errors import AutoencoderError, SaeError
from sae.schemas.tables import METRICS
from sae.training import Metrics, StepConfig, TrainStep
from sae.transcoder import Transcoder

Shard = dict[str, Any]

_LOGGED_STEPS: Final = 10_000
_ACTIVATIONS: Final[dict[str, Callable[[Shape], Activation]]] = {
    "topk": lambda shape: TopK(shape.k),
    "batchtopk": lambda shape: BatchTopK(shape.k),
    "groupmax": lambda shape: GroupMax(shape.k),
    "jumprelu": lambda shape: JumpReLU(shape.bandwidth),
    "relu": lambda shape: ReLU(),
}


def n_steps(config: Run) -> int:
    """Steps that training.tokens takes."""
    return -(-config.training.tokens // config.training.batch_tokens)


def known_state(snapshot: Snapshot, config: Run) -> dict[str, Any] | None:
    """The autoencoder's property in the lake, if any, checked against the config."""
    state = checkpoints.known(snapshot, config.autoencoder.name)
    if state is not None:
        checkpoints.check_made_with(state, config, lambda key: True)
    return state


def held_out_figures(lake: Lake, name: str) -> str:
    """What the newest validation of an autoencoder found, for people; empty where nothing was held out."""
    files = lake.snapshot().select("metrics", autoencoder=name)
    found = lake.read(files, filters=pc.field("phase") == "validation").sort_by([("step", "descending")]).to_pylist()
    return ", ".join(f"{row['metric']} {row['value']:.4g}" for row in found if row["step"] == found[0]["step"])


def new_autoencoder(config: Run, subject: Mapping[str, Any], tp: Group | None = None) -> Autoencoder:
    """An autoencoder of the config's shape, or this rank's shard of it, not yet initialised.

    It is a transcoder where the subject, d_model and perhaps d_out, has two hooks.
    """
    shape, tp, d_model = config.autoencoder, tp if tp is not None else Group(), subject["d_model"]
    if shape.k > d_model and shape.selects:
        raise AutoencoderError(
            f"autoencoder.k: got {shape.k}, more than the {d_model} dimensions at {config.subject.hook}; lower k"
        )
    activation, nested = _ACTIVATIONS[shape.activation](shape), Nested(shape.prefixes)
    held = shape.n_latents // tp.size
    if "d_out" in subject:
        return Transcoder(held, d_model, subject["d_out"], activation, shape.skip, shape.normalize, tp, nested)
    return Autoencoder(held, d_model, activation, shape.tied, shape.normalize, tp, nested)


class Trainee:
    """An autoencoder that all ranks of a mesh train together; each calls every method, in the same order."""

    def __init__(
        self,
        config: Run,
        lake: Lake,
        snapshot: Snapshot,
        subject: dict[str, Any],
        device: str,
        mesh: Mesh,
        n_lanes: int,
    ) -> None:
        """It goes on from what `snapshot` has of it, the same for all ranks.

        `subject` is what the autoencoder's property says of it: model, hook and d_model, and of a transcoder the
        same of its output.
        """
        self._config, self._lake, self._subject, self._mesh = config, lake, subject, mesh
        self._name = config.autoencoder.name
        self._device = device
        self._last_step = n_steps(config)
        self._log_every = max(1, self._last_step // _LOGGED_STEPS)
        self._snapshot, self._state = snapshot, known_state(snapshot, config)
        self._checkpoints: list[Any] = self._state["checkpoints"] if self._state else []
        self._n_lanes = n_lanes
        self.steps_done = self._state["tokens"] // config.training.batch_tokens if self._state else 0
        self._saved = self.steps_done
        self._history = History(config.training.batch_tokens)
        self._logger = Logger(config, lake) if mesh.everyone.rank == 0 else None

    @property
    def is_new(self) -> bool:
        """Whether there is nothing to go on from, so that `start` needs a sample."""
        return self._state is None

    def start(self, sample: Tensor | None) -> None:
        """Begin, from a sample of activations [m, d] or from the last checkpoint."""
        autoencoder = new_autoencoder(self._config, self._subject, self._mesh.tp).to(self._device)
        self._shape = autoencoder.config()
        if sample is not None:
            generator = torch.Generator().manual_seed(self._config.seed)
            self._mse_scale = initialise(autoencoder, sample, generator, self._mesh.everyone)
        else:
            assert self._state is not None
            self._mse_scale = self._state["mse_scale"]
        self._step = TrainStep(autoencoder, _step_config(self._config, self._mse_scale), self._mesh)
        if self._state is not None:
            owned = self._mesh.owned(self._config.autoencoder.n_latents)
            last = self._state["checkpoints"][-1]["state"]
            self._step.load_state_dict(checkpoints.read(self._lake, self._snapshot, last, owned))

    def commit_as(self, claim: int) -> None:
        """From here on it steps, and commits while it holds the claim."""
        self._claim = claim
        if self._logger is not None:
            self._logger.__enter__()
        self._clock = Clock(self._config.training.batch_tokens, self.steps_done)

    def step(self, step: int, x: Tensor) -> Metrics | None:
        """Step number `step` (from 1), on this rank's rows x [B, d]; None where it was done before."""
        if step <= self.steps_done:
            return None
        lr = self._lr(step)
        metrics = self._step.step(x, lr)
        self.steps_done = step
        if step % self._log_every == 0 or step == self._last_step:
            self._history.add(step, metrics, {"lr": lr}, self._clock.read(step))
        return metrics

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after a step."""
        batch, every = self._config.training.batch_tokens, self._config.training.checkpoint_tokens
        return step == self._last_step or step * batch // every > (step - 1) * batch // every

    def save(self, held_out: Tensor | None) -> None:
        """Validate on held-out activations [m, d], if any, and commit a checkpoint, where steps were made since."""
        step, batch = self.steps_done, self._config.training.batch_tokens
        if step == self._saved:
            return
        rows = self._history.rows()
        quality: dict[str, Tensor] = {}
        if held_out is not None:
            with self._step.averaged_shard() as shard:
                quality = reconstruction(shard, held_out.to(self._device).float(), self._mesh.dp)
        scores = {name: float(value) for name, value in quality.items()}
        rows += rows_of("validation", step, batch, scores)
        self._commit(step, rows, scores)
        if self._logger is not None:
            self._logger.log(rows)
        self._history.clear()
        self._saved = step

    def end(self, error: BaseException | None) -> None:
        """Close the loggers, and let the ranks part."""
        self._step.end()
        if self._logger is not None:
            self._logger.__exit__(type(error) if error else None, error, None)

    def _lr(self, step: int) -> float:
        training = self._config.training
        return learning_rate(
            (step - 1) * training.batch_tokens,
            training.batch_tokens,
            total_tokens=training.tokens,
            peak=training.lr,
            warmup_tokens=training.warmup_tokens,
            decay_fraction=training.decay_fraction,
            schedule=training.schedule,
        )

    def _commit(self, step: int, rows: list[Row], scores: dict[str, float]) -> None:
        """Weights, training state, metrics and the autoencoder's property, in one commit of rank 0."""
        config, name, everyone = self._config, self._name, self._mesh.everyone
        if not all(math.isfinite(row[4]) for row in rows):
            raise AutoencoderError(
                f"autoencoder {name}: training diverged before step {step} (a metric is NaN or infinite); lower "
                "training.lr, or set training.clip_norm, and run sae train again to go on from the last checkpoint"
            )
        mine = self._written(self._lake.transaction("train"))
        written = everyone.gather_objects(mine)
        if everyone.rank > 0:
            if isinstance(mine, Exception):
                raise mine
            return
        with self._lake.transaction("train") as transaction:
            checkpoint: dict[str, Any] = {"step": step, "tokens": step * config.training.batch_tokens}
            failed = [one for one in written if isinstance(one, Exception)]
            shards = [one for one in written if not isinstance(one, Exception)]
            transaction.adopt(file for files, _, _ in shards for file in files)
            if failed:
                raise failed[0]
            checkpoint |= {"model": [model for _, model, _ in shards], "state": [state for _, _, state in shards]}
            claims.require(transaction, name, self._claim)
            every = [*self._checkpoints, {**checkpoint, "fvu": scores.get("fvu")}]
            kept = checkpoints.kept(every, config.training.keep_checkpoints)
            dropped = [old for old in self._checkpoints if old not in kept]
            transaction.write("metrics", _metrics_table(rows), autoencoder=name)
            transaction.remove(transaction.base.files[path] for old in dropped for path in checkpoints.paths(old))
            transaction.set(f"autoencoder/{name}", self._property(step, kept))
        self._checkpoints = kept

    def _written(self, transaction: Transaction) -> "tuple[list[DataFile], Shard, Shard] | Exception":
        """This rank's files of weights and of training state, for rank 0 to commit; or why there are none."""
        latents = self._mesh.owned(self._config.autoencoder.n_latents)
        try:
            with self._step.averaged() as owned:
                model = checkpoints.write_tensors(transaction, "checkpoints", self._name, owned.tensors(), latents)
            tensors = self._step.state_dict()
            state = checkpoints.write_tensors(transaction, "training_states", self._name, tensors, latents)
            return transaction.hand_over(), model, state
        except (SaeError, OSError) as error:
            transaction.discard()
            return error

    def _property(self, step: int, kept: list[Any]) -> dict[str, Any]:
        config = self._config
        return {
            **self._subject,
            "masked_positions": list(config.subject.masked_positions),
            "corpus": config.corpus.name,
            "n_latents": config.autoencoder.n_latents,
            "k": config.autoencoder.k,
            "config": self._shape,
            "made_with": checkpoints.made_with(config),
            "mse_scale": self._mse_scale,
            "lanes": self._n_lanes,
            "step": step,
            "tokens": step * config.training.batch_tokens,
            "complete": step == self._last_step,
            "checkpoints": kept,
        }


def _step_config(config: Run, mse_scale: float) -> StepConfig:
    training = config.training
    return StepConfig(
        mse_scale=mse_scale,
        auxk=config.autoencoder.auxk,
        auxk_coef=training.auxk_coef,
        dead_after_tokens=training.dead_tokens,
        sparsity_coef=training.l1_coef or training.l0_coef,
        clip=training.clip_norm,
        ema_decay=training.ema or None,
        multi_topk_coef=training.multi_topk_coef,
    )


def _metrics_table(rows: list[Row]) -> pa.Table:
    columns = zip(*sorted(rows, key=lambda row: (row[1], row[3])), strict=True)
    return pa.table([pa.array(column) for column in columns], schema=METRICS)
