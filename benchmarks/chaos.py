"""SIGKILL at random moments: the tables must end up equal, row by row, to those of a run that nothing disturbed.

Each round runs `sae run` on a new lake, kills the driver, an encode actor or the train actor at a random moment of its
life, and runs the command again. All the while a reader opens the lake's newest version and reads every table.
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
from sae.schemas.errors import LakeError
from tests.tiny_run import NAME, ORDER, make_lab, rows

# What runs in a Ray process is in its title. The driver is the command itself.
VICTIMS = {"driver": "", "encode actor": "ray::MapWorker", "train actor": "ray::Trainer"}
MAX_COMMANDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        config = prepare(Path(folder))
        undisturbed = Path(folder) / "undisturbed"
        spans = observe(config, undisturbed)
        print("undisturbed:", "  ".join(f"{name} {span:.1f} s" for name, span in spans.items()), flush=True)
        draw = random.Random(args.seed)
        victims = [list(VICTIMS)[i % len(VICTIMS)] for i in range(args.rounds)]
        print(
            f"{'killed':>12} {'after':>7} {'at version':>10} {'commands':>8} {'finished in':>11}  equal  reader",
            flush=True,
        )
        results = [
            one_round(config, undisturbed, Path(folder) / "disturbed", victim, draw.uniform(0, spans[victim]))
            for victim in victims
        ]
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
    """`sae run` in a process of its own, and what it has started."""

    process: subprocess.Popen[str]
    started: dict[int, psutil.Process] = field(default_factory=dict)

    @classmethod
    def start(cls, config: Path, lake: Path) -> "Command":
        places = [f"--lake={lake}", f"--export.folder={lake.parent / (lake.name + '-viewer')}"]
        command = [sys.executable, "-m", "sae.jobs.cli", "run", str(config), *places]
        return cls(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))

    def find(self, victim: str) -> psutil.Process | None:
        """The living process of that kind, if there is one."""
        self.look()
        if victim == "driver":
            return self.started.get(self.process.pid)
        return next((p for p in self.started.values() if _title(p).startswith(VICTIMS[victim])), None)

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


def observe(config: Path, lake: Path) -> dict[str, float]:
    """Runs undisturbed; for how long, in seconds, each victim lives."""
    command = Command.start(config, lake)
    seen: dict[str, list[float]] = {victim: [] for victim in VICTIMS}
    while command.process.poll() is None:
        for victim in VICTIMS:
            if command.find(victim) is not None:
                seen[victim].append(time.monotonic())
        time.sleep(0.02)
    code, stderr = command.finish()
    if code:
        sys.exit(f"the undisturbed run failed:\n{stderr}")
    return {victim: times[-1] - times[0] for victim, times in seen.items()}


def one_round(config: Path, undisturbed: Path, lake: Path, victim: str, after: float) -> dict[str, Any]:
    """Kills the victim that many seconds after it appeared, runs to the end, compares."""
    shutil.rmtree(lake, ignore_errors=True)
    shutil.rmtree(lake.with_name(lake.name + "-viewer"), ignore_errors=True)
    began = time.monotonic()
    with reading(lake) as errors:
        command = Command.start(config, lake)
        killed = kill(command, victim, after)
        version = Lake(str(lake)).snapshot().version if (lake / "_log").exists() else -1
        code, stderr = command.finish()
        n_commands = 1
        while code and n_commands < MAX_COMMANDS:
            code, stderr = Command.start(config, lake).finish()
            n_commands += 1
        if code:
            print(stderr, file=sys.stderr)
    different = ["run failed"] if code else differences(undisturbed, lake)
    result = {
        "killed": victim if killed else f"{victim} (had ended)",
        "after_s": round(after, 2),
        "version": version,
        "commands": n_commands,
        "seconds": round(time.monotonic() - began, 1),
        "equal": not different,
        "different": different,
        "reader_errors": len(errors),
    }
    reader = "no error" if not errors else errors[0]
    print(
        f"{result['killed']:>12} {after:>5.2f} s {version:>10} {n_commands:>8} {result['seconds']:>9} s  "
        f"{'yes' if not different else 'NO: ' + ', '.join(different)}    {reader}",
        flush=True,
    )
    return result


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
        while not stop.wait(0.2):
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
    tables = [table for table in ORDER if rows(one, table) != rows(other, table)]
    digests = [last_checkpoint(lake) for lake in (one, other)]
    return tables + [kind for kind in digests[0] if digests[0][kind] != digests[1][kind]]


def last_checkpoint(lake: Path) -> dict[str, str]:
    snapshot = Lake(str(lake)).snapshot()
    try:
        last = snapshot.properties[f"autoencoder/{NAME}"]["checkpoints"][-1]
    except KeyError:
        raise LakeError(f"{lake}: no autoencoder was trained") from None
    return {kind: snapshot.files[last[kind]].sha256 for kind in ("model", "state")}


if __name__ == "__main__":
    main()
