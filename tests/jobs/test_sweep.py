"""Several autoencoders trained from the same batches in one run: each as if it were alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sae.jobs import checkpoints
from sae.jobs.lake import Lake, connect
from sae.jobs.trainer import Trainer, shares
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from tests.in_process import run_of
from tests.tiny_run import Lab, sae, tiny_config

BATCH, SHORT = 64, 20 * 64
SHAPES: list[dict[str, Any]] = [
    {"name": "small", "n_latents": 64, "k": 4, "auxk": 8},
    {"name": "large", "n_latents": 160, "k": 8, "auxk": 16},
    {"name": "odd", "n_latents": 51, "k": 3, "auxk": 0},
]
# Latents die, so that AuxK is at work; and two checkpoints are made.
SETTINGS: dict[str, Any] = {"tokens": SHORT, "dead_tokens": 200, "checkpoint_tokens": 640, "clip_norm": 1.0}


def lab_of(folder: Path, lake: Lab, *shapes: dict[str, Any], **training: Any) -> Lab:
    """A run of some autoencoders on a copy of a lake."""
    config = tiny_config(lake.folder)
    del config["autoencoder"]
    config["autoencoders"] = list(shapes)
    config["training"] |= SETTINGS | training
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    copied = lake.copy(folder)
    return Lab(folder, copied.lake)


def train(lab: Lab, **overrides: Any) -> None:
    """In this process, with one thread: sums of matrix products depend on their number."""
    trainer = Trainer(run_of(lab, **overrides))
    torch.set_num_threads(1)
    for _ in trainer.train():
        pass


def state(lab: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = Lake(str(lab.lake)).snapshot().properties[f"autoencoder/{name}"]
    return found


def tensors(lab: Lab, name: str) -> dict[str, Tensor]:
    """Weights and the whole training state at the last checkpoint."""
    lake = Lake(str(lab.lake))
    last = state(lab, name)["checkpoints"][-1]
    found = {kind: checkpoints.read(lake, lake.snapshot(), last[kind]) for kind in ("model", "state")}
    return {f"{kind}/{key}": tensor for kind, of in found.items() for key, tensor in of.items()}


def metrics(lab: Lab, name: str) -> list[Any]:
    """What does not depend on the machine."""
    query = (
        f"select phase, step, tokens, metric, value from metrics where autoencoder = '{name}' and phase <> 'machine'"
    )
    return connect(str(lab.lake)).sql(f"{query} order by all").fetchall()


def assert_same_end(one: Lab, other: Lab, name: str) -> None:
    mine, theirs = tensors(one, name), tensors(other, name)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not mine[key].equal(theirs[key])] == []
    of_steps = [[row for row in metrics(lab, name) if row[0] == "train"] for lab in (one, other)]
    assert of_steps[0] == of_steps[1]


def assert_same(one: Lab, other: Lab, name: str) -> None:
    assert_same_end(one, other, name)
    assert metrics(one, name) == metrics(other, name)
    mine_known, their_known = (
        {key: value for key, value in state(lab, name).items() if key != "checkpoints"} for lab in (one, other)
    )
    assert mine_known == their_known


@pytest.fixture(scope="module")
def alone(tokenized: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All autoencoders, each trained by a command of its own, in one lake."""
    folder = tmp_path_factory.mktemp("alone")
    lab = lab_of(folder, tokenized, SHAPES[0])
    for shape in SHAPES:
        train(lab, autoencoders=[shape], training__lanes=2)
    return lab


