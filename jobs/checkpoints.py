"""Autoencoders in the lake: their property `autoencoder/NAME` and the files of their checkpoints."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.jobs.lake import DataFile, Lake, Snapshot, Transaction
from sae.model import Autoencoder
from sae.schemas.config import Run, in_yaml
from sae.schemas.errors import AutoencoderError, ConfigError, IncompleteError
from sae.sharded import latent_axis
from sae.transcoder import from_config

if TYPE_CHECKING:  # importing it loads transformer_lens, which takes seconds
    from sae.subject import Subject


def known(snapshot: Snapshot, name: str) -> dict[str, Any] | None:
    """The property of an autoencoder, if the lake has it; raises AutoencoderError where its checkpoints are too old."""
    state: dict[str, Any] | None = snapshot.properties.get(f"autoencoder/{name}")
    kinds = (one.get(kind) for one in (state or {}).get("checkpoints", []) for kind in ("model", "state"))
    if not all(isinstance(shards, list) for shards in kinds):
        raise AutoencoderError(
            f"autoencoder {name}: its checkpoints are those of an older sae, of one file each, and can't be read; "
            "train it anew under another autoencoder.name, or under this one after sae drop LAKE --autoencoder "
            f"{name}"
        )
    return state


def state_of(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """The property of a fully trained autoencoder; raises IncompleteError where there is none."""
    state = known(snapshot, name)
    if state is None:
        others = [key.removeprefix("autoencoder/") for key in snapshot.properties if key.startswith("autoencoder/")]
        raise IncompleteError(
            f"autoencoder {name}: not in this lake (it has: {', '.join(others) or 'none'}); run sae train first"
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
                f"{key}: autoencoder {config.autoencoder.name} of {config.lake} is trained with {in_yaml(trained)}, "
                f"now it is {in_yaml(value)}; give {in_yaml(trained)}, or train another under another autoencoder.name"
            )


def is_of_subject(key: str) -> bool:
    """Whether a key of the config decides what activations are; how many layers are loaded behind them does not."""
    return key.startswith("subject.") and key != "subject.layers"


Weights = Literal["average", "plain"]
# Where in a checkpoint they are: which files, and what their names begin with.
_PLACES: Final[dict[Weights, tuple[str, str]]] = {"average": ("model", ""), "plain": ("state", "autoencoder.")}


def imported(snapshot: Snapshot, name: str) -> str | None:
    """Where an autoencoder of the lake was imported from; None where it was trained here, or is not in the lake."""
    state = snapshot.properties.get(f"autoencoder/{name}") or {}
    found: str | None = state.get("imported", {}).get("source")
    return found


Which = Literal["last", "best"]
"""Of the checkpoints that are kept; the best is the one with the least held-out FVU, which the average has."""


def load(lake: Lake, name: str, weights: Weights = "average", which: Which = "last") -> Autoencoder:
    """A fully trained autoencoder of the lake, for inference: the moving average of its weights, or the plain ones."""
    snapshot = lake.snapshot()
    state = state_of(snapshot, name)
    autoencoder = from_config(state["config"])
    tensors = read(lake, snapshot, _files(state, name, weights, which), prefix=_PLACES[weights][1])
    try:
        autoencoder.load_state_dict({**autoencoder.state_dict(), **tensors})
    except RuntimeError as error:
        raise AutoencoderError(f"autoencoder {name}: its checkpoint doesn't fit its config: {error}") from None
    return autoencoder.eval().requires_grad_(False)


Shards = list[dict[str, Any]]
"""The files of one set of tensors, as the lake's log knows them: each its path, and the ranges of latents in it."""
Opened = tuple[str, Any]
"""A file's path, and its tensors."""


