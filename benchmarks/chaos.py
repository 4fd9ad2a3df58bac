"""SIGKILL at random moments: the tables must end up equal, row by row, to those of a run that nothing disturbed.

Each round runs a step on a copy of the lake as the step before left it, kills the driver, an encode actor or the train
actor at a random moment of its life, and runs the command again until it succeeds. All the while a reader opens the
lake's newest version and reads every table.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from sae.jobs.lake import Lake, connect
from tests.tiny_run import NAME, ORDER, make_lab, rows

# What runs in a Ray process is in its title. The driver is the command itself.
TITLES = {"encode actor": "ray::MapWorker", "train actor": "ray::Trainer"}
ROUNDS = (
    ("train", "train actor"),
    ("encode", "encode actor"),
    ("train", "driver"),
    ("encode", "driver"),
    ("tokenize", "driver"),
    ("compact", "driver"),
    ("aggregate", "driver"),
)
STEPS = ("tokenize", "train", "encode", "compact", "aggregate")
MAX_COMMANDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        config = prepare(Path(folder))
        spans = run_undisturbed(config, Path(folder))
        draw = random.Random(args.seed)
        print("     step        killed   after at version commands finished in  equal  reader", flush=True)
        results: list[dict[str, Any]] = []
        while len(results) < args.rounds:
            step, victim = ROUNDS[len(results) % len(ROUNDS)]
            result = one_round(config, Path(folder), step, victim, draw.uniform(0, spans[step, victim]))
            # A victim that had ended before it could be killed proves nothing: the round is drawn again.
            results += [result] if result["killed"] else []
    failed = [result for result in results if not (result["equal"] and result["reader_errors"] == 0)]
    print(f"{len(results) - len(failed)} of {len(results)} rounds ended equal, with no error for the reader")
    if args.json:
        print(json.dumps({"benchmark": "chaos", "rounds": results, "failed": len(failed)}))
    sys.exit(1 if failed else 0)


def prepare(folder: Path) -> Path:
    """A tiny run whose training and encoding last long enough to be hit in their midst; returns its config."""
    lab = make_lab(folder, n_texts=100)
    config = yaml.safe_load(lab.config.read_text())
    config["training"] |= {"tokens": 64_000, "checkpoint_tokens": 3_200}
    lab.config.write_text(yaml.safe_dump(config))
    return lab.config


@dataclass
class Command:
    """A step in a process of its own, and what it has started."""

    process: subprocess.Popen[str]
    started: dict[int, psutil.Process] = field(default_factory=dict)

    @classmethod
    def start(cls, step: str, config: Path, lake: Path, *more: str) -> "Command":
        command = [sys.executable, "-m", "sae.jobs.cli", step, str(config), f"--lake={lake}", *more]
        return cls(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))

    def find(self, victim: str) -> psutil.Process | None:
        """The living process of that kind, if there is one."""
        self.look()
        if victim == "driver":
            return self.started.get(self.process.pid)
        return next((p for p in self.started.values() if _title(p).startswith(TITLES[victim])), None)

    def look(self) -> None:
        """Notes the processes that the command has started so far."""
        try:
            driver = psutil.Process(self.process.pid)
            for process in [driver, *driver.children(recursive=True)]:
                self.started[process.pid] = process
        except psutil.NoSuchProcess:
            pass

    def finish(self) -> tuple[int, str]:
        """Waits for the end; processes that outlive a killed driver are ended, as an operator would."""
        _, stderr = self.process.communicate()
        _, alive = psutil.wait_procs([p for p in self.started.values() if p.pid != self.process.pid], timeout=20)
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return self.process.returncode, stderr


def _title(process: psutil.Process) -> str:
    try:
        return str((process.cmdline() or [""])[0])
    except psutil.Error:
        return ""


def run_undisturbed(config: Path, folder: Path) -> dict[tuple[str, str], float]:
    """Runs all steps, keeps the lake after each; for how long, in seconds, each step's victims live."""
    spans: dict[tuple[str, str], float] = {}
    for step in STEPS:
        lake = before(folder, step)
        if lake.exists():
            shutil.copytree(lake, folder / step)
        command = Command.start(step, config, folder / step)
        victims = [victim for name, victim in ROUNDS if name == step]
        seen: dict[str, list[float]] = {victim: [] for victim in victims}
        while command.process.poll() is None:
            for victim in victims:
                if command.find(victim) is not None:
                    seen[victim].append(time.monotonic())
            time.sleep(0.02)
        code, stderr = command.finish()
        if code:
            sys.exit(f"the undisturbed {step} failed:\n{stderr}")
        spans.update({(step, victim): times[-1] - times[0] for victim, times in seen.items()})
    print("undisturbed:", "  ".join(f"{step}: {who} {span:.1f} s" for (step, who), span in spans.items()), flush=True)
    return spans


