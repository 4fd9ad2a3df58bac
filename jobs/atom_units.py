"""What steps share that make rows of atoms from their examples, a range of atoms being a unit of work."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae.jobs import checkpoints, contexts, origin, ranges
from sae.jobs.lake import Lake, Range, Snapshot
from sae.jobs.token_cache import open_tokens
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, LakeError
from sae.schemas.tables import CORPUS_SHIFT, EXAMPLES

Source = dict[str, Any]
"""What rows are made from: where it changes, they are made anew."""

KEY: Final = ("atom", "context_id", "pos")


def examples_source(snapshot: Snapshot, config: Run) -> Source:
    """The weights and examples of the run's autoencoder; raises IncompleteError where an earlier step has not finished.

    Raises ConfigError where the config gives another subject or other weights than the examples are from.
    """
    name = config.autoencoder.name
    checkpoints.check_made_with(checkpoints.state_of(snapshot, name), config, checkpoints.is_of_subject)
    merged = origin.digest(origin.merged_from(snapshot, name))
    encoded_with = snapshot.properties[f"encode/{name}"]["checkpoint"]
    weights = checkpoints.identity(snapshot, name, config.encode.weights, config.encode.checkpoint)
    if weights != encoded_with:
        raise checkpoints.other_weights(snapshot, config, encoded_with)
    return {"checkpoint": weights, "aggregate": merged}


@dataclass(frozen=True)
class AtomUnits:
    """Of a step and its table: units STEP/AUTOENCODER/FIRST:LAST, and the property STEP/AUTOENCODER, their source."""

    step: str
    table: str
    autoencoder: str

    @property
    def key(self) -> str:
        return f"{self.step}/{self.autoencoder}"

    def begin(self, lake: Lake, source: Source) -> None:
        """Takes out what was made from something else."""
        snapshot = lake.snapshot()
        if self.is_current(snapshot, source):
            return
        with lake.transaction(self.step) as transaction:
            transaction.remove(snapshot.select(self.table, autoencoder=self.autoencoder))
            transaction.forget(sorted(unit for unit in snapshot.units if unit.startswith(f"{self.key}/")))
            transaction.set(self.key, source)

    def is_current(self, snapshot: Snapshot, source: Source) -> bool:
        found: bool = snapshot.properties.get(self.key) == source
        return found

    def wanted(self, snapshot: Snapshot, given: Range | None) -> Range:
        """First and last of the atoms; raises ConfigError where there are no such."""
        n_latents = checkpoints.state_of(snapshot, self.autoencoder)["n_latents"]
        first, last = given or (0, n_latents - 1)
        if not first <= last < n_latents:
            raise ConfigError(
                f"{self.step}.atoms: got {first} to {last}; autoencoder {self.autoencoder} has atoms 0 to "
                f"{n_latents - 1}, give the first and the last that you want"
            )
        return first, last

    def missing(self, snapshot: Snapshot, wanted: Range, at_once: int) -> list[Range]:
        """Ranges of wanted atoms whose rows are not there, each a unit of work of so many atoms at most."""
        left = ranges.without(wanted, self.made(snapshot.units))
        return [(low, min(low + at_once - 1, last)) for first, last in left for low in range(first, last + 1, at_once)]

    def made(self, units: Iterable[str]) -> list[Range]:
        """The ranges of atoms whose rows were committed."""
        prefix = f"{self.key}/"
        found = (unit.removeprefix(prefix).split(":") for unit in units if unit.startswith(prefix))
        return [(int(first), int(last)) for first, last in found]

    def commit(self, lake: Lake, atoms: Range, rows: pa.Table, source: Source, began: float) -> None:
        """Raises LakeError where the source of the rows is another one now, ConflictError where others made some."""
        name, (first, last) = self.autoencoder, atoms
        with lake.transaction(self.step, f"{self.key}/{first}:{last}", began) as transaction:
            if not self.is_current(transaction.base, source):
                raise LakeError(f"{self.step}: the examples of {name} changed meanwhile; run sae {self.step} again")
            if rows.num_rows:
                transaction.write(self.table, rows, autoencoder=name)
            transaction.require(lambda now: self.is_current(now, source), f"examples of {name}: changed")
            transaction.require(
                lambda now: not ranges.within(self.made(now.units), atoms), f"{self.table} of {first} to {last}: made"
            )


def examples(lake: Lake, snapshot: Snapshot, name: str, atoms: Range, kinds: Iterable[str], ranks: int) -> pa.Table:
    """Atom, context_id, pos and act of the first examples of each kind, each once, in order of contexts and atoms."""
    atom, columns = pc.field("atom"), [*KEY, "act"]
    chosen = pc.field("kind").isin(list(kinds)) & (pc.field("rank") < ranks)
    of_atoms = (atom >= atoms[0]) & (atom <= atoms[1]) & chosen
    files = snapshot.select("examples", autoencoder=name)
    rows: pa.Table = lake.read(files, columns, of_atoms) if files else EXAMPLES.empty_table().select(columns)
    return rows.group_by(columns).aggregate([]).sort_by([(key, "ascending") for key in ("context_id", "atom", "pos")])


def token_ids(lake: Lake, snapshot: Snapshot, ids: contexts.Array) -> list[contexts.Array]:
    """The tokens of contexts [c] of any corpora."""
    numbers = ids >> CORPUS_SHIFT
    found: list[contexts.Array] = [np.empty(0, np.int64)] * len(ids)
    named = {state["number"]: key for key, state in snapshot.properties.items() if key.startswith("corpus/")}
    for number in np.unique(numbers).tolist():
        corpus = open_tokens(lake, snapshot, named[number].removeprefix("corpus/"))
        rows = np.flatnonzero(numbers == number)
        flat, ends, _ = corpus.of_each(ids[rows])
        for row, tokens in zip(rows, np.split(flat, ends[1:-1]), strict=True):
            found[row] = tokens
    return found
