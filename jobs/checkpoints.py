"""Autoencoders in the lake: their property `autoencoder/NAME` and the files of their checkpoints."""

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sae.jobs.lake import DataFile, Lake, Snapshot, Transaction
from sae.model import Autoencoder
from sae.schemas.config import Run
from sae.schemas.errors import AutoencoderError, ConfigError, IncompleteError

if TYPE_CHECKING:  # importing it loads transformer_lens, which takes seconds
    from sae.subject import Subject


def state_of(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """The property of a fully trained autoencoder; raises IncompleteError where there is none."""
    state: dict[str, Any] | None = snapshot.properties.get(f"autoencoder/{name}")
    if state is None:
        known = [key.removeprefix("autoencoder/") for key in snapshot.properties if key.startswith("autoencoder/")]
        raise IncompleteError(
            f"autoencoder {name}: not in this lake (it has: {', '.join(known) or 'none'}); run sae train first"
        )
    if not state["complete"]:
        raise IncompleteError(
            f"autoencoder {name}: trained on {state['tokens']:,} tokens so far; finish sae train first"
        )
    return state


# What may differ between the command that began a training and one that continues it.
_MAY_CHANGE: Final = {
    "tokens", "checkpoint_tokens", "keep_checkpoints", "log_to", "validation_tokens", "max_failures", "lanes",
}  # fmt: skip


def made_with(config: Run) -> dict[str, Any]:
    """Everything that decides an autoencoder's weights, by key of the config, as plain JSON."""
    sections = {
        "subject": config.subject.model_dump(mode="json"),
        "autoencoder": config.autoencoder.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json", exclude=_MAY_CHANGE),
    }
    keys = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {"seed": config.seed, "corpus.name": config.corpus.name, **keys}


def check_made_with(state: dict[str, Any], config: Run, concerns: Callable[[str], bool]) -> None:
    """Raises ConfigError where a key that concerns the caller is not what the autoencoder was trained with."""
    for key, value in made_with(config).items():
        trained = state["made_with"].get(key, value)  # a key that came later had its default's meaning
        if concerns(key) and trained != value:
            raise ConfigError(
                f"{key}: autoencoder {config.autoencoder.name} of {config.lake} is trained with {trained}, now it is "
                f"{value}; give {trained}, or train another under another autoencoder.name"
            )


def is_of_subject(key: str) -> bool:
    """Whether a key of the config decides what activations are; how many layers are loaded behind them does not."""
    return key.startswith("subject.") and key != "subject.layers"


def load(lake: Lake, name: str) -> Autoencoder:
    """A fully trained autoencoder of the lake, for inference."""
    snapshot = lake.snapshot()
    state = state_of(snapshot, name)
    autoencoder = Autoencoder.from_config(state["config"])
    tensors = read_tensors(lake, snapshot.files[state["checkpoints"][-1]["model"]])
    try:
        autoencoder.load_state_dict({**autoencoder.state_dict(), **tensors})
    except RuntimeError as error:
        raise AutoencoderError(f"autoencoder {name}: its checkpoint doesn't fit its config: {error}") from None
    return autoencoder.eval().requires_grad_(False)


def read_tensors(lake: Lake, file: DataFile) -> dict[str, Tensor]:
    (path,) = lake.verified([file])
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise AutoencoderError(f"{path}: damaged checkpoint ({error}); restore the file from a copy") from None


def write_tensors(transaction: Transaction, kind: str, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Adds a safetensors file to a transaction; returns its path in the lake."""
    contiguous = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    return transaction.write_with(kind, "safetensors", lambda path: _save(contiguous, path), autoencoder=name).path


def _save(tensors: dict[str, Tensor], path: str) -> None:
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:
        # It wraps errors of the disk, and the number is only in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def identity(snapshot: Snapshot, name: str) -> str:
    """Short hash of the weights that encode with: latents of other weights are other latents."""
    return snapshot.files[state_of(snapshot, name)["checkpoints"][-1]["model"]].sha256[:12]


def check_fit(autoencoder: Autoencoder, subject: "Subject", name: str) -> None:
    """Raises AutoencoderError where the autoencoder's width is not that of the subject's activations."""
    if autoencoder.d_model != subject.d_model:
        raise AutoencoderError(
            f"autoencoder {name}: made for activations of width {autoencoder.d_model}, but {subject.hook} of "
            f"{subject.model} gives {subject.d_model}; give the subject.model and subject.hook that it was trained on"
        )
