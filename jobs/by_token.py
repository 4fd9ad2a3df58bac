"""The table `latents_by_token`: a copy of each run in the order of tokens, for questions about documents and tokens.

A run has its copy whole or not at all: what takes rows out of a run takes its copy out, and the view reads runs that
have none from `latents`. Files there are sorted by atom, so that as many contexts as fit into memory are gathered and
sorted at once. Before a compaction the rows of a run lie in one file, after it in all: that is the time to copy it.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae.jobs import formats, merge, progress, ranges
from sae.jobs.lake import DataFile, Lake, Range, Snapshot
from sae.schemas.errors import ConflictError, LakeError
from sae.schemas.tables import LATENTS, LATENTS_BY_TOKEN
from sae.statistics import ACT_CODES, Fields, act_of

TABLE: Final = "latents_by_token"
_ROW_BYTES: Final = 32
"""Memory that a row takes at most while its block is read and sorted. Measured."""
_TABLE_ROWS: Final = 1 << 20  # handed over at once: a multiple of the Parquet row group

Makes = Callable[[functools.partial[int], Sequence[Any]], Iterable[int]]


@dataclass(frozen=True)
class _Run:
    """A run to copy, as its moments know it."""

    moments: DataFile
    contexts: Range
    rows: int


@dataclass(frozen=True)
class _Group:
    """Runs of a corpus that are copied together, and their contexts: those of a block are in memory at once."""

    runs: tuple[_Run, ...]
    blocks: tuple[tuple[Range, ...], ...]
    fields: Fields


def missing(snapshot: Snapshot, name: str) -> list[DataFile]:
    """The moments of the autoencoder's runs that have latents and no copy of them, in order of corpus and run."""
    copied = {(file.corpus, file.run) for file in snapshot.select(TABLE, autoencoder=name)}
    moments = snapshot.select("moments", autoencoder=name)
    found = [file for file in moments if file.rows and file.contexts and (file.corpus, file.run) not in copied]
    return sorted(found, key=lambda file: (file.corpus or "", file.run or 0))


