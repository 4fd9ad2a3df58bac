"""The tokens of a corpus as flat arrays that are mapped into memory: token ids, offsets and documents of its contexts.

They are a cache and no table of the log: wholly made of `contexts` in seconds, and wanted only where a program needs
the tokens of single contexts at once. A file's name is a hash of the files that it was made of, so that a corpus that
was tokenized anew never gets what was made before; that is then deleted. The cache lies in the lake's folder, or in the
user's cache folder where that cannot be written to or is an object store.
"""

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae.jobs import formats, storage
from sae.jobs.lake import DataFile, Lake, Snapshot
from sae.schemas.errors import StorageError
from sae.schemas.tables import CORPUS_SHIFT

Array = npt.NDArray[Any]

_CACHE: Final = "_cache"
_PARTS: Final = ("token_ids", "offsets", "doc_id")
# Others may keep theirs in these folders.
_ARRAY: Final = re.compile(rf"(?P<corpus>[^/]+)/({'|'.join(_PARTS)})/(?P<name>[0-9a-f]{{16}})\.npy")
_BATCH_CONTEXTS: Final = 65_536
_MOST_IN_16_BITS: Final = 2**16


@dataclass(frozen=True)
class Tokens:
    """c contexts, mapped: token_ids uint16 or uint32 [t], offsets int64 [c + 1] into them, doc_id int64 [c]."""

    first_context: int
    token_ids: Array
    offsets: Array
    doc_id: Array

    def of(self, context_id: int) -> tuple[list[int], int]:
        """Token ids and document of a context; raises IndexError where the corpus has no such context."""
        ordinal = context_id - self.first_context
        if not 0 <= ordinal < len(self.doc_id):
            raise IndexError(f"context {context_id}")
        start, stop = self.offsets[ordinal], self.offsets[ordinal + 1]
        return self.token_ids[start:stop].tolist(), int(self.doc_id[ordinal])

    def of_each(self, context_id: Array) -> tuple[Array, Array, Array]:
        """Token ids [t] of contexts [m] in a row, where each begins and the last ends [m + 1]; documents [m].

        A context that the corpus does not have is empty.
        """
        ordinal = context_id - self.first_context
        known = (ordinal >= 0) & (ordinal < len(self.doc_id))
        ordinal = np.where(known, ordinal, 0)
        start = self.offsets[ordinal]
        lengths = np.where(known, self.offsets[ordinal + 1] - start, 0)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.repeat(start - ends[:-1], lengths) + np.arange(ends[-1])
        return self.token_ids[rows], ends, self.doc_id[ordinal]

    def at(self, context_id: Array, pos: Array) -> Array:
        """Token ids [m] at positions of contexts [m] that the corpus has."""
        found: Array = self.token_ids[self.offsets[context_id - self.first_context] + pos]
        return found


def open_tokens(lake: Lake, snapshot: Snapshot, corpus: str) -> Tokens:
    """The arrays of a corpus as the snapshot has it, made first where they are not there."""
    if found := find_tokens(lake, snapshot, corpus):
        return found
    name, folders = _name(snapshot, corpus), _folders(lake, corpus)
    files = _files(snapshot, corpus)
    first = _first(snapshot, corpus)
    largest = sum(file.rows for file in snapshot.select("vocabulary", corpus=corpus)) - 1
    kind = np.uint16 if largest < _MOST_IN_16_BITS else np.uint32
    for folder in folders:
        try:
            _make(lake, files, first, np.dtype(kind), _paths(folder, name))
            _remove_others(folder, name)
        except StorageError:
            if folder == folders[-1]:
                raise
        else:
            break
    made = _mapped(folder, name, first)
    assert made is not None
    return made


def find_tokens(lake: Lake, snapshot: Snapshot, corpus: str) -> Tokens | None:
    """The arrays of a corpus as the snapshot has it, where they are there."""
    name = _name(snapshot, corpus)
    found = (_mapped(folder, name, _first(snapshot, corpus)) for folder in _folders(lake, corpus))
    return next(filter(None, found), None)


