"""Step export: writes an autoencoder's atoms as the JSON files that the viewer reads, beside a manifest."""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import string
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, Final

import ray
from pydantic import ValidationError
from ray.exceptions import RayError

import sae
from sae.jobs import checkpoints, cluster, progress, storage
from sae.jobs.lake import Lake, Range, Snapshot
from sae.jobs.pages import Pages
from sae.jobs.token_cache import open_tokens
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError
from sae.schemas.viewer import SIGN_CONVENTION, Manifest

# Atoms gathered at once: bounds the memory, and still lets each row group of latents be read about once.
_ATOMS_AT_ONCE: Final = 256
ATOMS_PER_TASK: Final = 1024
_PROGRESS: Final = "progress.json"
_VIEWER_BIN_WIDTH: Final = 0.2
_ATOM_FILE: Final = re.compile(r"[0-9]+(-ablated)?\.json")
_PACKAGES: Final = ("duckdb", "torch", "transformer_lens")


def run(config: Run) -> None:
    """Writes the files of all atoms or of `export.atoms`, unless they are there and nothing has changed."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    manifest = _manifest(snapshot, config)
    folder = _folder(snapshot, config)
    known = _known(folder)
    _check_owner(folder, known, manifest)
    numbers = range(manifest.atoms[0], manifest.atoms[1] + 1)
    if known and known.complete and known.source == manifest.source and _has_all(folder, numbers):
        progress.say(f"export: {len(numbers):,} atoms of {manifest.autoencoder} are in {folder}")
        return
    # An incomplete manifest comes first, so that a folder always says whose it is.
    _write_manifest(folder, manifest)
    if manifest.bin_width != _VIEWER_BIN_WIDTH:
        progress.say(f"export: bins are {manifest.bin_width} wide; the reference viewer draws {_VIEWER_BIN_WIDTH}")
    _remove_others(folder, numbers)
    seconds = _write_missing(config, folder, manifest, numbers)
    _write_manifest(folder, manifest.model_copy(update={"complete": True, "seconds": round(seconds, 3)}))
    storage.remove(storage.join(folder, _PROGRESS))
    progress.say(f"export: {len(numbers):,} atoms of {manifest.autoencoder} in {folder}")


def written(snapshot: Snapshot, config: Run) -> tuple[Manifest, list[int]] | None:
    """The manifest of what was exported of the atoms as they are now, and the bytes of each file; None if nothing."""
    try:
        source = _manifest(snapshot, config).source
    except IncompleteError:
        return None
    folder = _folder(snapshot, config)
    known = _known(folder)
    if known is None or not known.complete or known.source != source:
        return None
    return known, [file.size for file in storage.find(storage.join(folder, "atoms", "*.json"))]


def _folder(snapshot: Snapshot, config: Run) -> str:
    return storage.join(config.export.folder, _path(config, checkpoints.state_of(snapshot, config.autoencoder.name)))


def _write_missing(config: Run, folder: str, manifest: Manifest, numbers: range) -> float:
    """Writes the ranges of atoms that an earlier command, of the same source, has not noted as done.

    Returns the seconds that this and such earlier commands took.
    """
    start = time.monotonic()
    ranges = [(low, min(low + ATOMS_PER_TASK, numbers.stop) - 1) for low in numbers[::ATOMS_PER_TASK]]
    done, earlier = _done(folder, manifest.source)
    missing = [each for each in ranges if each not in done]
    before = sum(high + 1 - low for low, high in done)
    with progress.bar("export", len(numbers), "atoms", before) as bar:
        for low, high in _written_each(config, folder, manifest, missing):
            done.append((low, high))
            noted = {"source": manifest.source, "done": done, "seconds": earlier + time.monotonic() - start}
            storage.write_atomic(storage.join(folder, _PROGRESS), json.dumps(noted).encode())
            bar.advance(high + 1 - low)
    return earlier + time.monotonic() - start


def _done(folder: str, source: str) -> tuple[list[Range], float]:
    """The ranges whose files are there, and the seconds it took, as a command that was interrupted has noted it."""
    noted = json.loads(storage.read_if_there(storage.join(folder, _PROGRESS)) or "{}")
    if noted.get("source") != source:
        return [], 0.0
    return [(low, high) for low, high in noted["done"]], noted.get("seconds", 0.0)


def _written_each(config: Run, folder: str, manifest: Manifest, missing: list[Range]) -> Iterator[Range]:
    """Each range once its files are there; several are made in as many processes as there are processors."""
    # Relative paths are this process' own.
    given = Lake(config.lake).path, manifest.lake_version, manifest.autoencoder, manifest.decimals, _absolute(folder)
    if len(missing) < 2:
        for atoms in missing:
            yield _written(*given, atoms)
        return
    # Made here, so that not every process makes it.
    lake = Lake(config.lake)
    for corpus in manifest.corpora:
        open_tokens(lake, lake.snapshot(manifest.lake_version), corpus)
    with cluster.connected(config):
        task = ray.remote(num_cpus=1)(_written)
        pending = [task.remote(*given, atoms) for atoms in missing]
        try:
            while pending:
                (done,), pending = ray.wait(pending)
                yield ray.get(done)
        except RayError as error:
            raise cluster.cause(error) from None


def _written(path: str, version: int, autoencoder: str, decimals: int, folder: str, atoms: Range) -> Range:
    """Writes the files of a range of atoms; returns it."""
    pages = _pages(path, version, autoencoder, decimals)
    low, high = atoms
    # The disk works on some while the next ones are made.
    with ThreadPoolExecutor(1) as disk:
        waiting: Future[None] | None = None
        for first in range(low, high + 1, _ATOMS_AT_ONCE):
            made = pages.of((first, min(first + _ATOMS_AT_ONCE - 1, high)))
            files = [(f"{atom}.json", text) for atom, text in made]
            if waiting:
                waiting.result()
            waiting = disk.submit(storage.write_together, storage.join(folder, "atoms"), files)
        if waiting:
            waiting.result()
    return atoms


@functools.lru_cache(1)
def _pages(path: str, version: int, autoencoder: str, decimals: int) -> Pages:
    lake = Lake(path)
    return Pages(lake, lake.snapshot(version), autoencoder, decimals)


def _absolute(folder: str) -> str:
    return os.path.abspath(folder) if storage.is_local(folder) else folder


def merged_from(snapshot: Snapshot, name: str) -> list[str]:
    """Identity of the encoded runs that the autoencoder's atoms were merged from.

    Raises IncompleteError where nothing is merged, or other runs were since.
    """
    merged: list[str] | None = snapshot.properties.get(f"aggregate/{name}")
    if merged is None or merged != sorted(file.sha256 for file in snapshot.select("moments", autoencoder=name)):
        state = "not made" if merged is None else "older than its encoded runs"
        raise IncompleteError(f"autoencoder {name}: its atoms are {state}; run sae aggregate first")
    return merged


def _manifest(snapshot: Snapshot, config: Run) -> Manifest:
    name = config.autoencoder.name
    state = checkpoints.state_of(snapshot, name)
    encoding = snapshot.properties.get(f"encode/{name}", {})
    moments = snapshot.select("moments", autoencoder=name)
    merged = merged_from(snapshot, name)
    described = {
        "autoencoder": name,
        "checkpoint": encoding["checkpoint"],
        "bin_width": encoding["bin_width"],
        **{key: state[key] for key in ("model", "hook", "masked_positions", "n_latents", "k")},
        "trained_tokens": state["tokens"],
        "corpora": sorted({file.corpus for file in moments if file.corpus}),
        "n_tokens": sum(file.tokens for file in moments),
        "atoms": _atom_range(config, state["n_latents"]),
        "decimals": config.export.decimals,
        "sign_convention": SIGN_CONVENTION,
    }
    source = json.dumps([described, merged], sort_keys=True)
    return Manifest(
        complete=False,
        source=hashlib.sha256(source.encode()).hexdigest(),
        lake_version=snapshot.version,
        # A job's copy of the working directory is not an installed package.
        versions={"sae": sae.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        **described,
    )


def _atom_range(config: Run, n_latents: int) -> tuple[int, int]:
    first, last = config.export.atoms or (0, n_latents - 1)
    if not first <= last < n_latents:
        raise ConfigError(
            f"export.atoms: got {first} to {last}; autoencoder {config.autoencoder.name} has atoms 0 to "
            f"{n_latents - 1}, give the first and the last that you want"
        )
    return first, last


def _path(config: Run, state: dict[str, Any]) -> str:
    """The autoencoder's folder below export.folder; raises ConfigError where the template has a fault."""
    values = {
        "subject": PurePath(config.subject.model).name,
        "autoencoder": config.autoencoder.name,
        "corpus": config.corpus.name,
        "hook": config.subject.hook,
        "n_latents": str(state["n_latents"]),
        "k": str(state["k"]),
    }
    try:
        named = {field for _, field, _, _ in string.Formatter().parse(config.export.path) if field is not None}
        path = config.export.path.format(**values) if named <= set(values) else ""
    except ValueError:
        path = ""
    parts = PurePath(path).parts
    if not parts or ".." in parts or PurePath(path).is_absolute():
        raise ConfigError(
            f"export.path: got {config.export.path!r}; expected a relative path without .., which may hold "
            + ", ".join(f"{{{name}}}" for name in values)
        )
    return path


