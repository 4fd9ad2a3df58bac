"""A folder of exported files: written range by range in several processes, gone on with after an interruption."""

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import ray
from pydantic import ValidationError
from ray.exceptions import RayError

from sae.jobs import cluster, progress, storage
from sae.jobs.atom_tables import AtomTables
from sae.jobs.lake import Lake, Range
from sae.jobs.token_cache import open_tokens
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from sae.schemas.origin import Exported

ATOMS_PER_TASK: Final = 1024
MANIFEST: Final = "manifest.json"
_PROGRESS: Final = "progress.json"

File = tuple[str, bytes]
"""A path relative to the folder, and what is there."""
Writer = Callable[[Range], Iterator[File]]


@dataclass(frozen=True)
class Format:
    """A format with a folder for each autoencoder.

    `writer` gives what makes the files of a range of atoms, of which it is given as many as are `at_once`, from a
    multiple of that number on: it bounds the memory, and still lets each row group of latents be read about once.
    `names` are these files', `maybe` those of files that a range need not have, `owned` all that any export of the
    format can have; `rest` are files of no range. `path` is the folder where none is chosen.
    """

    name: str
    title: str
    manifest: type[Exported]
    at_once: int
    writer: Callable[[AtomTables, Any], Writer]
    names: Callable[[Range], Iterator[str]]
    owned: re.Pattern[str]
    path: str = "{subject}/v5_l8_postmlp/n{n_latents}/k{k}"  # which the reference viewer routes to
    maybe: Callable[[Range], Iterator[str]] = lambda atoms: iter(())
    rest: Callable[[AtomTables, Any], Iterator[File]] = lambda tables, manifest: iter(())


@dataclass(frozen=True)
class Folder:
    """Where the files of one autoencoder are, or will be."""

    path: str
    format: Format

    def known(self) -> Exported | None:
        """What the files were made from; raises ConfigError where that cannot be read."""
        path = storage.join(self.path, MANIFEST)
        data = storage.read_if_there(path)
        if data is None:
            return None
        try:
            known = self.format.manifest.model_validate_json(data)
        except ValidationError:
            known = None
        if known is None or known.format != self.format.name:
            raise ConfigError(
                f"export.folder: {path} is not a manifest of this version and of format {self.format.name}; give "
                "another folder or delete this one"
            )
        return known

    def sizes(self) -> list[int]:
        """The bytes of each file of a range."""
        return [storage.size(storage.join(self.path, name)) for name in self._files()]

    def write(self, config: Run, manifest: Exported) -> bool:
        """Makes the files as the manifest says, unless they are there; returns whether they were not.

        Raises ConfigError where this would mix the files of two autoencoders.
        """
        known = self.known()
        self._check_owner(known, manifest)
        if known and known.complete and known.source == manifest.source and self._has_all(manifest.atoms):
            return False
        # An incomplete manifest comes first, so that a folder always says whose it is.
        self._write_manifest(manifest.model_copy(update={"complete": False}))
        self._remove_others(manifest, known)
        seconds = self._write_missing(config, manifest)
        self._write_manifest(manifest.model_copy(update={"complete": True, "seconds": round(seconds, 3)}))
        storage.remove(storage.join(self.path, _PROGRESS))
        return True

    def _write_missing(self, config: Run, manifest: Exported) -> float:
        """Writes the ranges of atoms that an earlier command, of the same source, has not noted as done.

        Returns the seconds that this and such earlier commands took.
        """
        start = time.monotonic()
        done, earlier = self._done(manifest.source)
        missing = [each for each in cut(manifest.atoms, ATOMS_PER_TASK) if each not in done]
        before = sum(high + 1 - low for low, high in done)
        with progress.bar("export", manifest.atoms[1] + 1 - manifest.atoms[0], "atoms", before) as bar:
            for low, high in _written_each(config, self, manifest, missing):
                done.append((low, high))
                noted = {"source": manifest.source, "done": done, "seconds": earlier + time.monotonic() - start}
                storage.write_atomic(storage.join(self.path, _PROGRESS), json.dumps(noted).encode())
                bar.advance(high + 1 - low)
        for name, data in self.format.rest(_tables(config.lake, manifest.lake_version, manifest.autoencoder), manifest):
            storage.write_atomic(storage.join(self.path, name), data)
        return earlier + time.monotonic() - start

    def _done(self, source: str) -> tuple[list[Range], float]:
        """The ranges whose files are there, and the seconds it took, as an interrupted command has noted it."""
        noted = json.loads(storage.read_if_there(storage.join(self.path, _PROGRESS)) or "{}")
        if noted.get("source") != source:
            return [], 0.0
        return [(low, high) for low, high in noted["done"]], noted.get("seconds", 0.0)

    def _check_owner(self, known: Exported | None, manifest: Exported) -> None:
        if known is None:
            if self._files():
                raise ConfigError(
                    f"export.folder: {self.path} holds {self.format.title} but no {MANIFEST}; give another folder or "
                    "delete this one"
                )
            return
        theirs, ours = ((of.autoencoder, of.model, of.hook) for of in (known, manifest))
        if theirs != ours:
            raise ConfigError(
                f"export.folder: {self.path} holds autoencoder {theirs[0]} of {theirs[1]} at {theirs[2]}, not "
                f"{ours[0]} of {ours[1]} at {ours[2]}; "
                "give another export.folder or export.path, or delete this one"
            )

    def _files(self) -> set[str]:
        return {name for name in storage.list_files(self.path) if self.format.owned.fullmatch(name)}

    def _has_all(self, atoms: Range) -> bool:
        return self._files() >= set(self.format.names(atoms))

    def _remove_others(self, manifest: Exported, known: Exported | None) -> None:
        """Removes what an earlier export left and this one does not replace: the manifest is not true of it."""
        replaced = set(self.format.names(manifest.atoms))
        if known and known.source == manifest.source:
            replaced.update(self.format.maybe(manifest.atoms))
        for name in (*self._files() - replaced, *storage.list_files(self.path, temporary=True)):
            storage.remove(storage.join(self.path, name))

    def _write_manifest(self, manifest: Exported) -> None:
        text = manifest.model_dump_json(indent=2) + "\n"
        storage.write_atomic(storage.join(self.path, MANIFEST), text.encode())


