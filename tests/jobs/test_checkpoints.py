"""Checkpoints in shards: whoever wrote which latents, any others can be read; damage and failures leave no trace."""

import itertools
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.jobs import checkpoints
from sae.jobs.lake import Lake
from sae.jobs.measure import measure
from sae.jobs.trainee import Trainee
from sae.mesh import Mesh
from sae.schemas.errors import AutoencoderError, ConflictError, LakeError, SaeError
from sae.sharded import part_of
from tests.in_process import encoder, run_of, train
from tests.ranks import Ranks
from tests.tiny_run import NAME, Lab, sae

D = 3


def tensors(n: int) -> dict[str, Tensor]:
    """Some that have latents, on either axis and of several types, and some that have none."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "autoencoder.encoder.weight": draw(n, D),
        "autoencoder.latent_bias": draw(n).double(),
        "ema.decoder.weight": draw(D, n).bfloat16(),
        "autoencoder.stats_last_nonzero": torch.arange(n),
        "autoencoder.pre_bias": draw(D),
        "optimiser.step": torch.tensor(7),
    }


@dataclass(frozen=True)
class Split:
    """Who of several writers has which of n latents, and which of them are asked for."""

    n: int
    of_writers: list[list[range]]
    asked: list[range]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    n = draw(st.integers(1, 24))
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=8))})
    ranges = [range(*pair) for pair in itertools.pairwise(cuts)]
    writers = draw(st.lists(st.integers(0, 3), min_size=len(ranges), max_size=len(ranges)))
    of_writers = [[part for part, writer in zip(ranges, writers, strict=True) if writer == w] for w in range(4)]
    ends = sorted({*draw(st.lists(st.integers(0, n), max_size=6))})
    asked = [range(*pair) for pair in zip(ends[::2], ends[1::2], strict=False)]
    return Split(n, [latents for latents in of_writers if latents], asked or [range(n)])


def write(lake: Lake, split: Split) -> checkpoints.Shards:
    whole = tensors(split.n)
    with lake.transaction("test") as transaction:
        return [
            checkpoints.write_tensors(transaction, "checkpoints", "a", part_of(whole, latents), latents)
            for latents in split.of_writers
        ]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name


@pytest.fixture(scope="module")
def shared_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return Lake(str(tmp_path_factory.mktemp("shared") / "lake"), create=True)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"), create=True)


@given(splits())
def test_any_latents_are_read_whoever_wrote_them(shared_lake: Lake, split: Split) -> None:
    shards = write(shared_lake, split)
    whole, snapshot = tensors(split.n), shared_lake.snapshot()
    assert_equal(checkpoints.read(shared_lake, snapshot, shards), whole)
    assert_equal(checkpoints.read(shared_lake, snapshot, shards, split.asked), part_of(whole, split.asked))


def no_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def no_json(data: bytes) -> bytes:
    return data[:8] + b"[" + data[9:]


def another_name(data: bytes) -> bytes:
    return data.replace(b"encoder.weight", b"encoder.weighs", 1)


@pytest.mark.parametrize("damage", [no_header, no_json, another_name])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_named(lake: Lake, damage: Callable[[bytes], bytes], number: int) -> None:
    shards = write(lake, Split(8, [[range(4)], [range(4, 8)]], []))
    path = Path(lake.absolute(shards[number]["path"]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AutoencoderError, match=f"^{path}: damaged checkpoint .*restore the file from a copy$"):
        checkpoints.read(lake, lake.snapshot(), shards)


@pytest.mark.parametrize("n_bytes", [None, 0, 7, -1])
def test_a_truncated_or_missing_shard_is_named(lake: Lake, n_bytes: int | None) -> None:
    shards = write(lake, Split(8, [[range(4)], [range(4, 8)]], []))
    path = Path(lake.absolute(shards[1]["path"]))
    data = path.read_bytes()
    path.unlink()
    if n_bytes is not None:
        path.write_bytes(data[:n_bytes])
    with pytest.raises(LakeError, match=f"^{path}: .*restore the file from a copy$"):
        checkpoints.read(lake, lake.snapshot(), shards)


SCORES = st.lists(st.none() | st.sampled_from([0.5, 0.25, 0.125]), min_size=1, max_size=12)


@given(SCORES, st.integers(1, 4))
def test_the_last_ones_and_the_best_one_are_kept(scores: list[float | None], n_last: int) -> None:
    known: list[dict[str, Any]] = []
    for step, fvu in enumerate(scores):
        known = checkpoints.kept([*known, {"step": step, "fvu": fvu}], n_last)
    steps = [one["step"] for one in known]
    last = [*range(len(scores))][-n_last:]
    scored = [fvu for fvu in scores if fvu is not None]
    best = [scores.index(min(scored))] if scored else []
    assert steps == sorted({*last, *best})


def files(lake: Lake) -> set[str]:
    """All but the log."""
    folder = Path(lake.path)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("_log/")}


def handed_over(lake: Lake) -> list[Any]:
    """What another process has written."""
    transaction = lake.transaction("test")
    checkpoints.write_tensors(transaction, "checkpoints", "a", tensors(4), [range(4)])
    found = transaction.hand_over()
    transaction.discard()
    assert files(lake) >= {file.path for file in found}, "what was handed over is no longer its own to delete"
    return found


def test_files_of_another_process_are_committed_with_ones_own(lake: Lake) -> None:
    with lake.transaction("test") as transaction:
        transaction.adopt(handed_over(lake))
        checkpoints.write_tensors(transaction, "checkpoints", "a", tensors(4), [range(4)])
    assert len(files(lake)) == 2
    assert {*lake.snapshot().files} == files(lake)
    lake.collect_garbage(-1)
    assert {*lake.snapshot().files} == files(lake)


def commit(lake: Lake, meanwhile: Callable[[], None]) -> None:
    with lake.transaction("test") as transaction:
        transaction.adopt(handed_over(lake))
        checkpoints.write_tensors(transaction, "checkpoints", "a", tensors(4), [range(4)])
        transaction.set("autoencoder/a", 1)
        meanwhile()


def test_files_of_a_commit_that_fails_are_deleted_whoever_wrote_them(lake: Lake) -> None:
    def another_commits() -> None:
        with lake.transaction("test") as other:
            other.set("autoencoder/a", 2)

    def an_error() -> None:
        raise AutoencoderError("wrong")

    with pytest.raises(ConflictError, match="autoencoder/a"):
        commit(lake, another_commits)
    assert files(lake) == set()
    with pytest.raises(AutoencoderError, match="wrong"):
        commit(lake, an_error)
    assert files(lake) == set()
    assert lake.snapshot().properties == {"autoencoder/a": 2}


def test_steps_take_the_last_weights_or_their_average(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    train(lab, training__tokens=640)
    lake = Lake(str(lab.lake))
    snapshot = lake.snapshot()
    last = snapshot.properties[f"autoencoder/{NAME}"]["checkpoints"][-1]
    average, plain = (checkpoints.read(lake, snapshot, last[kind]) for kind in ("model", "state"))
    of_weights = {"average": average, "plain": {name: plain[f"autoencoder.{name}"] for name in average}}
    figures, identities = [], set()
    for weights, expected in of_weights.items():
        made = encoder(lab, encode__weights=weights)
        assert_equal(made._autoencoder.tensors(), expected)
        identities.add(made._encoding["checkpoint"])
        figures.append(measure(run_of(lab, encode__weights=weights), {}).metrics["fvu"])
    assert len(identities) == 2, "latents of both never mix"
    assert figures[0] != figures[1]


@pytest.fixture(scope="module")
def ranks(one_ray: None) -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.end()


def saved(mesh: Mesh, config: Any, full: int | None) -> str:
    """A training of one step is saved, while the disk of rank `full` takes but little; returns what is wrong."""
    lake = Lake(config.lake)
    subject = {"model": config.subject.model, "hook": config.subject.hook, "d_model": D}
    trainee = Trainee(config, lake, lake.snapshot(), subject, "cpu", mesh, 1)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    trainee.start(x)
    trainee.commit_as(0)
    trainee.step(1, x[mesh.dp.share(len(x))])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mesh.everyone.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, limit[1]))
        trainee.save(x)
    except (SaeError, OSError) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return ""


@pytest.mark.long
def test_where_the_disk_of_one_rank_is_full_no_file_of_any_remains(
    ranks: Ranks, tokenized: Lab, tmp_path: Path
) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    config = run_of(lab, autoencoder__k=2, autoencoder__auxk=0)
    for full in range(2):
        found = ranks.on_mesh(2, 1, saved, config, full)
        assert "File too large" in found[full]
        assert "File too large" in found[0], "the first rank commits, and tells"
        assert lab.bytes() == before
    assert ranks.on_mesh(2, 1, saved, config, None) == ["", ""]
    lake = Lake(config.lake)
    shards = {file.path for kind in ("checkpoints", "training_states") for file in lake.snapshot().select(kind)}
    assert len(shards) == 4
    assert sae("verify", lab.lake).code == 0
    assert sae("drop", lab.lake, "--autoencoder", NAME).code == 0
    assert shards <= files(lake)
    assert set(sae("gc", lab.lake, "--older-than", "0").stdout.split()) > shards
    assert not shards & files(lake)