def read(
    lake: Lake, snapshot: Snapshot, shards: Shards, latents: list[range] | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, those of the given latents (all where none are given), whoever wrote which.

    With `prefix` only those whose names begin with it, without it.
    """
    with open_shards(lake, snapshot, shards) as files:
        return read_opened(files, shards, latents, prefix)


@contextmanager
def open_shards(lake: Lake, snapshot: Snapshot, shards: Shards) -> Iterator[list[Opened]]:
    """The files of a checkpoint, for `read_opened`, piece by piece."""
    with ExitStack() as files:
        yield [_opened(lake, snapshot.files[shard["path"]], files) for shard in shards]


def read_opened(
    opened: list[Opened], shards: Shards, latents: list[range] | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """What `read` gives, from files that are open."""
    pieces = [(start, stop) for shard in shards for start, stop in shard["latents"]]
    wanted = latents if latents is not None else [range(start, stop) for start, stop in sorted(pieces)]
    names = {name: file for _, file in reversed(opened) for name in list(file.keys()) if name.startswith(prefix)}
    return {name.removeprefix(prefix): _tensor(name, opened, names[name], shards, wanted) for name in names}


def _tensor(name: str, opened: list[Opened], anywhere: Any, shards: Shards, wanted: list[range]) -> Tensor:
    axis = latent_axis(name)
    if axis is None:
        found: Tensor = anywhere.get_tensor(name)
        return found
    parts: list[tuple[int, Tensor]] = []
    for shard, (path, file) in zip(shards, opened, strict=True):
        with _blamed(path):
            rows, offset = file.get_slice(name), 0
        for start, stop in shard["latents"]:
            for part in wanted:
                low, high = max(start, part.start) - start + offset, min(stop, part.stop) - start + offset
                if low < high:
                    parts.append((low - offset + start, rows[low:high] if axis == 0 else rows[:, low:high]))
            offset += stop - start
    # Wanted ranges are ascending, as owned ones are.
    return torch.cat([part for _, part in sorted(parts, key=lambda one: one[0])], dim=axis)


def _opened(lake: Lake, file: DataFile, files: ExitStack) -> Opened:
    path, local = lake.absolute(file), files.enter_context(lake.local(file))
    with _blamed(path):
        return path, files.enter_context(safe_open(local, framework="pt"))


@contextmanager
def _blamed(path: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise AutoencoderError(f"{path}: damaged checkpoint ({error}); restore the file from a copy") from None


def write_tensors(
    transaction: Transaction, kind: str, name: str, tensors: Mapping[str, Tensor], latents: list[range]
) -> dict[str, Any]:
    """Adds a safetensors file of some latents to a transaction; returns it as one of `Shards`.

    What has no latents is left to the rank that has the first.
    """
    first = latents[0].start == 0
    kept = {key: value for key, value in tensors.items() if first or latent_axis(key) is not None}
    # One after another, so that a GPU needs no room for a second training state.
    contiguous = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in kept.items()}
    file = transaction.write_with(kind, "safetensors", lambda path: _save(contiguous, path), autoencoder=name)
    return {"path": file.path, "latents": [[part.start, part.stop] for part in latents]}


def kept(checkpoints: list[dict[str, Any]], n_last: int) -> list[dict[str, Any]]:
    """The last n, and the one with the least held-out FVU."""
    best = _best(checkpoints)
    return [one for one in checkpoints if one in checkpoints[-n_last:] or one is best]


def _best(checkpoints: list[dict[str, Any]]) -> dict[str, Any] | None:
    scored = [one for one in checkpoints if one.get("fvu") is not None]
    return min(scored, key=lambda one: float(one["fvu"])) if scored else None


def chosen(state: dict[str, Any], name: str, which: Which) -> dict[str, Any]:
    """One of an autoencoder's checkpoints: its step, tokens and files."""
    found: dict[str, Any] | None = state["checkpoints"][-1] if which == "last" else _best(state["checkpoints"])
    if found is None:
        raise ConfigError(
            f"encode.checkpoint: got best, but nothing was held out while autoencoder {name} was trained, so none is "
            "known to be; give last, or train with training.validation above 0"
        )
    return found


def paths(checkpoint: dict[str, Any]) -> list[str]:
    """The files of a checkpoint."""
    return [shard["path"] for kind in ("model", "state") for shard in checkpoint[kind]]


def _save(tensors: dict[str, Tensor], path: str) -> None:
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:
        # It wraps errors of the disk, and the number is only in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def identity(snapshot: Snapshot, name: str, weights: Weights = "average", which: Which = "last") -> str:
    """Short hash of the weights that encode with: latents of other weights are other latents."""
    return _hash(snapshot, _files(state_of(snapshot, name), name, weights, which))


def _files(state: dict[str, Any], name: str, weights: Weights, which: Which) -> Shards:
    files: Shards = chosen(state, name, which)[_PLACES[weights][0]]
    if not files:
        raise ConfigError(
            f"encode.weights: got {weights}, but autoencoder {name} was imported, with one set of weights; give average"
        )
    return files


def _hash(snapshot: Snapshot, shards: Shards) -> str:
    hashes = [snapshot.files[shard["path"]].sha256 for shard in shards]
    return hashes[0][:12] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def other_weights(snapshot: Snapshot, config: Run, encoded_with: str) -> ConfigError:
    """What is wrong where the config chooses other weights than those, which encoded: the keys that choose them."""
    name, given = config.autoencoder.name, config.encode
    drop = f"sae drop {config.lake} --latents {name}"
    remedy = f"no checkpoint that can be chosen has those any more, so encode anew after: {drop}"
    for weights, which in itertools.product(get_args(Weights), get_args(Which)):
        with suppress(ConfigError):
            if identity(snapshot, name, weights, which) == encoded_with:
                remedy = f"give {weights} and {which}, or encode anew after: {drop}"
                break
    return ConfigError(
        f"encode.weights, encode.checkpoint: got {given.weights} and {given.checkpoint}, but the latents of {name} in "
        f"{config.lake} were made with other weights; {remedy}"
    )


Place = tuple[Shards, str]
"""Where weights are: files, and what the names of the tensors begin with."""


def find(snapshot: Snapshot, name: str, identity: str) -> Place | None:
    """Where the weights of that hash are, among all checkpoints that are kept; None where they are not."""
    for checkpoint in reversed(snapshot.properties[f"autoencoder/{name}"]["checkpoints"]):
        for files, prefix in _PLACES.values():
            if _hash(snapshot, checkpoint[files]) == identity:
                return checkpoint[files], prefix
    return None


def check_fit(autoencoder: Autoencoder, subject: "Subject", name: str) -> None:
    """Raises AutoencoderError where the autoencoder's width is not that of the subject's activations."""
    if autoencoder.d_model != subject.d_model:
        raise AutoencoderError(
            f"autoencoder {name}: made for activations of width {autoencoder.d_model}, but {subject.hook} of "
            f"{subject.model} gives {subject.d_model}; give the subject.model and subject.hook that it was trained on"
        )
