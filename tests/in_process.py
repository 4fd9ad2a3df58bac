"""The work of the tiny run's Ray actors, done in this process: nothing to start, and errors come as they are."""

import json
from typing import Any

from sae.jobs import cli, encode, runs
from sae.jobs.encode import Encoder
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
