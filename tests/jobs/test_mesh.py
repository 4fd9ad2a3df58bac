"""Training on a mesh of Ray actors: any mesh goes on from any other, whoever is killed, and wrong set-ups are told."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from sae.jobs import checkpoints, lake, placement, progress, ranks
from sae.jobs import train as step_train
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, LakeError, StorageError
from tests.in_process import run_of, train
from tests.tiny_run import NAME, Lab, Result

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_ray")]
SHORT, LONG, FOR_EVER = 1280, 2560, 640_000  # tokens; 64 are a step, 640 a checkpoint
WITHIN_S = 120.0
ALSO = {"training__lanes": 2}


def state(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = Lake(str(lab.lake)).snapshot().properties.get(f"autoencoder/{NAME}", {"tokens": 0})
    return found


def metrics(lab: Lab) -> dict[tuple[str, int, str], float]:
    """All values but what a clock measured, by phase, step and name."""
    found = lake.connect(str(lab.lake)).sql("select phase, step, metric, value from metrics where phase <> 'machine'")
    return {(phase, step, name): value for phase, step, name, value in found.fetchall()}


def hashes(lab: Lab) -> list[str]:
    """Of the last checkpoint's files, weights and training state."""
    last = state(lab)["checkpoints"][-1]
    return [Lake(str(lab.lake)).snapshot().files[path].sha256 for path in checkpoints.paths(last)]


def processes() -> list[psutil.Process]:
    """The living ranks of this test's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if (process.cmdline() or [""])[0].startswith("ray::Trainer"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(happened: Callable[[], Any]) -> bool:
    """Whether it does within WITHIN_S."""
    tick = threading.Event()
    return any(happened() or tick.wait(0.05) for _ in range(int(WITHIN_S / 0.05)))


@contextmanager
def once(happened: Callable[[], Any], act: Callable[[], None]) -> Iterator[None]:
    """Acts in the background as soon as something has happened, within the block."""

    def wait() -> None:
        if until(happened):
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


@pytest.fixture(scope="module")
def undisturbed(tokenized: Lab, one_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Trained on two ranks that share the rows; not to be changed."""
    lab = tokenized.copy(tmp_path_factory.mktemp("undisturbed"))
    lab.done("train", cluster__dp=2, training__tokens=LONG)
    return lab


def test_any_mesh_goes_on_where_another_stopped(tokenized: Lab, undisturbed: Lab, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone, lab = tokenized.copy(tmp_path / "alone"), undisturbed.copy(tmp_path)
    train(alone, training__tokens=2 * LONG, **ALSO)
    lab.done("train", cluster__tp=2, training__tokens=LONG + SHORT)
    assert len(state(lab)["checkpoints"][-1]["model"]) == 2
    of_two = checkpoints.load(Lake(str(lab.lake)), NAME)
    train(lab, training__tokens=2 * LONG)
    assert len(state(lab)["checkpoints"][-1]["model"]) == 1
    assert metrics(lab) == pytest.approx(metrics(alone), rel=1e-4)
    whole, expected_whole = (checkpoints.load(Lake(str(one.lake)), NAME) for one in (lab, alone))
    assert of_two.encoder.weight.shape == whole.encoder.weight.shape
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, expected_whole.tensors()[name], rtol=1e-3, atol=1e-4)


def told(result: Result) -> list[str]:
    """All lines but those that a slow machine adds: once a minute, how far it is."""
    return [line for line in result.lines if " tokens/s, " not in line]


def refused(result: Result) -> str:
    """The one line."""
    assert result.code == 1, result.stderr
    (line,) = told(result)
    return line