def refresh(lake: Lake, name: str, memory: int, made: Makes = map) -> int:
    """Copies the runs that have no copy, in groups that take so many bytes of memory; returns how many runs it copied.

    `made` calls a function on each of its arguments, one after the other unless told otherwise.
    """
    snapshot = lake.snapshot()
    runs = [_Run(file, file.contexts, _rows(lake, file)) for file in missing(snapshot, name) if file.contexts]
    groups = list(_groups(snapshot, name, runs, memory // _ROW_BYTES))
    lake.check_room(sum(run.rows for run in runs) * 4)
    n_copied = 0
    with progress.bar(f"copy {name} by token", len(runs), "runs") as bar:
        for n in made(functools.partial(_copied, lake.path, name), groups):
            n_copied += n
            bar.advance(n)
    return n_copied


def _rows(lake: Lake, moments: DataFile) -> int:
    """Latents of a run."""
    return int(lake.read([moments], ["n_active"])["n_active"].to_numpy().sum())


def _groups(snapshot: Snapshot, name: str, runs: list[_Run], most_rows: int) -> Iterator[_Group]:
    """Runs that follow each other, as many as fit; a run that is too large by itself has several blocks."""
    n_latents = snapshot.properties[f"autoencoder/{name}"]["n_latents"]
    for corpus, of_corpus in itertools.groupby(runs, key=lambda run: run.moments.corpus):
        width = snapshot.properties[f"corpus/{corpus}"]["context_length"]
        bits = 63 - sum(Fields(width - 1, n_latents - 1, ACT_CODES - 1).widths)
        if bits < 0:
            raise LakeError(f"{name}: its atoms and positions don't fit 63 bits; encode shorter contexts of {corpus}")
        fields = Fields((1 << bits) - 1, width - 1, n_latents - 1, ACT_CODES - 1)
        together: list[_Run] = []
        for run in of_corpus:
            if together and _blocks([*together, run], most_rows, 1 << bits) > 1:
                yield _group(together, most_rows, fields)
                together = []
            together.append(run)
        yield _group(together, most_rows, fields)


def _blocks(runs: list[_Run], most_rows: int, most_contexts: int) -> int:
    """In how many blocks the runs fit."""
    span = runs[-1].contexts[1] + 1 - runs[0].contexts[0]
    return max(-(-sum(run.rows for run in runs) // most_rows), -(-span // most_contexts))


def _group(runs: list[_Run], most_rows: int, fields: Fields) -> _Group:
    n_blocks = _blocks(runs, most_rows, 1 << fields.widths[0])
    whole = ranges.united(run.contexts for run in runs)
    if n_blocks == 1:
        return _Group(tuple(runs), (tuple(whole),), fields)
    ((first, last),) = whole
    at_once = -(-(last + 1 - first) // n_blocks)
    blocks = tuple(((low, min(low + at_once - 1, last)),) for low in range(first, last + 1, at_once))
    return _Group(tuple(runs), blocks, fields)


def _copied(path: str, name: str, group: _Group) -> int:
    """Commits the copies of a group's runs, unless they were dropped or copied meanwhile; returns how many."""
    lake = Lake(path)
    snapshot = lake.snapshot()
    runs = [run for run in group.runs if run.moments.path in snapshot.files]
    files = _sources(snapshot, name, runs)
    blocks: Iterable[_Block] = (_Block.read(lake, files, contexts, group.fields) for contexts in group.blocks)
    if len(runs) > 1:
        blocks = list(blocks)
    n_copied = 0
    for run in runs:
        rows = itertools.chain.from_iterable(block.rows(run.contexts) for block in blocks)
        n_copied += _commit(lake, name, run, rows)
    return n_copied


def _sources(snapshot: Snapshot, name: str, runs: list[_Run]) -> list[DataFile]:
    """The files that hold the latents of some runs of a corpus: their own, and merged ones where some have none."""
    wanted = {(run.moments.corpus, run.moments.run): run.contexts for run in runs}
    files = snapshot.select("latents", autoencoder=name)
    own = {(file.corpus, file.run): file for file in files if (file.corpus, file.run) in wanted}
    elsewhere = [contexts for key, contexts in wanted.items() if key not in own]
    merged = [file for file in files if file.run is None]
    return [*own.values(), *(file for file in merged if file.contexts and ranges.within(elsewhere, file.contexts))]


def _commit(lake: Lake, name: str, run: _Run, rows: Iterator[pa.Table]) -> bool:
    named: dict[str, Any] = {"autoencoder": name, "corpus": run.moments.corpus, "run": run.moments.run}
    with contextlib.suppress(ConflictError), lake.transaction("by_token") as transaction:
        file = transaction.write(TABLE, rows, tokens=run.moments.tokens, contexts=run.contexts, **named)
        if file.rows != run.rows:
            raise LakeError(
                f"{lake.path}: run {run.moments.run} of {run.moments.corpus} by {name} has {file.rows:,} latents, its "
                f"moments count {run.rows:,}; drop the run and encode it again"
            )
        transaction.require(lambda now: run.moments in missing(now, name), f"run {run.moments.run}: copied or dropped")
        return True
    return False


@dataclass(frozen=True)
class _Block:
    """The latents of some contexts as sorted integers: context from the first on, position, atom, activation."""

    first: int
    fields: Fields
    keys: npt.NDArray[np.int64]

    @classmethod
    def read(cls, lake: Lake, files: list[DataFile], contexts: Sequence[Range], fields: Fields) -> Self:
        found = [np.empty(0, np.int64)]
        for path in lake.verified(files):
            file = formats.parquet(path)
            for group in formats.row_groups(path):
                if ranges.within(contexts, group.contexts):
                    rows = formats.columns(path, file, group.number, LATENTS.names)
                    kept = ranges.contains(contexts, rows["context_id"])
                    context, pos, atom, act = (rows[key][kept] for key in ("context_id", "pos", "atom", "act"))
                    found.append(fields.pack(context - contexts[0][0], pos, atom, merge.act_codes(act, path)))
        keys = np.concatenate(found)
        keys.sort()
        return cls(contexts[0][0], fields, keys)

    def rows(self, contexts: Range) -> Iterator[pa.Table]:
        """Those of a range of contexts, a part at a time."""
        below = self.fields.below_first
        low, high = max(contexts[0] - self.first, 0), min(contexts[1] - self.first, (1 << self.fields.widths[0]) - 1)
        start = int(np.searchsorted(self.keys, low << below))
        stop = int(np.searchsorted(self.keys, ((high + 1) << below) - 1, side="right"))
        for at in range(start, stop, _TABLE_ROWS):
            part = self.keys[at : min(at + _TABLE_ROWS, stop)]
            context, pos, atom, code = self.fields.unpack(part, np.int64, np.uint16, np.int32, np.int32)
            yield pa.table([atom, context + self.first, pos, act_of(code)], schema=LATENTS_BY_TOKEN)
