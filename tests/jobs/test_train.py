"""Training in odd circumstances: two at once, an interruption, caches with gaps, other models, no login."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae.jobs import checkpoints, trainer
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.errors import ConflictError, CorpusError
from tests.in_process import harvest_all, run_of, train
from tests.models import tiny_gpt2
from tests.tiny_run import NAME, Lab, sae

SHORT = 640  # ten steps
SAVED_EVERY = 4  # steps
GIVEN: dict[str, Any] = {"training__tokens": SHORT, "training__checkpoint_tokens": SAVED_EVERY * 64}


def state(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = Lake(str(lab.lake)).snapshot().properties[f"autoencoder/{NAME}"]
    return found


def hashes(lab: Lab) -> list[str]:
    """Of the last checkpoint's files, weights and training state."""
    snapshot = Lake(str(lab.lake)).snapshot()
    return [snapshot.files[path].sha256 for path in checkpoints.paths(state(lab)["checkpoints"][-1])]


@pytest.fixture(scope="module")
def undisturbed(tokenized: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Trained on SHORT tokens, saved three times; not to be changed."""
    lab = tokenized.copy(tmp_path_factory.mktemp("undisturbed"))
    train(lab, **GIVEN)
    return lab


@pytest.mark.parametrize("n_saved", [0, 1])
@pytest.mark.parametrize("late", ["while the other trains", "when the other is done"])
def test_a_lost_rank_that_still_works_commits_nothing(
    late: str, n_saved: int, undisturbed: Lab, tokenized: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training that replaced it goes on from the last checkpoint, and comes to the same weights."""
    monkeypatch.setattr(trainer, "_REPORT_EVERY_S", 0.0)  # after each step
    lab = tokenized.copy(tmp_path)
    config = run_of(lab, **GIVEN)
    lost, replacement = (Trainer(config, claim=claim) for claim in (1, 2))
    of_lost = lost.train()
    for _ in range(1 + n_saved * SAVED_EVERY):
        next(of_lost)
    of_replacement = replacement.train()
    next(of_replacement)
    if late == "when the other is done":
        list(of_replacement)
    before = lab.bytes()
    with pytest.raises(ConflictError, match=f"^autoencoder {NAME}: another training of it began later"):
        list(of_lost)
    assert lab.bytes() == before
    list(of_replacement)
    assert state(lab)["complete"]
    assert hashes(lab) == hashes(undisturbed)
    assert lab.query("select count(*) from metrics where metric = 'fvu'").stdout == (
        undisturbed.query("select count(*) from metrics where metric = 'fvu'").stdout
    )


def test_a_lost_rank_that_has_not_yet_begun_takes_nothing_over(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    config = run_of(lab, **GIVEN)
    replacement = Trainer(config, claim=2).train()
    next(replacement)
    for claim in (1, 2):
        with pytest.raises(ConflictError, match="began later"):
            next(Trainer(config, claim=claim).train())
    list(replacement)
    assert state(lab)["complete"]


def test_what_a_lost_rank_saves_while_its_replacement_starts_is_gone_on_from(
    undisturbed: Lab, tokenized: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_REPORT_EVERY_S", 0.0)  # after each step
    lab = tokenized.copy(tmp_path)
    config = run_of(lab, **GIVEN)
    of_lost = Trainer(config, claim=1).train()
    next(of_lost)

    class Slow(Trainer):
        def _sample(self) -> Any:
            sample = super()._sample()
            for _ in range(SAVED_EVERY):
                next(of_lost)
            return sample

    of_replacement = Slow(config, claim=2).train()
    next(of_replacement)
    assert state(lab)["step"] == SAVED_EVERY
    with pytest.raises(ConflictError, match="began later"):
        list(of_lost)
    list(of_replacement)
    assert hashes(lab) == hashes(undisturbed)


def test_of_two_trainings_of_one_autoencoder_the_later_goes_on(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    first, second = (Trainer(run_of(lab, **GIVEN)).train() for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(ConflictError, match="let only one go on"):
        list(first)
    list(second)
    assert state(lab)["complete"]


def test_fewer_tokens_after_an_interruption_complete_the_training(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    begun = Trainer(run_of(lab))
    steps = begun.train()
    next(steps)
    begun.stop()
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


def test_the_part_that_is_held_out_is_told_as_it_was_given(tokenized: Lab, tmp_path: Path) -> None:
    told = "no token is left to train on once training.validation, 0.999 of it, is held out"
    with pytest.raises(CorpusError, match=told):
        train(tokenized.copy(tmp_path), training__validation=0.999)


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


@pytest.mark.parametrize("step", ["train", "encode", "evaluate", "aggregate"])
def test_checkpoints_of_an_older_sae_are_told_in_one_line(step: str, finished: Lab, tmp_path: Path) -> None:
    """They were one file each, and not a list of shards."""
    lab = finished.copy(tmp_path)
    key, now = f"autoencoder/{NAME}", state(lab)
    older = [{**one, **{kind: one[kind][0]["path"] for kind in ("model", "state")}} for one in now["checkpoints"]]
    with Lake(str(lab.lake)).transaction("test") as transaction:
        transaction.set(key, {**now, "checkpoints": older})
        for made in ("aggregate", "decoders", "evaluate"):
            transaction.set(f"{made}/{NAME}", None)
    before = lab.bytes()
    result = lab.sae(step)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert result.lines[0].startswith(f"error: autoencoder {NAME}: its checkpoints are those of an older sae")
    assert lab.bytes() == before
    assert sae("status", lab.lake).code == 0
    assert sae("drop", lab.lake, "--autoencoder", NAME).code == 0


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
