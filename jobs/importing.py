"""`sae import run.yaml SOURCE`: an autoencoder that was trained elsewhere becomes one of the lake, complete.

SOURCE is a published one's name (v5_32k/layer_8/resid_post_mlp), a file in the published format (.pt), or a folder that
SAELens or sparsify saved; local or in an object store. The run config says which lake, name, subject and hook it is
for, since every later step asks the same file for them; what it says of the autoencoder must be true.
"""

from typing import Any, Final

from sae import published
from sae.activations import BatchTopK, GroupMax, TopK
from sae.foreign import FORMATS, Foreign, Format
from sae.jobs import checkpoints, downloads, progress, storage, untrusted
from sae.jobs.lake import Lake, Snapshot, write_views
from sae.model import Autoencoder
from sae.schemas.config import Run
from sae.schemas.errors import AutoencoderError, ConfigError
from sae.subject import resolve_hook
from sae.subject_shape import hook_width
from sae.transcoder import Transcoder

_CONFIG: Final = "cfg.json"
_ENDINGS: Final = (".pt", ".pth")
_ACTIVATIONS: Final = {
    "TopK": "topk", "BatchTopK": "batchtopk", "GroupMax": "groupmax", "JumpReLU": "jumprelu", "ReLU": "relu",
}  # fmt: skip


def run(config: Run, source: str, offline: bool = False) -> None:
    """Imports it, unless it is there already.

    Raises a SaeError where it is damaged, of a kind that there is not here, or other than the config says.
    """
    lake, name = Lake(config.lake, create=True), config.autoencoder.name
    if len(config.each()) > 1:
        raise ConfigError("autoencoders: several are given; import one, under autoencoder.name")
    one = published.named(source)
    format_, files = _files(one.path if one is not None else source, offline)
    identity = {file: storage.sha256(local) for file, local in files.items()}
    known = lake.snapshot().properties.get(f"autoencoder/{name}")
    if known is not None:
        if known.get("imported", {}).get("sha256") == identity:
            _check_subject(config, known)
            progress.say(f"import: {name} is in {config.lake}")
            return
        raise ConfigError(
            f"autoencoder.name: {config.lake} has another {name}; import under another name, or delete it first with: "
            f"sae drop {config.lake} --autoencoder {name}"
        )
    with untrusted.blamed(source):
        found = read(format_, files)
    autoencoder = found.autoencoder
    _check_described(config, autoencoder, source)
    _check_widths(config, autoencoder, source)
    _compare_hooks(config, found, one, source)
    origin = {"source": source, "format": format_.name, "sha256": identity}
    _commit(lake, config, autoencoder, origin)
    write_views(lake)
    width = f"{autoencoder.n_latents:,} latents of {autoencoder.d_model} features"
    progress.say(f"import: {name}, {width}, {autoencoder.activation.name}, from {source}; next: sae encode")


def read(format_: Format, files: dict[str, str]) -> Foreign:
    """The autoencoder in local files, by the names that they have in the format."""
    if not format_.has_config:
        return format_.read({}, untrusted.read_torch(files[format_.weights]))
    return format_.read(untrusted.read_json(files[_CONFIG]), untrusted.read_safetensors(files[format_.weights]))


def _files(source: str, offline: bool) -> tuple[Format, dict[str, str]]:
    """The format of a source, and local paths of its files."""
    if source.endswith(_ENDINGS):
        format_ = FORMATS["openai-weights"]
        return format_, {format_.weights: downloads.fetched(source, offline)}
    if storage.is_local(source) and storage.size_if_there(storage.join(source, _CONFIG)) is None:
        state = "is no folder with cfg.json" if storage.exists(source) else "is not there"
        raise AutoencoderError(
            f"{source}: {state}; expected a .pt file, a folder of SAELens or sparsify, or a published name such as "
            "v5_32k/layer_8/resid_post_mlp"
        )
    config_path = downloads.fetched(storage.join(source, _CONFIG), offline)
    config = untrusted.read_json(config_path)
    claiming = [one for one in FORMATS.values() if one.claims(config)]
    if not claiming:
        raise AutoencoderError(
            f"{source}: its cfg.json is neither SAELens' (with d_in and d_sae) nor sparsify's (with d_in and "
            "expansion_factor or num_latents)"
        )
    format_ = claiming[0]
    weights = downloads.fetched(storage.join(source, format_.weights), offline)
    return format_, {_CONFIG: config_path, format_.weights: weights}


