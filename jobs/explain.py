"""Step explain: what each atom fires on, as patterns of tokens (N2G), and how well they predict it elsewhere."""

import contextlib
import time
from typing import Any

import numpy as np
import pyarrow as pa

from sae.jobs import atom_units, checkpoints, cluster, contexts, drawn_contexts, progress, ranges, runs
from sae.jobs.atom_units import AtomUnits, Source
from sae.jobs.drawn_contexts import Drawn
from sae.jobs.lake import Lake, Range, Snapshot, write_views
from sae.n2g import pattern
from sae.n2g.build import Settings, pattern_of
from sae.n2g.compiled import Compiled
from sae.n2g.last_latents import LastLatents
from sae.n2g.probes import Prober
from sae.n2g.scores import scores
from sae.n2g.trie import Trie
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, ConflictError, IncompleteError
from sae.schemas.tables import EXPLANATIONS
from sae.subject import Subject, load_tokenizer, token_strings

_MAY_CHANGE = {"atoms", "batch_contexts", "unit_atoms"}


def run(config: Run) -> None:
    """Makes the explanations that are not in the lake, or were made from other examples."""
    lake, units = Lake(config.lake), units_of(config)
    snapshot = lake.snapshot()
    source = _source(snapshot, config)
    wanted = units.wanted(snapshot, config.explain.atoms)
    units.begin(lake, source)
    missing = units.missing(lake.snapshot(), wanted, config.explain.unit_atoms)
    if not missing:
        progress.say(f"explain: explanations of {config.autoencoder.name} are up to date")
        return
    sizes = {number: ranges.size([atoms]) for number, atoms in enumerate(missing)}
    given = (source, missing, _drawn(snapshot, config))
    with cluster.connected(config):
        n_actors = config.cluster.encode_actors
        rows = runs.each_unit(config, "explain", Explainer, given, n_actors, sizes, ranges.size([wanted]), "atoms")
    write_views(lake)
    if left := units.missing(lake.snapshot(), wanted, config.explain.unit_atoms):
        raise IncompleteError(f"explain: {ranges.size(left):,} atoms are still missing; run sae explain again")
    progress.say(f"explain: {rows:,} atoms of {config.autoencoder.name}")


def units_of(config: Run) -> AtomUnits:
    """Ranges of atoms of the run's autoencoder."""
    return AtomUnits("explain", "explanations", config.autoencoder.name)


def _source(snapshot: Snapshot, config: Run) -> Source:
    """What explanations are made from; raises as `atom_units.examples_source`."""
    made_from = atom_units.examples_source(snapshot, config)
    settings = config.explain.model_dump(mode="json", exclude=_MAY_CHANGE)
    return {**made_from, "seed": config.seed, **settings, "padding": _padding(config)}


def _padding(config: Run) -> int:
    """The token that replaces others: the one that the config gives, or the tokenizer's own."""
    model, given = config.subject.model, config.explain.padding
    tokenizer = load_tokenizer(model)
    if given is not None:
        ids = tokenizer.encode(given, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"explain.padding: got {given!r}, which is {len(ids)} tokens of {model}; give a text that is one"
            )
        return int(ids[0])
    own = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    found = next((one for one in own if one is not None), None)
    if found is None:
        raise ConfigError(
            f"explain.padding: the tokenizer of {model} has no token for it; give a text that is one token"
        )
    return int(found)


def _drawn(snapshot: Snapshot, config: Run) -> contexts.Array:
    return drawn_contexts.draw(snapshot, config.autoencoder.name, config.explain.contexts, config.seed)