def test_a_killed_rank_is_replaced(tokenized: Lab, undisturbed: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    survivors: list[psutil.Process] = []

    def kill() -> None:
        victim, *others = processes()
        survivors.extend(others)
        victim.kill()

    with once(lambda: state(lab)["tokens"], kill):
        result = lab.done("train", cluster__dp=2, training__tokens=LONG)
    lost, next_step, done = told(result)
    assert lost.startswith("train: a worker was lost (rank ")
    assert lost.endswith("1 of 3 times (training.max_failures)")
    assert next_step.startswith("train: the next step was done ")
    assert done.startswith(f"train: {NAME}, {LONG:,} tokens")
    assert (hashes(lab), metrics(lab)) == (hashes(undisturbed), metrics(undisturbed))
    assert len(survivors) == 1
    assert until(lambda: not any(one.is_running() for one in survivors))
    assert until(lambda: not processes())


def test_a_rank_that_may_not_be_lost(tokenized: Lab, undisturbed: Lab, tmp_path: Path) -> None:
    """The command says so and ends; the next one goes on."""
    lab = tokenized.copy(tmp_path)
    given: dict[str, Any] = {"cluster__dp": 2, "training__tokens": LONG, "training__max_failures": 0}
    with once(lambda: state(lab)["tokens"], lambda: processes()[-1].kill()):
        result = lab.sae("train", **given)
    line = refused(result)
    assert "a worker was lost (rank " in line
    assert "more than training.max_failures, 0, times" in line
    assert 0 < state(lab)["tokens"] < LONG
    lab.done("train", **given)
    assert (hashes(lab), metrics(lab)) == (hashes(undisturbed), metrics(undisturbed))


def test_an_interrupt_saves_what_all_ranks_have(tokenized: Lab, undisturbed: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    with once(lambda: state(lab)["tokens"], lambda: os.kill(os.getpid(), signal.SIGINT)):
        result = lab.sae("train", cluster__dp=2, training__tokens=FOR_EVER, training__checkpoint_tokens=LONG)
    assert result.code == 130, result.stderr
    assert told(result)[0] == "train: interrupted, saving a checkpoint"
    reached = state(lab)["tokens"]
    assert reached % 64 == 0
    assert reached > LONG
    assert until(lambda: not processes())
    train(lab, training__tokens=reached + 640)
    assert state(lab)["complete"]
    steps = [step for phase, step, name in metrics(lab) if (phase, name) == ("train", "fvu")]
    assert sorted(steps) == [*range(1, reached // 64 + 11)]


def test_ranks_stop_after_the_next_step(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    config = run_of(lab, cluster__dp=2, training__tokens=FOR_EVER, training__checkpoint_tokens=FOR_EVER)
    with ranks.placed(config, Trainer) as actors:
        reports = ranks.Reports(actors)
        next(reports)
        reached = max(ray.get([actor.pause.remote() for actor in actors]))
        reports.stop()
    assert reached > 0
    assert state(lab)["tokens"] == (reached + 1) * 64


def test_two_interrupts_lose_nothing_that_was_committed(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    with once(lambda: state(lab)["tokens"], twice):
        # Each step takes long.
        result = lab.sae("train", cluster__dp=2, training__tokens=FOR_EVER * 64, training__batch_tokens=4096)
    assert result.code == 130, result.stderr
    assert state(lab)["tokens"] >= 640
    assert checkpoints.read(Lake(str(lab.lake)), Lake(str(lab.lake)).snapshot(), state(lab)["checkpoints"][-1]["model"])
    assert until(lambda: not processes())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cluster__tp": 3}, "cluster.tp 3 times cluster.dp 1 does not divide n_latents 64"),
        ({"cluster__dp": 2, "training__batch_tokens": 63}, "training.batch_tokens: 63 is not divisible by cluster.tp"),
        (
            {"cluster__tp": 2, "autoencoder": None, "autoencoders": [{"name": n, "n_latents": 64} for n in "ab"]},
            "cluster.tp: got 2, but several autoencoders are trained whole",
        ),
        ({"cluster__dp": 2, "cluster__gpus_per_worker": 0.5}, "cluster.gpus_per_worker: got 0.5"),
    ],
)
def test_settings_that_fit_no_mesh(given: dict[str, Any], words: str, tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    if given.get("autoencoders"):
        text = lab.config.read_text().replace("autoencoder:", "unused:")
        lab = Lab(tmp_path, lab.lake)
        lab.config.write_text("".join(_without("unused", text)))
        given = {key: value for key, value in given.items() if value is not None}
    assert words in refused(lab.sae("train", **given))
    assert lab.bytes() == before


def _without(section: str, text: str) -> Iterator[str]:
    skipping = False
    for line in text.splitlines(keepends=True):
        skipping = line.startswith(f"{section}:") or (skipping and line.startswith(" "))
        if not skipping:
            yield line


def test_more_ranks_than_gpus(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    script = (
        "import sys, ray; from sae.jobs import cli\n"
        "ray.init(address='local', num_cpus=2, num_gpus=1, object_store_memory=10**8, include_dashboard=False,\n"
        "    log_to_driver=False, logging_level='ERROR')\n"
        "cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "train", str(lab.config), f"--lake={lab.lake}", "--cluster.dp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    words = "error: cluster.tp 1 times cluster.dp 2 is 2 ranks, each on a GPU of its own, but there are 1; lower them"
    assert done.stderr.splitlines()[-1].startswith(words)
    assert lab.bytes() == before


def test_no_room_for_all_ranks(tokenized: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    monkeypatch.setattr(placement, "_OTHERS_END_WITHIN_S", 1.0)
    everything = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(everything.ready())
    try:
        line = refused(lab.sae("train", cluster__dp=2))
    finally:
        remove_placement_group(everything)
    assert "cluster: no room for 2 workers (cluster.tp times cluster.dp) within 1 s" in line
    assert lab.bytes() == before


def test_ranks_that_do_not_find_each_other(tokenized: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Astray(Trainer):
        def follow(self, address: str) -> None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                super().follow(f"tcp://127.0.0.1:{free.getsockname()[1]}")

    monkeypatch.setattr(step_train, "Trainer", Astray)
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    line = refused(lab.sae("train", cluster__dp=2, cluster__timeout_s=2))
    assert "can't reach the others by tcp://" in line
    assert "within cluster.timeout_s, 2 s" in line
    assert lab.bytes() == before


def test_a_full_disk(tokenized: Lab, small_disk: Path) -> None:
    """No rank waits for the one that could not write its part, and nothing is left of the others' parts."""
    lab = tokenized.copy(small_disk)
    before, filler = lab.bytes(), small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    line = refused(lab.sae("train", cluster__dp=2))
    assert "No space left on device" in line
    filler.unlink()
    assert lab.bytes() == before


def made(**methods: Callable[..., Any]) -> type:
    """Workers for ranks that meet a fate of which `Reports` must tell: each waits for ever, but for what is given.

    They are of no module, so that starting one imports none.
    """

    class Worker:
        def __init__(self, config: Run, rank: int, size: int) -> None:
            self._never = threading.Event()

        def address(self) -> str:
            return ""

        def pause(self) -> int:
            return 0

        def stop(self, last: int) -> None:
            pass

        def train(self, address: str) -> Iterator[Any]:
            yield 0, ""
            self._never.wait()

        def follow(self, address: str) -> None:
            self._never.wait()

    return type("Fated", (Worker,), methods)


@pytest.fixture
def two(tokenized: Lab) -> Run:
    return run_of(tokenized, cluster__dp=2, cluster__timeout_s=60)


def read(config: Run, worker: type) -> None:
    with ranks.placed(config, worker) as actors:
        for _ in ranks.Reports(actors):
            pass


def test_an_error_of_a_rank_that_does_not_report(two: Run) -> None:
    """It reaches the user as it is, although the first rank still waits for that one."""

    def follow(self: Any, address: str) -> None:
        raise StorageError("cannot write: No space left on device; free some")

    with pytest.raises(StorageError, match="No space left on device"):
        read(two, made(follow=follow))


def test_a_fault_of_the_program_is_no_loss(two: Run) -> None:
    """It would come again, and trying again would hide it."""

    def follow(self: Any, address: str) -> None:
        raise KeyError("of the program")

    with pytest.raises(KeyError, match="of the program"):
        read(two, made(follow=follow))


def test_a_worker_that_cannot_be_made_is_no_loss(two: Run) -> None:
    def fails(self: Any, config: Run, rank: int, size: int) -> None:
        raise ModuleNotFoundError("No module named 'sae'")

    with pytest.raises(ray.exceptions.RayActorError, match="No module named 'sae'"):
        read(two, made(__init__=fails))


def test_a_rank_that_misses_a_dead_one_blames_no_network(two: Run) -> None:
    def train(self: Any, address: str) -> Iterator[Any]:
        yield 0, ""
        threading.Event().wait(0.5)
        raise ranks.UnreachableError("cluster: can't reach the others")

    def follow(self: Any, address: str) -> None:
        threading.Event().wait(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ranks.Lost, match=r"^rank 1: its worker process has died$"):
        read(two, made(train=train, follow=follow))
    with pytest.raises(ConfigError, match="can't reach the others"):
        read(two, made(train=train))


def test_a_node_without_the_lake(tokenized: Lab, tmp_path: Path) -> None:
    """The error is of the training: what an actor's constructor raises, Ray tells as text only."""
    trainer = Trainer(run_of(tokenized, lake=str(tmp_path / "elsewhere")))
    with pytest.raises(LakeError, match="elsewhere: no lake here"):
        next(trainer.train())


def test_an_interrupt_before_ranks_have_begun_waits_for_nothing(two: Run) -> None:
    with ranks.placed(two, made()) as actors:
        reports = ranks.Reports(actors)
        reports.stop()
        assert next(reports)


def test_an_interrupt_is_one_although_a_rank_is_lost_meanwhile(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever interrupts a training does not want it to be begun anew."""

    def stop(self: Any, last: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(self: progress.Bar, n: int, note: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Bar, "advance", interrupt)
    with ranks.placed(two, made(stop=stop)) as actors, pytest.raises(KeyboardInterrupt):
        step_train._follow(actors, progress.Bar("train", 1, "tokens"), None)
