"""Step effects: ablates atoms at their examples, and writes what that changes in the predictions of later tokens."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sae.effects import Ablation, Changes, Effects, Examples
from sae.jobs import checkpoints, cluster, contexts, directions, origin, progress, ranges, runs
from sae.jobs.lake import Lake, Range, Snapshot, write_views
from sae.jobs.token_cache import open_tokens
from sae.onward import Onward
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, ConflictError, IncompleteError, LakeError, SubjectError
from sae.schemas.tables import CORPUS_SHIFT, EFFECTS, EXAMPLES
from sae.subject import Subject

_KEY: Final = ("atom", "context_id", "pos")


def run(config: Run) -> None:
    """Makes the effects that are not in the lake, or were made of other examples."""
    lake = Lake(config.lake)
    name = config.autoencoder.name
    source = _source(lake.snapshot(), config)
    _wanted(lake.snapshot(), config)
    _begin(lake, name, source)
    made_from = directions.sources(source, config)
    missing = _missing(lake.snapshot(), config)
    if not missing and not directions.stale(lake.snapshot(), name, made_from):
        progress.say(f"effects: those of {name} are up to date")
        return
    with cluster.connected(config):
        directions.refresh(config, made_from)
        if missing:
            _ablate(config, lake, source, missing)
    write_views(lake)


def _ablate(config: Run, lake: Lake, source: dict[str, Any], missing: list[Range]) -> None:
    sizes = {number: ranges.size([atoms]) for number, atoms in enumerate(missing)}
    total = ranges.size([_wanted(lake.snapshot(), config)])
    given = (source, missing)
    rows = runs.each_unit(config, "effects", Ablator, given, config.cluster.encode_actors, sizes, total, "atoms")
    if left := _missing(lake.snapshot(), config):
        raise IncompleteError(f"effects: those of {ranges.size(left):,} atoms are still missing; run sae effects again")
    progress.say(f"effects: {rows:,} examples of {ranges.size(missing):,} atoms of {config.autoencoder.name}")


def _source(snapshot: Snapshot, config: Run) -> dict[str, Any]:
    """What effects are made from; raises IncompleteError where an earlier step has not finished.

    Raises ConfigError where the config gives another subject or other weights than the examples are from.
    """
    name = config.autoencoder.name
    checkpoints.check_made_with(checkpoints.state_of(snapshot, name), config, checkpoints.is_of_subject)
    encoded_with = snapshot.properties[f"encode/{name}"]["checkpoint"]
    weights = checkpoints.identity(snapshot, name, config.encode.weights, config.encode.checkpoint)
    if weights != encoded_with:
        raise ConfigError(
            f"its weights: the latents of {name} in {config.lake} were made with {encoded_with}, now it is {weights}; "
            "give the encode.weights and encode.checkpoint that they were made with, or encode anew after: "
            f"sae drop {config.lake} --latents {name}"
        )
    return {
        "checkpoint": weights,
        "aggregate": origin.digest(origin.merged_from(snapshot, name)),
        **config.effects.model_dump(mode="json", include={"kinds", "ranks", "votes"}),
    }


def _begin(lake: Lake, name: str, source: dict[str, Any]) -> None:
    """Takes out what was made from something else."""
    key = f"effects/{name}"
    snapshot = lake.snapshot()
    if snapshot.properties.get(key) == source:
        return
    with lake.transaction("effects") as transaction:
        transaction.remove(snapshot.select("effects", autoencoder=name))
        transaction.forget(sorted(unit for unit in snapshot.units if unit.startswith(f"{key}/")))
        transaction.set(key, source)


def _wanted(snapshot: Snapshot, config: Run) -> Range:
    """First and last of the atoms; raises ConfigError where there are no such."""
    n_latents = checkpoints.state_of(snapshot, config.autoencoder.name)["n_latents"]
    first, last = config.effects.atoms or (0, n_latents - 1)
    if not first <= last < n_latents:
        raise ConfigError(
            f"effects.atoms: got {first} to {last}; autoencoder {config.autoencoder.name} has atoms 0 to "
            f"{n_latents - 1}, give the first and the last that you want"
        )
    return first, last


def _missing(snapshot: Snapshot, config: Run) -> list[Range]:
    """Ranges of atoms whose effects are not there, each a unit of work."""
    effects = config.effects
    at_once = max(1, effects.unit_examples // (effects.ranks * len(set(effects.kinds))))
    left = ranges.without(_wanted(snapshot, config), _made(snapshot.units, config.autoencoder.name))
    return [(low, min(low + at_once - 1, last)) for first, last in left for low in range(first, last + 1, at_once)]


def _made(units: Iterable[str], name: str) -> list[Range]:
    """The ranges of atoms whose effects were committed."""
    prefix = f"effects/{name}/"
    found = (unit.removeprefix(prefix).split(":") for unit in units if unit.startswith(prefix))
    return [(int(first), int(last)) for first, last in found]


class Ablator:
    """A Ray Data actor: holds subject and autoencoder, turns ranges of atoms, by number, into committed files."""

    def __init__(self, config: Run, source: dict[str, Any], units: list[Range], n_workers: int) -> None:
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
        examples = self._examples(snapshot, atoms)
        table = self._effects(snapshot, examples) if examples.num_rows else EFFECTS.empty_table()
        # Another attempt at this unit may have been first, with the same rows.
        with contextlib.suppress(ConflictError):
            self._commit(atoms, table, began)
        return {"run": [number], "tokens": [0], "rows": [table.num_rows]}

    def _examples(self, snapshot: Snapshot, atoms: Range) -> pa.Table:
        """Atom, context_id and pos of the atoms' examples, each once, in order of their contexts."""
        effects, atom = self._config.effects, pc.field("atom")
        chosen = pc.field("kind").isin(list(effects.kinds)) & (pc.field("rank") < effects.ranks)
        of_atoms = (atom >= atoms[0]) & (atom <= atoms[1]) & chosen
        files = snapshot.select("examples", autoencoder=self._name)
        rows = self._lake.read(files, list(_KEY), of_atoms) if files else EXAMPLES.empty_table().select(_KEY)
        return (
            rows.group_by(list(_KEY))
            .aggregate([])
            .sort_by([(key, "ascending") for key in ("context_id", "atom", "pos")])
        )

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
        for key in _KEY:
            found = found.append_column(EFFECTS.field(key), examples[key])
        return found.select(EFFECTS.names).cast(EFFECTS).sort_by([(key, "ascending") for key in _KEY])

    def _padded(self, snapshot: Snapshot, ids: contexts.Array) -> tuple[Tensor, Tensor]:
        """Token ids [c, T] of contexts in order, zeros behind the end, and their lengths [c]."""
        found = list(self._token_ids(snapshot, ids))
        lengths = np.array(list(map(len, found)))
        states = (state for key, state in snapshot.properties.items() if key.startswith("corpus/"))
        numbers = set((ids >> CORPUS_SHIFT).tolist())
        width = max(state["context_length"] for state in states if state["number"] in numbers)
        padded = np.zeros((len(ids), width), np.int64)
        for row, token_ids in zip(padded, found, strict=True):
            row[: len(token_ids)] = token_ids
        return torch.from_numpy(padded), torch.from_numpy(lengths)

    def _token_ids(self, snapshot: Snapshot, ids: contexts.Array) -> Iterator[list[int]]:
        named = {
            state["number"]: key.removeprefix("corpus/")
            for key, state in snapshot.properties.items()
            if key.startswith("corpus/")
        }
        tokens = {
            number: open_tokens(self._lake, snapshot, named[number]) for number in set((ids >> CORPUS_SHIFT).tolist())
        }
        return (tokens[context_id >> CORPUS_SHIFT].of(context_id)[0] for context_id in ids.tolist())

    def _commit(self, atoms: Range, table: pa.Table, began: float) -> None:
        first, last = atoms
        key = f"effects/{self._name}"
        with self._lake.transaction("effects", f"{key}/{first}:{last}", began) as transaction:
            if not self._is_current(transaction.base):
                raise LakeError(f"effects: the examples of {self._name} changed meanwhile; run sae effects again")
            if table.num_rows:
                transaction.write("effects", table, autoencoder=self._name)
            transaction.require(self._is_current, f"examples of {self._name}: changed")
            transaction.require(
                lambda now: not ranges.within(_made(now.units, self._name), atoms),
                f"effects of {first} to {last}: made",
            )

    def _is_current(self, snapshot: Snapshot) -> bool:
        return snapshot.properties.get(f"effects/{self._name}") == self._source


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
