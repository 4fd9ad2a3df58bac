"""Training metrics to tensorboard and wandb, when training.log_to asks for them."""

import hashlib
from types import TracebackType
from typing import Any, Self

from sae.jobs import storage
from sae.jobs.history import Row
from sae.jobs.lake import TENSORBOARD_FOLDER, Lake
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError


class Logger:
    """Sends metric rows (phase, step, tokens, metric, value) to each sink; the lake's table is not one of them."""

    def __init__(self, config: Run, lake: Lake) -> None:
        self._config, self._lake = config, lake
        self._tensorboard: Any = None
        self._wandb: Any = None

    def __enter__(self) -> Self:
        name = self._config.autoencoder.name
        if "tensorboard" in self._config.training.log_to:
            if not storage.is_local(self._lake.path):
                raise ConfigError(
                    f"training.log_to: tensorboard writes into the lake's folder, and {self._lake.path} is in an "
                    "object store; leave it out, the same metrics are in the lake's table metrics"
                )
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self._lake.absolute(f"{TENSORBOARD_FOLDER}/{name}"))
        if "wandb" in self._config.training.log_to:
            self._wandb = self._wandb_run(name)
        return self

    def _wandb_run(self, name: str) -> Any:
        # Autoencoders of one name in two lakes are two runs.
        # Autoencoders of one lake are trained in one process, each a run of its own.
        identity = f"{name}-{hashlib.sha256(self._lake.path.encode()).hexdigest()[:8]}"
        try:
            import wandb

            config = self._config.model_dump(mode="json")
            named: dict[str, Any] = {"project": "sae", "id": identity, "name": name, "config": config}
            return wandb.init(**named, resume="allow", reinit="create_new")
        except Exception as error:  # wandb's errors have no common base
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"training.log_to: wandb can't start ({reason}); log in with wandb login, set WANDB_MODE=offline, or "
                "leave wandb out"
            ) from None

    def log(self, rows: list[Row]) -> None:
        """Steps must not come before those that were logged already."""
        by_step: dict[int, dict[str, float]] = {}
        for phase, step, tokens, metric, value in rows:
            by_step.setdefault(step, {"tokens": tokens})[f"{phase}/{metric}"] = value
        # In order, and each once: wandb drops what comes after a later step.
        for step, values in sorted(by_step.items()):
            if self._wandb is not None:
                self._wandb.log(values, step=step)
            if self._tensorboard is not None:
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
