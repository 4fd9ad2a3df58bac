"""SIGKILL at random moments of a training on a mesh: it must end with the bits of one that nothing disturbed.

Each round trains on a Ray cluster of several nodes, a rank on each and one node to spare, and kills a rank, a whole
node, or the driver, whose command is then run again. Moments are drawn by progress, so that a machine that is slower
than it was does not move them all to the start: some time after one of the lake's versions, the first and the last
included. Every third round then waits for ranks that write a checkpoint.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.chaos import differences
from sae.jobs.lake import Lake
from tests.tiny_run import Lab, make_lab

MESHES: Final = ((2, 1), (1, 2))
VICTIMS: Final = ("rank", "node", "driver")
NEXT_STEP: Final = "the next step was done"
GONE_WITHIN_S: Final = 30.0
ENDS_WITHIN_S: Final = 900.0
# About the time from the first sign of a rank to its first commit, and from one commit to the next.
STARTS_IN_S: Final = 8.0
STEP_S: Final = 0.4
MAX_COMMANDS: Final = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lab = make_lab(Path(folder))
        lab.done("tokenize")
        nodes = Nodes()
        try:
            results = all_rounds(lab, nodes, args.rounds, random.Random(args.seed))
        finally:
            nodes.end()
    failed = [result for result in results if result["different"] or result["left_over"]]
    print(f"{len(results) - len(failed)} of {len(results)} rounds ended equal, with no process left over")
    for victim in VICTIMS:
        times = [one["next_step_s"] for one in results if one["victim"] == victim and one["next_step_s"] is not None]
        if times:
            print(
                f"{victim}: next step {statistics.median(times):.1f} s after the death (median), {max(times):.1f} s max"
            )
    if args.json:
        print(json.dumps({"benchmark": "chaos_mesh", "rounds": results, "failed": len(failed)}))
    sys.exit(1 if failed else 0)


class Nodes:
    """A Ray cluster on this machine: a head without processors, for the driver, and three nodes with one each."""

    def __init__(self) -> None:
        # Read by the processes that the cluster starts; Ray is imported after they are set.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from ray.cluster_utils import Cluster

        memory: dict[str, Any] = {"object_store_memory": 10**8}
        self._given: dict[str, Any] = {"num_cpus": 1, **memory}
        head = {"num_cpus": 0, "include_dashboard": False, **memory}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(**self._given) for _ in range(3)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def ranks(self) -> list[psutil.Process]:
        """The living ranks on all nodes."""
        return [process for node in self._nodes for process in _ranks_of(node)]

    def lose_one(self) -> bool:
        """Kill a node that has a rank, with all its processes, and put another one in its place."""
        for node in self._nodes:
            if found := _ranks_of(node):
                self._cluster.remove_node(node, allow_graceful=False)
                for process in found:
                    _kill(process)
                self._nodes.remove(node)
                return True
        return False

    def refill(self) -> None:
        while len(self._nodes) < 3:
            self._nodes.append(self._cluster.add_node(**self._given))

    def end(self) -> None:
        self._cluster.shutdown()


def _ranks_of(node: Any) -> list[psutil.Process]:
    try:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [one for one in raylet.children(recursive=True) if (one.cmdline() or [""])[0].startswith("ray::Trainer")]
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@dataclass
class Training:
    """The command, and what it prints with the time of it."""

    process: subprocess.Popen[str]
    said: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def start(cls, lab: Lab, lake: Path, nodes: Nodes, mesh: tuple[int, int]) -> "Training":
        given = {"lake": lake, "cluster.address": nodes.address, "cluster.dp": mesh[0], "cluster.tp": mesh[1]}
        flags = [f"--{key}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "sae.jobs.cli", "train", str(lab.config), *flags]
        training = cls(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        threading.Thread(target=training._listen, daemon=True).start()
        return training

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append((time.monotonic(), line.rstrip()))

    def finish(self) -> int:
        try:
            return self.process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1

    def time_of(self, words: str) -> float | None:
        return next((at for at, line in self.said if words in line), None)


def all_rounds(lab: Lab, nodes: Nodes, n_rounds: int, draw: random.Random) -> list[dict[str, Any]]:
    first, lasts = Lake(str(lab.lake)).snapshot().version, {}
    for mesh in MESHES:
        seconds = undisturbed(lab, nodes, mesh)
        lasts[mesh] = Lake(str(expected(lab, mesh))).snapshot().version
        print(
            f"undisturbed: dp {mesh[0]}, tp {mesh[1]}: {seconds:.1f} s, versions {first} to {lasts[mesh]}", flush=True
        )
    print("dp tp  victim    moment  at version  commands  ended in  next step  gone in  equal", flush=True)
    results: list[dict[str, Any]] = []
    drawn = 0
    while len(results) < n_rounds:
        mesh, victim = MESHES[drawn // len(VICTIMS) % len(MESHES)], VICTIMS[drawn % len(VICTIMS)]
        while_writing = drawn % 9 in (0, 4, 8)
        version = draw.randint(first, lasts[mesh])
        after = draw.uniform(0, STARTS_IN_S if version == first else STEP_S)
        result = one_round(lab, nodes, mesh, victim, version, after, draw.randrange(2), while_writing)
        drawn += 1
        # A victim that had ended before it could be killed proves nothing: the round is drawn again.
        results += [result] if result is not None else []
    print(f"{drawn - len(results)} rounds were drawn again, for their victims had ended before", flush=True)
    return results


def expected(lab: Lab, mesh: tuple[int, int]) -> Path:
    return lab.folder / f"undisturbed-{mesh[0]}-{mesh[1]}"


def undisturbed(lab: Lab, nodes: Nodes, mesh: tuple[int, int]) -> float:
    """Trains on a mesh; for how long, in seconds, its ranks live."""
    lake = expected(lab, mesh)
    shutil.copytree(lab.lake, lake)
    training = Training.start(lab, lake, nodes, mesh)
    began = next(_while_running(training, lambda: bool(nodes.ranks())), None)
    code = training.finish()
    if code or began is None:
        sys.exit("the undisturbed training failed:\n" + "\n".join(line for _, line in training.said))
    return time.monotonic() - began


def _while_running(training: Training, happened: Any) -> Iterator[float]:
    """The times at which something is seen while the command runs."""
    while training.process.poll() is None:
        if happened():
            yield time.monotonic()
        time.sleep(0.02)


def one_round(
    lab: Lab,
    nodes: Nodes,
    mesh: tuple[int, int],
    victim: str,
    version: int,
    after: float,
    which: int,
    while_writing: bool,
) -> dict[str, Any] | None:
    """Kills the victim that many seconds after ranks and a version have appeared, runs to the end, compares."""
    lake = lab.folder / "disturbed"
    shutil.rmtree(lake, ignore_errors=True)
    shutil.copytree(lab.lake, lake)
    nodes.refill()
    training = Training.start(lab, lake, nodes, mesh)
    began = next(_while_running(training, lambda: bool(nodes.ranks())), None)
    if began is None:
        sys.exit("a training failed to start:\n" + "\n".join(line for _, line in training.said))
    watched = Lake(str(lake))
    reached = next(_while_running(training, lambda: watched.snapshot().version >= version), began)
    next(_while_running(training, lambda: time.monotonic() > reached + after), None)
    if while_writing:
        known = _written(lake)
        next(_while_running(training, lambda: _written(lake) - known), None)
    at_version = Lake(str(lake)).snapshot().version
    if not _strike(training, nodes, victim, which):
        training.finish()
        return None
    died = time.monotonic()
    commands, code, gone, next_step = 1, -1, None, None
    if victim == "driver":
        gone = _gone_in(nodes)
    else:
        code = training.finish()
        seen = training.time_of(NEXT_STEP)
        next_step = seen - died if seen is not None else None
    while code and commands < MAX_COMMANDS:
        if victim != "driver":
            print("\n".join(line for _, line in training.said), flush=True)
        training = Training.start(lab, lake, nodes, mesh)
        committed = _next_commit(training, Lake(str(lake)))
        next_step = committed - died if committed is not None else None
        code = training.finish()
        commands += 1
    seconds = time.monotonic() - died
    left_over = _gone_in(nodes) is None
    different = [f"status {code}"] if code else differences(expected(lab, mesh), lake)
    moment = f"{version}+{after:.1f}s{'w' if while_writing else ' '}"
    verdict = f"NO: {', '.join(different)}" if different else "yes"
    print(
        f"{mesh[0]:>2} {mesh[1]:>2}  {victim:>6} {moment:>9} {at_version:>11} {commands:>9} {seconds:>7.1f} s "
        f"{_shown(next_step):>9} {_shown(gone):>8}  {verdict}{', PROCESSES LEFT OVER' if left_over else ''}",
        flush=True,
    )
    print("\n".join(f"      {line}" for _, line in training.said), flush=True)
    return {
        "dp": mesh[0],
        "tp": mesh[1],
        "victim": victim,
        "after_version": version,
        "after_s": round(after, 2),
        "while_writing": while_writing,
        "version": at_version,
        "commands": commands,
        "seconds": round(seconds, 1),
        "next_step_s": next_step,
        "ranks_gone_s": gone,
        "left_over": left_over,
        "different": different,
    }


def _next_commit(training: Training, lake: Lake) -> float | None:
    before = lake.snapshot().version
    return next(_while_running(training, lambda: lake.snapshot().version > before), None)


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _strike(training: Training, nodes: Nodes, victim: str, which: int) -> bool:
    """SIGKILL; False if the victim had ended by itself before."""
    if training.process.poll() is not None:
        return False
    if victim == "driver":
        training.process.kill()
        return True
    if victim == "node":
        return nodes.lose_one()
    ranks = nodes.ranks()
    return bool(ranks) and _kill(ranks[which % len(ranks)])


def _written(lake: Path) -> set[str]:
    """Files of checkpoints, finished or not."""
    return {path.name for kind in ("checkpoints", "training_states") for path in (lake / kind).rglob("*")}


def _gone_in(nodes: Nodes) -> float | None:
    """Seconds until no rank lives; None where some stay."""
    began = time.monotonic()
    while time.monotonic() - began < GONE_WITHIN_S:
        if not nodes.ranks():
            return time.monotonic() - began
        time.sleep(0.02)
    return None


if __name__ == "__main__":
    main()
