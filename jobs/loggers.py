"""Training metrics to tensorboard and wandb, when training.log_to asks for them."""

from types import TracebackType
from typing import Any, Self

from sae.jobs.lake import TENSORBOARD_FOLDER, Lake
from sae.schemas.config import Run


class Logger:
    """Sends metric rows (phase, step, tokens, metric, value) to each sink; the lake's table is not one of them."""

    def __init__(self, config: Run, lake: Lake) -> None:
        self._config, self._lake = config, lake
        self._tensorboard: Any = None
        self._wandb: Any = None

    def __enter__(self) -> Self:
        name = self._config.autoencoder.name
        if "tensorboard" in self._config.training.log_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self._lake.absolute(f"{TENSORBOARD_FOLDER}/{name}"))
        if "wandb" in self._config.training.log_to:
            import wandb

            self._wandb = wandb.init(
                project="sae", id=name, resume="allow", config=self._config.model_dump(mode="json")
            )
        return self

    def log(self, rows: list[Any]) -> None:
        for phase, step, _, metric, value in rows:
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(f"{phase}/{metric}", value, step)
            if self._wandb is not None:
                self._wandb.log({f"{phase}/{metric}": value}, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
