"""Memory of `sae encode` while it goes on for minutes: it must not grow with what was encoded.

The command encodes a corpus that does not end before it is interrupted, with a subject so small that runs are finished
many times faster than real ones. All the while the memory of its processes is sampled: of the driver, of the actors
that encode, of Ray's own, each without what it shares, and of the object store, which Ray's processes share. What each
kind gains an hour is the median slope between any two samples after the first minutes.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import pyarrow as pa
import yaml

from benchmarks.chaos import Command
from sae.jobs.lake import Lake
from sae.schemas.tables import SCHEMAS
from tests.in_process import train
from tests.tiny_run import CONTEXT_LENGTH, CORPUS, Lab, make_lab

KINDS: Final = ("driver", "actors", "gcs_server", "raylet", "other", "object_store")
RUN_TOKENS: Final = 131_072
CONTEXTS_A_FILE: Final = 65_536
# More than any machine encodes in a second.
MOST_TOKENS_A_SECOND: Final = 200_000
MB: Final = 1e6


@dataclass(frozen=True)
class Sample:
    """Megabytes of each kind of process, so many seconds after the first was taken."""

    seconds: float
    megabytes: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--warm-up", type=float, default=2, help="minutes that the slopes leave out")
    parser.add_argument("--every", type=float, default=5, help="seconds between two samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if not 0 <= args.warm_up < args.minutes:
        parser.error(f"--warm-up: got {args.warm_up} minutes; give less than --minutes, which is {args.minutes}")
    with tempfile.TemporaryDirectory(prefix="encode-memory-") as folder:
        lab = make(Path(folder), round(args.minutes * 60 * MOST_TOKENS_A_SECOND))
        samples = list(sampled(lab, args.minutes * 60, args.every))
        n_runs = len(Lake(str(lab.lake)).snapshot().select("moments"))
    late = [sample for sample in samples if sample.seconds >= args.warm_up * 60]
    print(f"{n_runs} runs of {RUN_TOKENS:,} tokens in {samples[-1].seconds / 60:.1f} minutes")
    rows = {kind: summary(samples, late, kind) for kind in KINDS}
    for kind, row in rows.items():
        print(f"{kind:>12}  " + "  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        taken = [[round(sample.seconds), *map(round, sample.megabytes.values())] for sample in samples]
        found = {"minutes": args.minutes, "runs": n_runs, "kinds": rows, "samples": taken}
        print(json.dumps({"benchmark": "encode_memory", **found}))


def make(folder: Path, n_tokens: int) -> Lab:
    """A tiny run that is trained, and then given so many tokens: the same contexts again and again."""
    lab = make_lab(folder)
    config = yaml.safe_load(lab.config.read_text())
    config["encode"]["run_tokens"] = RUN_TOKENS
    lab.config.write_text(yaml.safe_dump(config))
    lab.done("tokenize")
    train(lab)
    lake = Lake(str(lab.lake))
    few = lake.snapshot().select("contexts", corpus=CORPUS)
    tokens = lake.read(few)["token_ids"].combine_chunks().flatten().to_numpy()
    tokens = np.resize(tokens, CONTEXTS_A_FILE * CONTEXT_LENGTH)
    token_ids = pa.ListArray.from_arrays(np.arange(0, len(tokens) + 1, CONTEXT_LENGTH, dtype=np.int32), tokens)
    n_files = -(-n_tokens // len(tokens))
    with lake.transaction("longer") as transaction:
        transaction.remove(few)
        for file in range(n_files):
            ids = np.arange(file * CONTEXTS_A_FILE, (file + 1) * CONTEXTS_A_FILE)
            rows = {"context_id": ids, "doc_id": ids, "start": np.zeros_like(ids), "token_ids": token_ids}
            transaction.write("contexts", pa.table(rows).cast(SCHEMAS["contexts"]), corpus=CORPUS)
        state = transaction.base.properties[f"corpus/{CORPUS}"]
        counts = {"n_contexts": n_files * CONTEXTS_A_FILE, "n_tokens": n_files * len(tokens)}
        transaction.set(f"corpus/{CORPUS}", {**state, **counts})
    return lab


def sampled(lab: Lab, seconds: float, every: float) -> Iterator[Sample]:
    """Samples of a command that encodes for that long from its first run on, and is then interrupted."""
    command = Command.start("encode", lab.config, lab.lake)
    lake = Lake(str(lab.lake))
    while not lake.snapshot().select("moments"):
        if command.process.poll() is not None:
            sys.exit(command.finish()[1])
        command.look()
        time.sleep(0.2)
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        if command.process.poll() is not None:
            sys.exit(f"encode ended before it was interrupted: {command.finish()[1]}")
        command.look()
        yield Sample(now, megabytes(command.process.pid, list(command.started.values())))
        time.sleep(every)
    command.process.send_signal(signal.SIGINT)
    command.finish()


def megabytes(driver: int, processes: Sequence[psutil.Process]) -> dict[str, float]:
    """What each kind of process has in memory now."""
    found = dict.fromkeys(KINDS, 0.0)
    for process in processes:
        try:
            memory, title = process.memory_info(), (process.cmdline() or [""])[0]
        except psutil.NoSuchProcess:
            continue
        kind = "driver" if process.pid == driver else kind_of(title)
        found[kind] += (memory.rss - memory.shared) / MB
        if kind == "raylet":
            found["object_store"] += memory.shared / MB
    return found


def kind_of(title: str) -> str:
    """Of one of Ray's processes."""
    if title.startswith("ray::MapWorker"):
        return "actors"
    name = title.rpartition("/")[2]
    return name if name in KINDS else "other"


def summary(samples: Sequence[Sample], late: Sequence[Sample], kind: str) -> dict[str, float]:
    """Megabytes first, in the midst of the late samples, last and at most, and by how many an hour they grow."""
    every = [sample.megabytes[kind] for sample in samples]
    of_late = [sample.megabytes[kind] for sample in late]
    return {
        "first_mb": round(every[0]),
        "median_mb": round(float(np.median(of_late))),
        "last_mb": round(every[-1]),
        "most_mb": round(max(every)),
        "mb_an_hour": round(slope([sample.seconds for sample in late], of_late) * 3600, 1),
    }


def slope(seconds: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between any two values (Theil and Sen), a second: peaks don't count."""
    first, second = np.triu_indices(len(values), 1)
    return float(
        np.median(np.subtract.outer(values, values)[first, second] / np.subtract.outer(seconds, seconds)[first, second])
    )


if __name__ == "__main__":
    main()
