"""What a site's server answers: files of a folder, or files that are made from a lake when they are asked for."""

import hashlib
import mimetypes
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final, Protocol

import sae
from sae.jobs import bundled, site, storage
from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports import static_site
from sae.jobs.lake import Lake, Snapshot
from sae.schemas.errors import ConfigError, IncompleteError, StorageError
from sae.schemas.site import Dictionary, Entry, Site

_KEPT_BYTES: Final = 256 << 20
_NAME: Final = re.compile(r"[^./\\\0][^/\\\0]*")
_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".json": "application/json"}
_BINARY: Final = "application/octet-stream"


@dataclass(frozen=True)
class Content:
    """Bytes that can be read in part: `read(start, stop)`; the tag is another one where they are others."""

    size: int
    tag: str
    type: str
    read: Callable[[int, int], bytes]

    @classmethod
    def of(cls, path: str, data: bytes, tag: str | None = None) -> "Content":
        """Of a path's bytes, which are in memory."""
        tag = tag or hashlib.sha256(data).hexdigest()[:16]
        return cls(len(data), tag, type_of(path), lambda start, stop: data[start:stop])


class Served(Protocol):
    """What can be asked for by path; "" is the page."""

    def find(self, path: str) -> Content | None:
        """What is at a path; None where nothing is."""
        ...


def type_of(path: str) -> str:
    """The media type of a file."""
    ending = os.path.splitext(path)[1]
    return _TYPES.get(ending) or mimetypes.types_map.get(ending, _BINARY)


class FolderSite:
    """A site that was exported; raises ConfigError where the folder holds none."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        data = storage.read_if_there(storage.join(folder, static_site.SITE))
        if data is None:
            raise ConfigError(
                f"{folder}: neither a lake nor an exported site (it has no _log and no {static_site.SITE}); give a "
                "lake's folder, or one that sae export made with --export.format site"
            )

    def find(self, path: str) -> Content | None:
        """A file of the folder; nothing that is hidden, and nothing outside of it, wherever links may lead."""
        path = path or bundled.PAGE
        if not all(_NAME.fullmatch(name) for name in path.split("/")):
            return None
        full = storage.join(self._folder, path)
        if storage.is_local(full) and not _is_within(full, self._folder):
            return None
        try:
            size = storage.size_if_there(full)
        except StorageError:  # names that the disk cannot have
            return None
        if size is None:
            return None
        tag = f"{size:x}-{storage.modified(full):.6f}"
        return Content(size, tag, type_of(path), lambda start, stop: storage.read_range(full, start, stop))


def _is_within(path: str, folder: str) -> bool:
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


class LiveSite:
    """The newest version of a lake as a site; raises IncompleteError where none of its autoencoders has atoms."""

    def __init__(self, lake: Lake, *, subject: bool = False) -> None:
        self._lake, self._subject = lake, subject
        self._making = Lock()
        self._kept = _Kept(_KEPT_BYTES)
        self._version = _Version(lake, lake.snapshot())
        self._version.check()

    def find(self, path: str) -> Content | None:
        """A file of the viewer or of the site."""
        path = path or bundled.PAGE
        if path in bundled.files():
            return Content.of(path, bundled.files()[path])
        version = self._newest()
        key = version.tag, path
        # One at a time: readers of Parquet files are not for several threads, and the second asker finds it made.
        with self._making:
            data = self._kept.get(key)
            if data is None:
                data = self._made(version, path)
                if data is None:
                    return None
                self._kept.put(key, data)
        return Content.of(path, data, version.tag)

    def _newest(self) -> "_Version":
        snapshot = self._lake.snapshot()
        if snapshot.version != self._version.snapshot.version:
            self._version = _Version(self._lake, snapshot)
        return self._version

    def _made(self, version: "_Version", path: str) -> bytes | None:
        if path == static_site.SITE:
            entries = [Entry(name=name, path=name) for name in version.names]
            return Site(autoencoders=entries, live=True, subject=self._subject).model_dump_json().encode()
        name, _, file = path.partition("/")
        return version.file(name, file) if name in version.names else None


class _Version:
    """The files of a lake's autoencoders at one version."""

    def __init__(self, lake: Lake, snapshot: Snapshot) -> None:
        self._lake, self.snapshot = lake, snapshot
        self.tag = hashlib.sha256(f"{sae.__version__} {snapshot.version} {snapshot.entry}".encode()).hexdigest()[:16]
        self._reasons: list[IncompleteError] = []
        self._dictionaries = {each.autoencoder: each for each in map(self._dictionary, _autoencoders(snapshot)) if each}
        self.names = sorted(self._dictionaries)
        self._tables: dict[str, site.SiteTables] = {}

    def check(self) -> None:
        """Raises IncompleteError where there is nothing to show."""
        if not self.names:
            raise (
                self._reasons[0]
                if self._reasons
                else IncompleteError(f"{self._lake.path}: no autoencoder is in this lake; run sae run first")
            )

    def file(self, name: str, path: str) -> bytes | None:
        """A file of an autoencoder's folder."""
        dictionary = self._dictionaries[name]
        if path == "manifest.json":
            return dictionary.model_dump_json().encode()
        whole = static_site.WHOLE.get(path)
        if whole:
            return whole(self._site_tables(name), dictionary.atoms)
        table, _, rest = path.partition("/")
        number = rest.removesuffix(".parquet")
        of_block = static_site.OF_BLOCK.get(table)
        if of_block is None or not re.fullmatch(r"(0|[1-9][0-9]{0,8})\.parquet", rest):
            return None
        atoms = site.block(int(number), dictionary.atoms)
        return of_block(self._site_tables(name), int(number), atoms) if atoms[0] <= atoms[1] else None

    def _site_tables(self, name: str) -> site.SiteTables:
        if name not in self._tables:
            self._tables[name] = site.SiteTables(AtomTables(self._lake, self.snapshot, name))
        return self._tables[name]

    def _dictionary(self, name: str) -> Dictionary | None:
        try:
            return static_site.dictionary(self.snapshot, name, None)
        except IncompleteError as error:
            self._reasons.append(error)
            return None


def _autoencoders(snapshot: Snapshot) -> list[str]:
    prefix = "autoencoder/"
    return [key.removeprefix(prefix) for key in sorted(snapshot.properties) if key.startswith(prefix)]


class _Kept:
    """What was made last, of so many bytes."""

    def __init__(self, size: int) -> None:
        self._room = size
        self._values: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def get(self, key: tuple[str, str]) -> bytes | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: tuple[str, str], data: bytes) -> None:
        self._values[key] = data
        self._room -= len(data)
        while self._room < 0:
            self._room += len(self._values.popitem(last=False)[1])
