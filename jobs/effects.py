"""Step effects: ablates atoms at their examples, and writes what that changes in the predictions of later tokens."""

import contextlib
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sae.effects import Ablation, Effects, Examples
from sae.jobs import atom_units, checkpoints, cluster, contexts, directions, progress, ranges, runs
from sae.jobs.atom_units import KEY, AtomUnits, Source
from sae.jobs.lake import Lake, Range, Snapshot, write_views
from sae.kernels.changes import Changes
from sae.onward import Onward
from sae.schemas.config import Run
from sae.schemas.errors import ConflictError, IncompleteError, SubjectError
from sae.schemas.tables import CORPUS_SHIFT, EFFECTS
from sae.subject import Subject


def run(config: Run) -> None:
    """Makes the effects that are not in the lake, or were made of other examples."""
    lake = Lake(config.lake)
    name = config.autoencoder.name
    source = _source(lake.snapshot(), config)
    wanted = _units(name).wanted(lake.snapshot(), config.effects.atoms)
    _units(name).begin(lake, source)
    made_from = directions.sources(source, config)
    missing = _missing(lake.snapshot(), config)
    if not missing and not directions.stale(lake.snapshot(), name, made_from):
        progress.say(f"effects: those of {name} are up to date")
        return
    with cluster.connected(config):
        directions.refresh(config, made_from)
        if missing:
            _ablate(config, lake, source, missing, ranges.size([wanted]))
    write_views(lake)


def _ablate(config: Run, lake: Lake, source: Source, missing: list[Range], total: int) -> None:
    sizes = {number: ranges.size([atoms]) for number, atoms in enumerate(missing)}
    given = (source, missing)
    rows = runs.each_unit(config, "effects", Ablator, given, config.cluster.encode_actors, sizes, total, "atoms")
    if left := _missing(lake.snapshot(), config):
        raise IncompleteError(f"effects: those of {ranges.size(left):,} atoms are still missing; run sae effects again")
    progress.say(f"effects: {rows:,} examples of {ranges.size(missing):,} atoms of {config.autoencoder.name}")


def _source(snapshot: Snapshot, config: Run) -> Source:
    """What effects are made from; raises as `atom_units.examples_source`."""
    made_from = atom_units.examples_source(snapshot, config)
    settings: Source = config.effects.model_dump(mode="json", include={"kinds", "ranks", "votes"})
    return {**made_from, **settings}


def _units(name: str) -> AtomUnits:
    return AtomUnits("effects", "effects", name)


def _missing(snapshot: Snapshot, config: Run) -> list[Range]:
    """Ranges of atoms whose effects are not there, each a unit of work."""
    effects, units = config.effects, _units(config.autoencoder.name)
    at_once = max(1, effects.unit_examples // (effects.ranks * len(set(effects.kinds))))
    return units.missing(snapshot, units.wanted(snapshot, effects.atoms), at_once)


class Ablator:
    """A Ray Data actor: holds subject and autoencoder, turns ranges of atoms, by number, into committed files."""

    def __init__(self, config: Run, source: Source, units: list[Range], n_workers: int) -> None:
        device = cluster.use_device(n_workers)
        self._config, self._source, self._units = config, source, units
        self._lake, self._name = Lake(config.lake), config.autoencoder.name
        # The predictions need the layers behind the hook as well.
        subject = Subject.load(**{**config.subject.model_dump(), "layers": None}, device=device)
        chosen = config.encode.weights, config.encode.checkpoint
        autoencoder = checkpoints.load(self._lake, self._name, *chosen).to(device)
        checkpoints.check_fit(autoencoder, subject, self._name)
        width = contexts.state_of(self._lake.snapshot(), config.corpus.name)["context_length"]
        at_once = cluster.contexts_at_once(config.effects.batch_contexts, width)
        self._ablation = Ablation(Onward(subject), autoencoder, config.effects.votes, at_once)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began, number = time.time(), int(batch["run"][0])
        atoms = self._units[number]
        snapshot = self._lake.snapshot()
        given = self._config.effects
        examples = atom_units.examples(self._lake, snapshot, self._name, atoms, given.kinds, given.ranks)
        table = self._effects(snapshot, examples) if examples.num_rows else EFFECTS.empty_table()
        # Another attempt at this unit may have been first, with the same rows.
        with contextlib.suppress(ConflictError):
            _units(self._name).commit(self._lake, atoms, table, self._source, began)
        return {"run": [number], "tokens": [0], "rows": [table.num_rows]}

    def _effects(self, snapshot: Snapshot, examples: pa.Table) -> pa.Table:
        ids, context = np.unique(examples["context_id"].to_numpy(), return_inverse=True)
        token_ids, lengths = self._padded(snapshot, ids)
        columns = [context, *(examples[key].to_numpy().astype(np.int64) for key in ("pos", "atom"))]
        where = Examples(*map(torch.from_numpy, columns))
        parts = []
        for effects in self._ablation.effects(token_ids, lengths, where):
            if not all(bool(torch.isfinite(column).all()) for column in effects.changes):
                subject = self._config.subject
                raise SubjectError(
                    f"effects: predictions of {subject.model} are NaN or infinite in {subject.dtype}; encode anew with "
                    "subject.dtype float32 or bfloat16, or check the model's weights"
                )
            parts.append(table_of(effects))
        found = pa.concat_tables(parts)
        for key in KEY:
            found = found.append_column(EFFECTS.field(key), examples[key])
        return found.select(EFFECTS.names).cast(EFFECTS).sort_by([(key, "ascending") for key in KEY])

    def _padded(self, snapshot: Snapshot, ids: contexts.Array) -> tuple[Tensor, Tensor]:
        """Token ids [c, T] of contexts in order, zeros behind the end, and their lengths [c]."""
        found = atom_units.token_ids(self._lake, snapshot, ids)
        lengths = np.array(list(map(len, found)))
        states = (state for key, state in snapshot.properties.items() if key.startswith("corpus/"))
        numbers = set((ids >> CORPUS_SHIFT).tolist())
        width = max(state["context_length"] for state in states if state["number"] in numbers)
        padded = np.zeros((len(ids), width), np.int64)
        for row, token_ids in zip(padded, found, strict=True):
            row[: len(token_ids)] = token_ids
        return torch.from_numpy(padded), torch.from_numpy(lengths)


def table_of(effects: Effects) -> pa.Table:
    """Act and changes of examples in order, the columns of the table but for its key."""
    changes = effects.changes
    width = changes.up_by_logits.shape[1]
    ends = np.concatenate([[0], effects.n_later.cumsum(0).cpu().numpy()])
    columns = {"act": pa.array(effects.act.cpu().numpy())}
    for name, values in zip(Changes._fields, changes, strict=True):
        flat = values.cpu().flatten()
        offsets = pa.array((ends * (width if values.ndim > 1 else 1)).astype(np.int32))
        numbers = pa.array(flat.numpy()).cast(EFFECTS.field(name).type.value_type)
        columns[name] = pa.ListArray.from_arrays(offsets, numbers).cast(EFFECTS.field(name).type)
    return pa.table(columns)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("effects")