@pytest.fixture(scope="module")
def swept(tokenized: Lab, one_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All of them by one command on two workers."""
    lab = lab_of(tmp_path_factory.mktemp("swept"), tokenized, *SHAPES, log_to=["tensorboard"])
    result = lab.done("train", cluster__dp=2, training__lanes=2)
    lines = [line for line in result.lines if "held out" in line]
    assert [line.split(", ")[0] for line in lines] == [f"train: {shape['name']}" for shape in SHAPES]
    for line, shape in zip(lines, SHAPES, strict=True):
        (fvu,) = (
            value
            for phase, step, _, metric, value in metrics(lab, shape["name"])
            if (phase, step, metric) == ("validation", SHORT // BATCH, "fvu")
        )
        assert f"held out: fvu {fvu:.4g}, " in line
    return lab


def test_on_one_worker_each_is_as_if_alone(alone: Lab, tokenized: Lab, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, tokenized, *SHAPES)
    train(lab, training__lanes=2)
    for shape in SHAPES:
        assert_same(lab, alone, shape["name"])


@pytest.mark.long
def test_on_two_workers_each_is_as_if_alone(alone: Lab, swept: Lab) -> None:
    for shape in SHAPES:
        assert_same(swept, alone, shape["name"])


def test_each_is_measured_in_every_step_once(swept: Lab) -> None:
    query = "select autoencoder, phase, step, metric from metrics"
    counted = Counter(connect(str(swept.lake)).sql(query).fetchall())
    assert set(counted.values()) == {1}
    measured = {"loss", "normalized_mse", "fvu", "l0", "dead", "grad_norm", "lr"}
    for shape in SHAPES:
        of = [key[1:] for key in counted if key[0] == shape["name"]]
        steps = range(1, SHORT // BATCH + 1)
        assert {key[1:] for key in of if key[0] == "train"} == {(step, name) for step in steps for name in measured}
        assert {key[1:] for key in of if key[0] == "machine"} == {(step, "tokens_per_second") for step in steps}


def test_tensorboard_shows_each(swept: Lab) -> None:
    for shape in SHAPES:
        events = EventAccumulator(str(swept.lake / "tensorboard" / shape["name"]))
        events.Reload()
        shown = {event.step: event.value for event in events.Scalars("train/fvu")}
        rows = metrics(swept, shape["name"])
        assert shown == {row[1]: pytest.approx(row[4], rel=1e-6) for row in rows if row[::3] == ("train", "fvu")}


def test_those_that_saw_other_batches_are_not_trained_together(tokenized: Lab, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, tokenized, *SHAPES[:2])
    for shape, lanes in zip(SHAPES, (1, 2), strict=False):
        train(lab, autoencoders=[shape], training__lanes=lanes, training__tokens=BATCH)
    before = lab.bytes()
    with pytest.raises(ConfigError, match=r"were begun with \[1, 2\] lanes.*train them one by one"):
        train(lab)
    assert lab.bytes() == before


def test_several_are_not_split(tokenized: Lab, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, tokenized, *SHAPES[:2])
    result = lab.sae("train", cluster__tp=2)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert "cluster.tp: got 2, but several autoencoders are trained whole" in result.stderr


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 6))
def test_ranks_share_the_work(sizes: list[int], n_ranks: int) -> None:
    """Each is somebody's, and nobody has more than the least busy and one autoencoder together."""
    values = tiny_config(Path("nowhere"))
    del values["autoencoder"]
    values["autoencoders"] = [{"name": f"a{i}", "n_latents": size, "k": 1} for i, size in enumerate(sizes)]
    several = Run.model_validate(values).each()
    found = shares(several, n_ranks)
    assert len(found) == n_ranks
    names = sorted(one.autoencoder.name for of in found for one in of)
    assert names == sorted(one.autoencoder.name for one in several)
    loads = [sum(one.autoencoder.n_latents for one in of) for of in found]
    assert max(loads) <= min(loads) + max(sizes)


@pytest.mark.parametrize(("small", "large"), [(10, 5), (20, 5), (0, 20)])
def test_a_training_goes_on_from_different_steps(
    alone: Lab, tokenized: Lab, tmp_path: Path, small: int, large: int
) -> None:
    """As after an interruption between two commits, or where one was added to the list."""
    lab = lab_of(tmp_path, tokenized, *SHAPES[:2])
    for shape, steps in zip(SHAPES, (small, large), strict=False):
        if steps:
            train(lab, autoencoders=[shape], training__lanes=2, training__tokens=steps * BATCH)
    finished = {name: state(lab, name) for name in ("small", "large") if known(lab, name) == SHORT}
    # The lanes are those of the ones that were begun, or of the finished ones.
    train(lab)
    for name in ("small", "large"):
        assert_same_end(lab, alone, name)
    assert all(state(lab, name) == before for name, before in finished.items())


def known(lab: Lab, name: str) -> int:
    """Tokens that an autoencoder is trained on."""
    return int(Lake(str(lab.lake)).snapshot().properties.get(f"autoencoder/{name}", {"tokens": 0})["tokens"])


@pytest.mark.long
def test_every_step_heeds_the_list(alone: Lab, tokenized: Lab, one_ray: None, tmp_path: Path) -> None:
    """Steps of the text are done once, those of an autoencoder for each; a second run changes nothing."""
    first, second = (shape["name"] for shape in SHAPES[:2])
    lab = Lab(lab_of(tmp_path, tokenized, *SHAPES[:2]).folder, alone.copy(tmp_path / "trained").lake)
    result = lab.done("run", encode__run_tokens=4096)
    told = [line for line in result.lines if ": autoencoder " in line]
    steps = ("encode", "compact", "aggregate", "effects", "explain", "evaluate", "export")
    assert told == [f"{step}: autoencoder {name}" for step in steps for name in (first, second)]
    atoms = "select autoencoder, count(*) from atoms group by 1 order by 1"
    assert connect(str(lab.lake)).sql(atoms).fetchall() == [(second, 160), (first, 64)]
    evaluated = "select distinct autoencoder from metrics where phase = 'evaluate' order by 1"
    assert connect(str(lab.lake)).sql(evaluated).fetchall() == [(second,), (first,)]
    exported = sorted(len([*path.parent.rglob("atoms/*[0-9].json")]) for path in tmp_path.rglob("manifest.json"))
    assert exported == [64, 160]
    before = lab.bytes()
    lab.done("run", encode__run_tokens=4096)
    assert lab.bytes() == before
    shown = sae("status", lab.lake).stdout
    assert all(any(line.startswith(name) for line in shown.splitlines()) for name in (first, second, "odd"))
    assert "unfinished: nothing" in shown
    dropped = sae("drop", lab.lake, "--autoencoder", second)
    assert dropped.code == 0, dropped.stderr
    assert connect(str(lab.lake)).sql(atoms).fetchall() == [(first, 64)]
    assert sae("gc", lab.lake, "--older-than", "0").code == 0
    assert sae("verify", lab.lake).code == 0


def test_a_faulty_autoencoder_of_a_list_is_named(tokenized: Lab, tmp_path: Path) -> None:
    """No step of a later one is begun."""
    lab = lab_of(tmp_path, tokenized, *SHAPES[:2])
    result = lab.sae("encode")
    assert result.code == 1
    assert result.lines[0] == "encode: autoencoder small"
    assert result.lines[1].startswith("error: autoencoder small: not in this lake")
    assert len(result.lines) == 2


def test_resume_may_be_said(alone: Lab) -> None:
    result = sae("train", alone.config, "--lake", alone.lake, "--training.lanes", "2", "--resume")
    assert (result.code, result.lines) == (0, [f"train: small is trained on {SHORT:,} tokens"]), result.stderr