def remove_stale(lake: Lake, *, temporary: bool = False) -> list[str]:
    """Deletes arrays that were not made of the newest version's contexts; returns their paths.

    With `temporary` also what writers that were killed have left, or live ones are about to finish.
    """
    snapshot = lake.snapshot()
    stale = [
        storage.join(root, path)
        for root in _roots(lake)
        for path in storage.list_files(root)
        if (array := _ARRAY.fullmatch(path)) and array["name"] != _name(snapshot, array["corpus"])
    ]
    if temporary:
        stale += [
            storage.join(root, path) for root in _roots(lake) for path in storage.list_files(root, temporary=True)
        ]
    for path in stale:
        storage.remove(path)
    return stale


def _files(snapshot: Snapshot, corpus: str) -> list[DataFile]:
    return sorted(snapshot.select("contexts", corpus=corpus), key=_first_context)


def _name(snapshot: Snapshot, corpus: str) -> str:
    """Of the arrays that are made of the corpus as the snapshot has it; no other has it."""
    return hashlib.sha256("".join(file.sha256 for file in _files(snapshot, corpus)).encode()).hexdigest()[:16]


def _first(snapshot: Snapshot, corpus: str) -> int:
    """The first context_id that the corpus can have."""
    first: int = snapshot.properties[f"corpus/{corpus}"]["number"] << CORPUS_SHIFT
    return first


def _first_context(file: DataFile) -> int:
    return file.contexts[0] if file.contexts else 0


def _roots(lake: Lake) -> list[str]:
    """Where arrays can be, the better place first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    of_lake = hashlib.sha256(lake.path.encode()).hexdigest()[:16]
    of_user = storage.join(cache, "sae", of_lake)
    return [lake.absolute(_CACHE), of_user] if storage.is_local(lake.path) else [of_user]


def _folders(lake: Lake, corpus: str) -> list[str]:
    return [storage.join(root, corpus) for root in _roots(lake)]


def _paths(folder: str, name: str) -> dict[str, str]:
    return {part: storage.join(folder, part, f"{name}.npy") for part in _PARTS}


def _mapped(folder: str, name: str, first: int) -> Tokens | None:
    try:
        arrays = {part: np.load(path, mmap_mode="r") for part, path in _paths(folder, name).items()}
    except (OSError, ValueError):  # not there, or cut off
        return None
    # Slices of plain arrays take half the time.
    return Tokens(first, **{part: np.asarray(array) for part, array in arrays.items()})


def _remove_others(folder: str, name: str) -> None:
    for path in storage.list_files(folder):
        if not path.endswith(f"{name}.npy"):
            storage.remove(storage.join(folder, path))


def _make(lake: Lake, files: list[DataFile], first: int, kind: np.dtype[Any], paths: dict[str, str]) -> None:
    sources = lake.verified(files)
    last = max((file.contexts[1] for file in files if file.contexts), default=first - 1)
    n_contexts, n_tokens = last + 1 - first, sum(map(formats.list_elements, sources))
    lengths = {"token_ids": n_tokens, "offsets": n_contexts + 1, "doc_id": n_contexts}
    kinds = {"token_ids": kind, "offsets": np.dtype(np.int64), "doc_id": np.dtype(np.int64)}
    with contextlib.ExitStack() as stack:
        staged = {part: stack.enter_context(storage.staged(path)) for part, path in paths.items()}
        arrays = {part: formats.new_array(staged[part], kinds[part], length) for part, length in lengths.items()}
        at = 0
        for source in sources:
            for batch in formats.batches(source, ["context_id", "doc_id", "token_ids"], _BATCH_CONTEXTS):
                at += _fill(arrays, batch, first, at)
        np.cumsum(arrays["offsets"], out=arrays["offsets"])
        for array in arrays.values():
            array.flush()


def _fill(arrays: dict[str, np.memmap[Any, Any]], batch: pa.RecordBatch, first: int, at: int) -> int:
    """Puts in a batch whose tokens begin at `at`; returns how many there are. Offsets are lengths for now."""
    ordinal = batch["context_id"].to_numpy() - first
    tokens = batch["token_ids"].flatten().to_numpy()
    arrays["token_ids"][at : at + len(tokens)] = tokens
    arrays["offsets"][ordinal + 1] = batch["token_ids"].value_lengths().to_numpy()
    arrays["doc_id"][ordinal] = batch["doc_id"].to_numpy()
    return len(tokens)