def _known(folder: str) -> Manifest | None:
    path = storage.join(folder, "manifest.json")
    if not storage.exists(path):
        return None
    try:
        return Manifest.model_validate_json(storage.read_bytes(path))
    except ValidationError:
        raise ConfigError(
            f"export.folder: {path} is not a manifest of this version; give another folder or delete this one"
        ) from None


def _check_owner(folder: str, known: Manifest | None, manifest: Manifest) -> None:
    """Raises ConfigError where writing would mix the files of two autoencoders."""
    if known is None:
        if _atom_files(folder):
            raise ConfigError(
                f"export.folder: {folder} holds atoms but no manifest.json; give another folder or delete this one"
            )
        return
    theirs, ours = ((of.autoencoder, of.model, of.hook) for of in (known, manifest))
    if theirs != ours:
        raise ConfigError(
            f"export.folder: {folder} holds autoencoder {theirs[0]} of {theirs[1]} at {theirs[2]}, not "
            f"{ours[0]} of {ours[1]} at {ours[2]}; "
            "give another export.folder or export.path, or delete this one"
        )


def _atom_files(folder: str) -> set[str]:
    listed = storage.list_files(storage.join(folder, "atoms"))
    return {name for name in listed if _ATOM_FILE.fullmatch(name)}


def _has_all(folder: str, numbers: range) -> bool:
    return _atom_files(folder) >= {f"{atom}.json" for atom in numbers}


def _remove_others(folder: str, numbers: range) -> None:
    """Removes what an earlier export left and this one does not replace: the manifest is not true of it."""
    atoms = storage.join(folder, "atoms")
    left = _atom_files(folder) - {f"{atom}.json" for atom in numbers}
    for name in (*left, *storage.list_files(atoms, temporary=True)):
        storage.remove(storage.join(atoms, name))


def _write_manifest(folder: str, manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=2) + "\n"
    storage.write_atomic(storage.join(folder, "manifest.json"), text.encode())


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("export")