def before(folder: Path, step: str) -> Path:
    """The lake that an undisturbed step began with; there is none for the first."""
    return folder / ("nothing", *STEPS)[STEPS.index(step)]


def one_round(config: Path, folder: Path, step: str, victim: str, after: float) -> dict[str, Any]:
    """Kills the victim that many seconds after it appeared, runs to the end, compares."""
    lake = folder / "disturbed"
    shutil.rmtree(lake, ignore_errors=True)
    if before(folder, step).exists():
        shutil.copytree(before(folder, step), lake)
    began = time.monotonic()
    with reading(lake) as errors:
        command = Command.start(step, config, lake)
        killed = kill(command, victim, after)
        version = Lake(str(lake), create=True).snapshot().version
        code, stderr = command.finish()
        n_commands = 1
        while code and n_commands < MAX_COMMANDS:
            code, stderr = Command.start(step, config, lake).finish()
            n_commands += 1
        if code:
            print(stderr, file=sys.stderr)
    seconds = time.monotonic() - began
    different = ["run failed"] if code else differences(folder / step, lake)
    equal = "yes" if not different else f"NO: {', '.join(different)}"
    print(
        f"{step:>9}  {victim:>12} {after:>5.1f} s {version:>10} {n_commands:>8} {seconds:>9.1f} s  {equal:>5}  "
        f"{errors[0] if errors else 'no error'}{'' if killed else '  (had ended before)'}",
        flush=True,
    )
    return {
        "step": step,
        "victim": victim,
        "killed": killed,
        "after_s": round(after, 2),
        "version": version,
        "commands": n_commands,
        "seconds": round(seconds, 1),
        "equal": not different,
        "different": different,
        "reader_errors": len(errors),
    }


def kill(command: Command, victim: str, after: float) -> bool:
    """SIGKILL; False if the victim had ended by itself before."""
    while (process := command.find(victim)) is None:
        if command.process.poll() is not None:
            return False
        time.sleep(0.01)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        command.look()
        time.sleep(0.05)
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@contextmanager
def reading(lake: Path) -> Iterator[list[str]]:
    """A reader in the background, that opens the newest version again and again and reads all of it."""
    errors: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.5):
            if not (lake / "_log" / f"{0:020}.json").exists():
                continue
            try:
                connection = connect(str(lake))
                for table in ORDER:
                    connection.sql(f"select hash(any_value(t)) from {table} t").fetchall()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()


def differences(one: Path, other: Path) -> list[str]:
    """Tables that differ in any row or column, and the weights and training state if they differ in a bit."""
    tables = [table for table in ORDER if compared(one, table) != compared(other, table)]
    digests = [last_checkpoint(lake) for lake in (one, other)]
    return tables + [kind for kind, digest in digests[0].items() if digest != digests[1].get(kind)]


def compared(lake: Path, table: str) -> list[tuple[Any, ...]]:
    """The rows of a table, but for what a clock measured."""
    return [row for row in rows(lake, table) if table != "metrics" or "machine" not in row]


def last_checkpoint(lake: Path) -> dict[str, list[str]]:
    """Hashes of the files of the weights and of the training state."""
    snapshot = Lake(str(lake)).snapshot()
    trained = snapshot.properties.get(f"autoencoder/{NAME}")
    last = trained["checkpoints"][-1] if trained else {}
    return {
        kind: [snapshot.files[shard["path"]].sha256 for shard in last[kind]]
        for kind in ("model", "state")
        if kind in last
    }


if __name__ == "__main__":
    main()