def cut(atoms: Range, length: int) -> list[Range]:
    """The range in parts that begin at multiples of the length, but for the first."""
    starts = range(atoms[0] // length * length, atoms[1] + 1, length)
    return [(max(start, atoms[0]), min(start + length - 1, atoms[1])) for start in starts]


def _written_each(config: Run, folder: Folder, manifest: Exported, missing: list[Range]) -> Iterator[Range]:
    """Each range once its files are there; several are made in as many processes as there are processors."""
    lake = Lake(config.lake)
    # Relative paths are this process' own.
    given = lake.path, Folder(_absolute(folder.path), folder.format), manifest
    if len(missing) < 2:
        for atoms in missing:
            yield _written(*given, atoms)
        return
    # Made here, so that not every process makes it.
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


def _written(lake: str, folder: Folder, manifest: Exported, atoms: Range) -> Range:
    """Writes the files of a range of atoms; returns it."""
    write = _writer(lake, folder.format, manifest.model_dump_json())
    # The disk works on some while the next ones are made.
    with ThreadPoolExecutor(1) as disk:
        waiting: Future[None] | None = None
        for part in cut(atoms, folder.format.at_once):
            files = list(write(part))
            if waiting:
                waiting.result()
            waiting = disk.submit(_put, folder.path, files)
        if waiting:
            waiting.result()
    return atoms


def _put(folder: str, files: list[File]) -> None:
    by_folder: dict[str, list[File]] = {}
    for path, data in files:
        inner, _, name = path.rpartition("/")
        by_folder.setdefault(inner, []).append((name, data))
    for inner, those in by_folder.items():
        storage.write_together(storage.join(folder, inner) if inner else folder, those)


@functools.lru_cache(1)
def _writer(lake: str, format_: Format, manifest: str) -> Writer:
    made = format_.manifest.model_validate_json(manifest)
    return format_.writer(_tables(lake, made.lake_version, made.autoencoder), made)


def _tables(path: str, version: int, autoencoder: str) -> AtomTables:
    lake = Lake(path)
    return AtomTables(lake, lake.snapshot(version), autoencoder)


def _absolute(folder: str) -> str:
    return os.path.abspath(folder) if storage.is_local(folder) else folder
