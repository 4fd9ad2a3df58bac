"""Training in odd circumstances: two at once, an interruption, caches with gaps, other models, no login."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.errors import ConflictError
from tests.in_process import harvest_all, run_of, train
from tests.models import tiny_gpt2
from tests.tiny_run import NAME, Lab

SHORT = 640  # ten steps


def state(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = Lake(str(lab.lake)).snapshot().properties[f"autoencoder/{NAME}"]
    return found


def test_a_second_training_of_one_autoencoder_commits_nothing(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    first, second = (Trainer(run_of(lab, training__tokens=SHORT)).train() for _ in range(2))
    next(first)
    next(second)
    assert list(first)
    before = lab.bytes()
    with pytest.raises(ConflictError, match="another training of it commits too"):
        list(second)
    assert lab.bytes() == before


def test_fewer_tokens_after_an_interruption_complete_the_training(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    trainer = Trainer(run_of(lab))
    steps = trainer.train()
    next(steps)
    trainer.stop()
    list(steps)
    reached = state(lab)["tokens"]
    assert not state(lab)["complete"]
    result = lab.done("train", training__tokens=reached)
    assert result.lines == [f"train: {NAME} is trained on {reached:,} tokens"]
    assert state(lab)["complete"]


def test_the_cache_serves_a_training_that_holds_nothing_out(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    harvest_all(lab)
    train(lab, training__source="cached", training__validation=0, training__tokens=SHORT)
    assert state(lab)["complete"]


def test_the_cache_may_have_runs_without_a_token(lab: Lab, tmp_path: Path) -> None:
    """Documents of a single token, which is masked, are contexts all the same."""
    corpus = tmp_path / "rows.jsonl"
    text = "the quick brown fox paid yen " * 20
    corpus.write_text("".join(f'{{"text": "{line}"}}\n' for line in [*"aaaa", *[text] * 12, *"aaaa"]))
    there = lab.without_lake(tmp_path / "there")
    # Two contexts a run.
    given: dict[str, Any] = {"corpus__paths": [str(corpus)], "encode__run_tokens": 64}
    there.done("tokenize", **given)
    harvest_all(there, **given)
    cached = Lake(str(there.lake)).snapshot().select("activations")
    assert cached[0].rows == cached[-1].rows == 0
    train(there, training__source="cached", training__tokens=SHORT, **given)
    assert state(there)["complete"]


@pytest.mark.parametrize("step", ["train", "harvest"])
def test_another_models_tokens_are_refused(step: str, tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    other = str(tiny_gpt2(tmp_path / "other", d=16))
    result = lab.sae(step, subject__model=other)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert f"is tokenized for {lab.folder / 'model'}, now it is {other}" in result.stderr
    assert lab.bytes() == before


@pytest.mark.slow
def test_wandb_that_cannot_log_in_is_told_in_one_line(tokenized: Lab, tmp_path: Path) -> None:
    """In a process of its own, for wandb keeps its login and a service running."""
    lab = tokenized.copy(tmp_path)
    script = (
        "import sys; from sae.jobs.loggers import Logger; from sae.jobs.lake import Lake; from sae.jobs import cli\n"
        "from sae.schemas.errors import SaeError\n"
        "config = cli.load_config(sys.argv[1], [('lake', sys.argv[2]), ('training.log_to', '[wandb]')])\n"
        "try:\n    Logger(config, Lake(config.lake)).__enter__()\n"
        "except SaeError as error:\n    print(error)"
    )
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    environment = {**kept, "HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script, str(lab.config), str(lab.lake)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("training.log_to: wandb can't start (")
    assert "set WANDB_MODE=offline" in line


@pytest.mark.slow
def test_a_command_that_is_told_to_end_ends_as_if_interrupted(tokenized: Lab) -> None:
    """In a process of its own, which starts its own Ray: that takes SIGTERM for itself."""
    script = (
        "import os, signal, sys\nfrom sae.jobs import cli, cluster\n"
        "def told_to_end():\n"
        "    with cluster.connected(cli.load_config(sys.argv[1])):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "sys.exit(cli._guarded(told_to_end))"
    )
    command = [sys.executable, "-c", script, str(tokenized.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing that was committed is lost" in done.stderr