def _described(autoencoder: Autoencoder) -> dict[str, Any]:
    """What a run config has to say of an autoencoder."""
    activation = autoencoder.activation
    selects = isinstance(activation, TopK | BatchTopK | GroupMax)
    return {
        "n_latents": autoencoder.n_latents,
        **({"k": activation.state["k"]} if selects else {}),
        "activation": _ACTIVATIONS[activation.name],
        "normalize": autoencoder.normalize,
        "tied": autoencoder.tied,
        "skip": isinstance(autoencoder, Transcoder) and autoencoder.skip is not None,
        "prefixes": list(autoencoder.nested.sizes),
    }


def _check_described(config: Run, autoencoder: Autoencoder, source: str) -> None:
    """Raises ConfigError unless the config's section says what the autoencoder is: later steps go by it."""
    given = config.autoencoder.model_dump(mode="json")
    wrong = {key: value for key, value in _described(autoencoder).items() if given[key] != value}
    if wrong:
        said = ", ".join(f"{key} {given[key]}" for key in wrong)
        give = " ".join(f"--autoencoder.{key} {_as_yaml(value)}" for key, value in wrong.items())
        raise ConfigError(f"autoencoder: {source} is not of {said}; give {give}, here and for later steps")
    transcodes = isinstance(autoencoder, Transcoder)
    if transcodes != (config.subject.output_hook is not None):
        raise ConfigError(
            f"subject.output_hook: {source} is a transcoder; give the hook that it reconstructs"
            if transcodes
            else f"subject.output_hook: got {config.subject.output_hook}, but {source} is no transcoder; leave it out"
        )


def _as_yaml(value: Any) -> str:
    return f"'{value}'" if isinstance(value, list) else str(value).lower()


def _check_widths(config: Run, autoencoder: Autoencoder, source: str) -> None:
    """Raises AutoencoderError where the subject's activations are of other widths."""
    subject = config.subject
    for hook, width in ((subject.hook, autoencoder.d_model), (subject.output_hook, autoencoder.d_out)):
        found = hook_width(subject.model, hook) if hook is not None else None
        if found is not None and found != width:
            raise AutoencoderError(
                f"{source}: made for activations of width {width}, but {hook} of {subject.model} gives {found}; give "
                "the subject.model and the hooks that it was trained on"
            )


def _compare_hooks(config: Run, found: Foreign, one: published.Published | None, source: str) -> None:
    """Tells where the source names another place than the config; only people can know whether they are one."""
    about = found.about
    said = {
        "subject.model": (published.SUBJECT if one is not None else about.model, config.subject.model),
        "subject.hook": (one.hook if one is not None else about.hook, config.subject.hook),
        "subject.output_hook": (about.output_hook, config.subject.output_hook),
    }
    for key, (its, ours) in said.items():
        if its is not None and ours is not None and resolve_hook(its) != resolve_hook(ours):
            progress.say(f"import: {source} was trained on {its}, {key} is {ours}; make sure that they are the same")


def _check_subject(config: Run, state: dict[str, Any]) -> None:
    checkpoints.check_made_with(state, config, lambda key: key.startswith("subject."))


def _commit(lake: Lake, config: Run, autoencoder: Autoencoder, origin: dict[str, Any]) -> None:
    """The weights and the property of a complete autoencoder, in one commit."""
    name, tensors = config.autoencoder.name, autoencoder.tensors()

    def is_new(snapshot: Snapshot) -> bool:
        return f"autoencoder/{name}" not in snapshot.properties

    with lake.transaction("import") as transaction:
        transaction.require(is_new, f"autoencoder {name} came into the lake meanwhile")
        model = checkpoints.write_tensors(transaction, "checkpoints", name, tensors, [range(autoencoder.n_latents)])
        # No training state, so that nothing goes on with it; it was trained on no token of the lake.
        checkpoint: dict[str, Any] = {"step": 0, "tokens": 0, "model": [model], "state": [], "fvu": None}
        described = {**_property(config, autoencoder), "checkpoints": [checkpoint], "imported": origin}
        transaction.set(f"autoencoder/{name}", described)


def _property(config: Run, autoencoder: Autoencoder) -> dict[str, Any]:
    subject = config.subject
    hooks = {"hook": resolve_hook(subject.hook), "d_model": autoencoder.d_model}
    if subject.output_hook is not None:
        hooks |= {"output_hook": resolve_hook(subject.output_hook), "d_out": autoencoder.d_out}
    made_with = checkpoints.made_with(config)
    return {
        "model": subject.model,
        **hooks,
        "masked_positions": list(subject.masked_positions),
        "corpus": config.corpus.name,
        "n_latents": autoencoder.n_latents,
        "k": config.autoencoder.k,
        "config": autoencoder.config(),
        # What a training would have decided is not known, so that later steps may have any of it.
        "made_with": {key: value for key, value in made_with.items() if key.startswith("subject.")},
        "step": 0,
        "tokens": 0,
        "complete": True,
    }
