"""The work of the tiny run's Ray actors, done in this process: nothing to start, and errors come as they are."""

import json
from typing import Any

from sae.jobs import cli, directions, effects, encode, explain, runs
from sae.jobs.effects import Ablator
from sae.jobs.encode import Encoder
from sae.jobs.explain import Explainer
from sae.jobs.harvest import Harvester
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run
from tests.tiny_run import Lab


def run_of(lab: Lab, **overrides: Any) -> Run:
    """The lab's config for its lake; `section__key=value` overrides it."""
    values = {"lake": str(lab.lake), **overrides}
    return cli.load_config(
        str(lab.config), [(key.replace("__", "."), json.dumps(value)) for key, value in values.items()]
    )


def train(lab: Lab, **overrides: Any) -> None:
    for _ in Trainer(run_of(lab, **overrides)).train():
        pass


def harvest_all(lab: Lab, **overrides: Any) -> None:
    config = run_of(lab, **overrides)
    run_tokens = config.encode.run_tokens
    plan, missing = runs.outstanding(Lake(config.lake).snapshot(), "harvest", "nobody", config.corpus.name, run_tokens)
    harvester = Harvester(config, run_tokens, plan, 1)
    for run in missing:
        harvester({"run": [run]})


def encoder(lab: Lab, **overrides: Any) -> Encoder:
    """A worker of an encode command that begins now."""
    config = run_of(lab, **overrides)
    lake = Lake(config.lake)
    encoding = encode._encoding(lake, config)
    name = config.autoencoder.name
    plan, _ = runs.outstanding(lake.snapshot(), "encode", name, config.corpus.name, encoding["run_tokens"])
    return Encoder(config, encoding, plan, 1)


def encode_all(lab: Lab, **overrides: Any) -> None:
    working = encoder(lab, **overrides)
    for run in range(working._plan.n_runs):
        working({"run": [run]})


def effects_all(lab: Lab, **overrides: Any) -> int:
    """What `sae effects` does; returns how many units of work were missing."""
    config = run_of(lab, **overrides)
    lake, name = Lake(config.lake), config.autoencoder.name
    source = effects._source(lake.snapshot(), config)
    effects._units(name).begin(lake, source)
    made_from = directions.sources(source, config)
    for table in directions.stale(lake.snapshot(), name, made_from):
        directions._make(config, table, made_from[table])
    missing = effects._missing(lake.snapshot(), config)
    if missing:
        ablator = Ablator(config, source, missing, 1)
        for number in range(len(missing)):
            ablator({"run": [number]})
    return len(missing)


def explain_all(lab: Lab, **overrides: Any) -> int:
    """What `sae explain` does; returns how many units of work were missing."""
    config = run_of(lab, **overrides)
    lake, units = Lake(config.lake), explain.units_of(config)
    source = explain._source(lake.snapshot(), config)
    wanted = units.wanted(lake.snapshot(), config.explain.atoms)
    units.begin(lake, source)
    missing = units.missing(lake.snapshot(), wanted, config.explain.unit_atoms)
    if missing:
        explainer = Explainer(config, source, missing, explain._drawn(lake.snapshot(), config), 1)
        for number in range(len(missing)):
            explainer({"run": [number]})
    return len(missing)
