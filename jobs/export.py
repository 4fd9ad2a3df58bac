"""Step export: writes an autoencoder's atoms as the JSON files that the viewer reads, beside a manifest."""

import hashlib
import importlib.metadata
import json
import re
import string
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Final

import duckdb
from pydantic import ValidationError

import sae
from sae.jobs import checkpoints, progress, storage, views
from sae.jobs.lake import Lake, Snapshot, open_tables
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError
from sae.schemas.viewer import SIGN_CONVENTION, AtomFile, Manifest, Sequence

# Atoms gathered by one query: bounds the memory, and still lets each row group of latents be read about once.
_ATOMS_PER_QUERY: Final = 256
_VIEWER_BIN_WIDTH: Final = 0.2
_ATOM_FILE: Final = re.compile(r"[0-9]+(-ablated)?\.json")
_PACKAGES: Final = ("duckdb", "torch", "transformer_lens")


def run(config: Run) -> None:
    """Writes the files of all atoms or of `export.atoms`, unless they are there and nothing has changed."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    manifest = _manifest(snapshot, config)
    folder = storage.join(config.export.folder, _path(config, checkpoints.state_of(snapshot, config.autoencoder.name)))
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
    with progress.bar("export", len(numbers), "atoms") as bar:
        for atom, file in _atoms(lake, snapshot, manifest):
            text = file.model_dump_json(exclude_unset=True)
            storage.write_atomic(storage.join(folder, "atoms", f"{atom}.json"), text.encode())
            bar.advance(1)
    _write_manifest(folder, manifest.model_copy(update={"complete": True}))
    progress.say(f"export: {len(numbers):,} atoms of {manifest.autoencoder} in {folder}")


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
    for name in _atom_files(folder) - {f"{atom}.json" for atom in numbers}:
        storage.remove(storage.join(folder, "atoms", name))


def _write_manifest(folder: str, manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=2) + "\n"
    storage.write_atomic(storage.join(folder, "manifest.json"), text.encode())


def _atoms(lake: Lake, snapshot: Snapshot, manifest: Manifest) -> Iterator[tuple[int, AtomFile]]:
    whole = open_tables(lake, snapshot)
    vocabulary = {corpus: _vocabulary(whole, corpus) for corpus in manifest.corpora}
    first, last = manifest.atoms
    for low in range(first, last + 1, _ATOMS_PER_QUERY):
        high = min(low + _ATOMS_PER_QUERY - 1, last)
        given = {"autoencoder": manifest.autoencoder, "low": low, "high": high, "decimals": manifest.decimals}
        connection = open_tables(lake, snapshot, atoms=(low, high))
        connection.execute(views.query("export_atoms"), given)
        while row := connection.fetchone():
            yield row[0], _atom_file(row, vocabulary)


def _vocabulary(connection: duckdb.DuckDBPyConnection, corpus: str) -> list[str]:
    """Token strings by token id."""
    query = "select token from vocabulary where corpus = $1 order by token_id"
    return [token for (token,) in connection.execute(query, [corpus]).fetchall()]


def _atom_file(row: tuple[Any, ...], vocabulary: dict[str, list[str]]) -> AtomFile:
    _, density, mean_act, mean_act_squared, skew, kurtosis, bins, counts, top, random = row
    return AtomFile(
        density=density,
        mean_act=mean_act,
        mean_act_squared=mean_act_squared,
        skew=skew,
        kurtosis=kurtosis,
        hist={str(bin_): n for bin_, n in zip(bins, counts, strict=True)},
        top=[_sequence(example, vocabulary) for example in top or []],
        random=[_sequence(example, vocabulary) for example in random or []],
    )


def _sequence(example: dict[str, Any], vocabulary: dict[str, list[str]]) -> Sequence:
    token_ids, strings = example["token_ids"], vocabulary[example["corpus"]]
    acts = [0.0] * len(token_ids)
    for position, act in zip(example["positions"], example["acts"], strict=True):
        acts[position] = act
    return Sequence(
        tokens=[strings[token_id] for token_id in token_ids],
        acts=acts,
        act=example["act"],
        idx=example["idx"],
        doc_id=example["doc_id"],
        density=len(example["acts"]) / len(token_ids),
        token_ints=token_ids,
    )


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("export")