class Explainer:
    """A Ray Data actor: holds subject and autoencoder, turns ranges of atoms, by number, into committed files."""

    def __init__(self, config: Run, source: Source, units: list[Range], drawn: contexts.Array, n_workers: int) -> None:
        device = cluster.use_device(n_workers)
        self._config, self._source, self._ranges = config, source, units
        self._lake, self._units = Lake(config.lake), units_of(config)
        subject = Subject.load(**config.subject.model_dump(), device=device)
        name, chosen = config.autoencoder.name, (config.encode.weights, config.encode.checkpoint)
        autoencoder = checkpoints.load(self._lake, name, *chosen).to(device)
        checkpoints.check_fit(autoencoder, subject, name)
        snapshot = self._lake.snapshot()
        width = contexts.state_of(snapshot, config.corpus.name, config.subject.model)["context_length"]
        at_once = cluster.contexts_at_once(config.explain.batch_contexts, width)
        self._prober = Prober(LastLatents(subject, autoencoder), at_once * width)
        self._settings = _settings(config, source["padding"], subject.context_limit)
        self._words = dict(enumerate(token_strings(subject.tokenizer)))
        self._drawn = Drawn.load(self._lake, snapshot, drawn, config.subject.masked_positions)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began, number = time.time(), int(batch["run"][0])
        atoms = self._ranges[number]
        snapshot, explain = self._lake.snapshot(), self._config.explain
        name = self._config.autoencoder.name
        examples = atom_units.examples(self._lake, snapshot, name, atoms, explain.kinds, explain.ranks)
        table = self._scored(snapshot, atoms, examples, self._tries(snapshot, atoms, examples))
        # Another attempt at this unit may have been first, with the same rows.
        with contextlib.suppress(ConflictError):
            self._units.commit(self._lake, atoms, table, self._source, began)
        return {"run": [number], "tokens": [0], "rows": [table.num_rows]}

    def _tries(self, snapshot: Snapshot, atoms: Range, examples: pa.Table) -> list[Trie]:
        """Of each atom."""
        ids, context = np.unique(examples["context_id"].to_numpy(), return_inverse=True)
        tokens = [tuple(each.tolist()) for each in atom_units.token_ids(self._lake, snapshot, ids)]
        atom, pos, act = (examples[key].to_pylist() for key in ("atom", "pos", "act"))
        found = self._prober.patterns(
            (atom[row], pattern_of(tokens[c][: pos[row] + 1], act[row], self._settings))
            for row, c in enumerate(context.tolist())
        )
        tries = [Trie(gap=self._settings.gap) for _ in range(atoms[0], atoms[1] + 1)]
        for of, one in zip(atom, found, strict=True):
            if one is not None:
                tries[of - atoms[0]].add(one)
        return tries

    def _scored(self, snapshot: Snapshot, atoms: Range, examples: pa.Table, tries: list[Trie]) -> pa.Table:
        """The rows of the table; explanations are not measured on the contexts of their own examples."""
        drawn, n = self._drawn, len(tries)
        built_from = examples["atom"].to_numpy().astype(np.int64) - atoms[0], examples["context_id"].to_numpy()
        predicted = drawn.without(Compiled(tries).match(drawn.tokens, drawn.offsets), *built_from)
        real = drawn.without(drawn.acts(self._lake, snapshot, self._config.autoencoder.name, atoms), *built_from)
        n_tokens = drawn.n_tokens(n, *built_from)
        patterns = [trie.patterns() for trie in tries]
        columns = {
            "atom": np.arange(atoms[0], atoms[1] + 1),
            "n_examples": np.bincount(built_from[0], minlength=n),
            "n_patterns": [len(each) for each in patterns],
            "patterns": [[pattern.text(one.elements, self._words) for one in each] for each in patterns],
            "acts": [[one.act for one in each] for each in patterns],
            "trie": [trie.to_json() for trie in tries],
            "n_tokens": n_tokens,
            **{key: _nulls(of) for key, of in scores(predicted, real, n_tokens)._asdict().items()},
        }
        return pa.table({key: columns[key] for key in EXPLANATIONS.names}).cast(EXPLANATIONS)


def _nulls(column: contexts.Array) -> pa.Array:
    """With null in the place of NaN."""
    return pa.array(column, from_pandas=True)


def _settings(config: Run, padding: int, limit: int) -> Settings:
    explain, masked = config.explain, config.subject.masked_positions
    lead = next(pos for pos in range(len(masked) + 1) if pos not in masked)
    given = explain.model_dump(include={"threshold", "saliency", "length", "gap"})
    return Settings(padding=padding, lead=lead, limit=limit, **given)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("explain")
