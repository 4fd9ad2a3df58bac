"""Step export: writes an autoencoder's atoms in a format that viewers and other tools read, beside a manifest."""

import string
from pathlib import PurePath
from typing import Any, Final

from sae.jobs import progress, storage
from sae.jobs.exports import html_page, neuronpedia, saedashboard, static_site, viewer_json, weights
from sae.jobs.exports.dashboards import identifier, layer
from sae.jobs.exports.folder import Folder, Format
from sae.jobs.lake import Lake, Snapshot
from sae.jobs.origin import origin, state_of
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError
from sae.schemas.origin import Exported
from sae.schemas.site import Entry
from sae.schemas.viewer import Manifest

FORMATS: Final = {
    format_.name: format_
    for format_ in (viewer_json.FORMAT, static_site.FORMAT, saedashboard.FORMAT, neuronpedia.FORMAT)
}


def run(config: Run) -> None:
    """Writes the files of all atoms or of `export.atoms`, unless they are there and nothing has changed."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    if config.export.format == "html":
        html_page.write(lake, snapshot, config)
        return
    if config.export.pick:
        raise ConfigError(f"export.pick: is for export.format html; for {config.export.format} give export.atoms")
    if config.export.format in weights.FORMATS:
        weights.write(lake, config, _path(config, state_of(snapshot, config.autoencoder.name)))
        return
    manifest = _manifest(snapshot, config)
    folder = _folder(snapshot, config)
    if config.export.format == "openai" and manifest.bin_width != viewer_json.BIN_WIDTH:
        progress.say(f"export: bins are {manifest.bin_width} wide; the reference viewer draws {viewer_json.BIN_WIDTH}")
    made = folder.write(config, manifest)
    if config.export.format == "site":
        entry = Entry(name=manifest.autoencoder, path=_path(config, state_of(snapshot, manifest.autoencoder)))
        static_site.finish(config.export.folder, entry, config.export.warning)
    n_atoms = manifest.atoms[1] + 1 - manifest.atoms[0]
    progress.say(f"export: {n_atoms:,} atoms of {manifest.autoencoder} {'' if made else 'are '}in {folder.path}")


def written(snapshot: Snapshot, config: Run) -> tuple[Exported, list[int]] | None:
    """The manifest of what was exported of the atoms as they are now, and the bytes of each file; None if nothing."""
    if config.export.format == "html" or config.export.format in weights.FORMATS:
        return None
    try:
        source = _manifest(snapshot, config).source
    except IncompleteError:
        return None
    folder = _folder(snapshot, config)
    known = folder.known()
    if known is None or not known.complete or known.source != source:
        return None
    return known, folder.sizes()


def _format(config: Run) -> Format:
    return FORMATS[config.export.format]


def _manifest(snapshot: Snapshot, config: Run) -> Exported:
    name, format_ = config.autoencoder.name, config.export.format
    if format_ == "site":
        return static_site.dictionary(snapshot, name, config.export.atoms, complete=False)
    decimals = config.export.decimals
    made_from = origin(snapshot, name, config.export.atoms, decimals=decimals)
    return Manifest.model_validate({"format": format_, "complete": False, "decimals": decimals, **made_from})


def _folder(snapshot: Snapshot, config: Run) -> Folder:
    path = _path(config, state_of(snapshot, config.autoencoder.name))
    return Folder(storage.join(config.export.folder, path), _format(config))


def _path(config: Run, state: dict[str, Any]) -> str:
    """The autoencoder's folder below export.folder; raises ConfigError where the template has a fault."""
    subject, name = PurePath(config.subject.model).name, config.autoencoder.name
    values = {
        "subject": subject,
        "autoencoder": name,
        "corpus": config.corpus.name,
        "hook": config.subject.hook,
        "n_latents": str(state["n_latents"]),
        "k": str(state["k"]),
        "model_id": identifier(subject).lower(),
        "source_id": f"{layer(config.subject.hook)}-{identifier(name)}",
    }
    of_format = weights.PATH if config.export.format in weights.FORMATS else _format(config).path
    template = of_format if config.export.path is None else config.export.path
    try:
        named = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        path = template.format(**values) if named <= set(values) else ""
    except ValueError:
        path = ""
    parts = PurePath(path).parts
    if not parts or ".." in parts or PurePath(path).is_absolute():
        raise ConfigError(
            f"export.path: got {template!r}; expected a relative path without .., which may hold "
            + ", ".join(f"{{{name}}}" for name in values)
        )
    return path


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("export")
