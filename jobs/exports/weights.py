"""Weights for other programs: an autoencoder of the lake in the format of SAELens, sparsify or the published ones."""

import json
from typing import Any, BinaryIO, Final

import safetensors.torch
import torch

from sae.foreign import FORMATS as FOREIGN
from sae.foreign import About
from sae.jobs import checkpoints, progress, storage
from sae.jobs.lake import Lake
from sae.jobs.origin import state_of
from sae.schemas.config import Run
from sae.schemas.errors import AutoencoderError

FORMATS: Final = tuple(FOREIGN)
PATH: Final = "{subject}/{autoencoder}"


def write(lake: Lake, config: Run, path: str) -> None:
    """Writes the files into `path` below export.folder, in the place of what is there; the last one completes it.

    Raises AutoencoderError where the format can't express the autoencoder.
    """
    name, format_ = config.autoencoder.name, FOREIGN[config.export.format]
    folder = storage.join(config.export.folder, path)
    state = state_of(lake.snapshot(), name)
    autoencoder = checkpoints.load(lake, name, config.encode.weights, config.encode.checkpoint)
    about = About(state["model"], state["hook"], state.get("output_hook"))
    try:
        settings, tensors = format_.write(autoencoder, about)
    except AutoencoderError as error:
        raise AutoencoderError(f"autoencoder {name}: {error}") from None
    if format_.has_config:
        # It would speak of other weights until the new one is there.
        storage.remove(storage.join(folder, "cfg.json"))
        with storage.staged(storage.join(folder, format_.weights)) as temporary:
            safetensors.torch.save_file(tensors, temporary)
        storage.write_atomic(storage.join(folder, "cfg.json"), json.dumps(settings, indent=1).encode())
    else:
        storage.write_atomic(storage.join(folder, format_.weights), _saved(tensors))
    progress.say(f"export: weights of {name}, {autoencoder.n_latents:,} latents, as {format_.name} in {folder}")


def _saved(state: dict[str, Any]) -> Any:
    def write_to(file: BinaryIO) -> None:
        torch.save(state, file)

    return write_to
