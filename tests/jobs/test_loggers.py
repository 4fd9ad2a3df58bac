"""Training metrics reach tensorboard and wandb, with their step."""

import importlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae.jobs.lake import Lake
from sae.jobs.loggers import Logger
from sae.schemas import config

_CONFIG = """
lake: {lake}
subject: {{model: any, hook: blocks.0.hook_resid_pre}}
corpus: {{name: texts, paths: [none.txt]}}
autoencoder: {{name: small, n_latents: 8, k: 2}}
training: {{log_to: [tensorboard]}}
"""


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    run = config.parse(_CONFIG.format(lake=tmp_path / "lake"))
    with Logger(run, Lake(run.lake, create=True)) as logger:
        logger.log([("train", 1, 64, "fvu", 0.5), ("train", 2, 128, "fvu", 0.25), ("validation", 2, 128, "l0", 2.0)])
    events = EventAccumulator(str(tmp_path / "lake" / "tensorboard" / "small"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/fvu")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("validation/l0")] == [(2, 2.0)]


_TWO_BESIDE_EACH_OTHER = """
import sys
from sae.jobs import cli
from sae.jobs.lake import Lake
from sae.jobs.loggers import Logger

loggers = []
for name in "ab":
    config = cli.load_config(sys.argv[1], [("autoencoder.name", name), ("training.log_to", "[wandb]")])
    loggers.append(Logger(config, Lake(config.lake, create=True)).__enter__())
for value, logger in enumerate(loggers):
    logger.log([("train", step, 64 * step, "fvu", value + step) for step in (1, 2)]
               + [("machine", step, 64 * step, "tokens_per_second", 9.0) for step in (1, 2)])
for value, logger in enumerate(loggers):
    logger.log([("train", 3, 192, "fvu", value + 3), ("validation", 3, 192, "l0", 2.0)])
    logger.__exit__(None, None, None)
"""


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file: a header, and a log of blocks as LevelDB's."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_shows_all_of_two_autoencoders_as_two_runs(tmp_path: Path) -> None:
    """In a process of its own, for wandb keeps a service running."""
    (tmp_path / "run.yaml").write_text(_CONFIG.format(lake=tmp_path / "lake"))
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    environment = {**kept, "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", _TWO_BESIDE_EACH_OTHER, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, list[dict[str, float]]] = {}
    for path in tmp_path.glob("wandb/offline-*/*.wandb"):
        records = [messages.Record.FromString(data) for data in wandb_records(path.read_bytes())]
        (name,) = (record.run.display_name for record in records if record.HasField("run"))
        shown = [record.history.item for record in records if record.HasField("history")]
        found[name] = [
            {key: float(item.value_json) for item in items if not (key := "".join(item.nested_key)).startswith("_")}
            for items in shown
        ]
    assert found == {
        name: [
            {"tokens": 64, "train/fvu": value + 1, "machine/tokens_per_second": 9},
            {"tokens": 128, "train/fvu": value + 2, "machine/tokens_per_second": 9},
            {"tokens": 192, "train/fvu": value + 3, "validation/l0": 2},
        ]
        for value, name in enumerate("ab")
    }
