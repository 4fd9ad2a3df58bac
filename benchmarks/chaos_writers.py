"""SIGKILL at random moments of three writers of one lake: they encode, compact, drop, collect garbage, aggregate, copy.

Nothing that was acknowledged may be lost or done twice, no reader may see a part of a commit, and in the end the tables
are those of the rows that are left, computed anew, with no file in the folder that is not theirs. The writers call what
the steps call, on drawn activations; they are forked, as starting a process takes seconds. With --store the lake is in
an emulated object store, and with --faults a share of all requests to it meet errors, broken connections, and answers
that are cut off or come after the client's time-out.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks._emulators import serving
from sae.jobs import aggregate, by_token, compact, drop, encode, formats, ranges, storage, stores
from sae.jobs.lake import Lake, connect
from sae.jobs.runs import Plan, drop_mark, dropped_contexts, outstanding, unit
from sae.schemas.errors import ConflictError, LakeError
from sae.schemas.tables import SCHEMAS
from sae.statistics import SortedRun
from tests.object_stores import STORES
from tests.proxies import SLOW_S

NAME, CORPUS = "a", "c"
N_WRITERS, N_RUNS, CONTEXTS, WIDTH, N_ATOMS, PER_TOKEN = 3, 16, 16, 16, 64, 8
PLAN = Plan(0, N_RUNS * CONTEXTS, CONTEXTS)
ENCODING: Final[dict[str, Any]] = {
    "checkpoint": "c", "seed": 1, "run_tokens": CONTEXTS * WIDTH, "bin_width": 0.2, "examples": 10,
}  # fmt: skip
OPERATIONS = ("encode", "compact", "drop", "gc", "aggregate", "by_token")
# Longer than any operation and any reader takes; what is older and unused is deleted in their midst.
GARBAGE_AGE_S = {"local": 10.0, "store": 60.0}
# What one writer may tell another that came first.
EXPECTED = ("meanwhile", "no latents of it")
Array = npt.NDArray[Any]
fork = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=STORES, help="where the lake is; in a local folder when absent")
    parser.add_argument("--faults", type=float, default=0.0, help="share of the requests to the store that go wrong")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.faults and not args.store:
        parser.error("--faults: only requests to a store go wrong; give --store as well")
    # Files of several row groups, so that compaction cuts them.
    formats._ROW_GROUP["latents"] = 512
    if args.faults:
        stores._TIMEOUT = timedelta(seconds=0.8 * SLOW_S)  # type: ignore[misc]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        # Where killed writers leave what they had not uploaded yet.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        notes = Notes(Path(folder, "notes"))
        with place(folder, args.store, args.faults, args.seed) as (lake, requests):
            in_a_process(make, lake)
            killed = disturb(lake, notes, args.kills, random.Random(args.seed))
            faults = [*notes.of("error"), *in_a_process(faults_of, lake, notes)]
        told = Counter(line.split()[0] for line in notes.lines())
    row = {
        "store": args.store or "local",
        "kills": sum(killed.values()),
        **{f"killed_{operation}": killed[operation] for operation in OPERATIONS},
        "done": told["done"],
        "conflicts": told["conflict"],
        "reader_checks": told["seen"],
        **requests,
        "faults": len(faults),
        "seconds": round(time.monotonic() - began),
    }
    for fault in faults:
        print(fault, file=sys.stderr)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        print(json.dumps({"benchmark": "chaos_writers", "writers": N_WRITERS, "seed": args.seed, **row}))
    sys.exit(1 if faults else 0)


@contextmanager
def place(folder: str, store: str | None, rate: float, seed: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The path of the lake, and what its requests to a store met, once they are done."""
    if store is None:
        yield f"{folder}/lake", {}
        return
    with serving(store, rate, seed) as (bucket, requests):
        yield f"{bucket}/lake", requests


class Notes:
    """Lines that processes append to a file, each at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, kind: str, *what: object) -> None:
        line = " ".join(map(str, (kind, *what))).replace("\n", " | ") + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()

    def of(self, kind: str) -> list[str]:
        return [line.removeprefix(f"{kind} ") for line in self.lines() if line.startswith(f"{kind} ")]


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a function, called where its threads can't be in the way of later forks."""
    answers = fork.SimpleQueue()
    process = fork.Process(target=lambda: answers.put(work(*arguments)))
    process.start()
    answer = answers.get()
    process.join()
    return answer


# What the lake should hold


def make(path: str) -> None:
    ids = np.arange(PLAN.n_contexts)
    rows = {"context_id": ids, "doc_id": ids, "start": np.zeros(len(ids)), "token_ids": [[0] * WIDTH] * len(ids)}
    with Lake(path, create=True).transaction("chaos") as transaction:
        transaction.write("contexts", pa.table(rows).cast(SCHEMAS["contexts"]), corpus=CORPUS)
        counts = {"n_documents": 0, "n_contexts": len(ids), "n_tokens": len(ids) * WIDTH}
        fixed = {"number": 0, "context_length": WIDTH, "complete": True, "made_with": {"subject.model": "m"}}
        transaction.set(f"corpus/{CORPUS}", {**counts, **fixed})
        trained = {"n_latents": N_ATOMS, "masked_positions": [], "complete": True}
        transaction.set(f"autoencoder/{NAME}", trained)


def drawn(run: int, left: list[ranges.Range]) -> SortedRun:
    """The rows of a run's contexts that are left; they are always the same."""
    draw = np.random.default_rng(run)
    token = np.repeat(np.arange(CONTEXTS * WIDTH), PER_TOKEN)
    key = np.unique(token * N_ATOMS + draw.integers(0, N_ATOMS, len(token)))
    token, atom = np.divmod(key, N_ATOMS)
    context = PLAN.bounds(run)[0] + token // WIDTH
    kept = ranges.contains(left, context)
    columns = atom.astype(np.int32), context, (token % WIDTH).astype(np.uint16), draw.exponential(1, len(key)) + 0.1
    return SortedRun.from_rows(*(column[kept] for column in columns))


# The writers, who do one thing after the other, note what they begin and what they have done


def encode_one(lake: Lake, draw: random.Random) -> Iterator[object]:
    plan, missing = outstanding(lake.snapshot(), "encode", NAME, CORPUS, ENCODING["run_tokens"])
    if missing:
        run = draw.choice(missing)
        yield run
        left = plan.left(run)
        encode.commit_run(lake, NAME, CORPUS, ENCODING, plan, run, drawn(run, left), ranges.size(left) * WIDTH)


def compact_some(lake: Lake, draw: random.Random) -> Iterator[object]:
    sets = compact.sorted_sets(lake.snapshot().select("latents", autoencoder=NAME))
    if len(sets) > 1:
        yield len(sets)
        compact.merge_sets(lake, NAME, draw.sample(sets, draw.randint(2, len(sets))), 6000)


def drop_one(lake: Lake, draw: random.Random) -> Iterator[object]:
    moments = lake.snapshot().select("moments", autoencoder=NAME)
    if moments and draw.random() < 0.7:
        run = draw.choice(moments).run
        yield f"run {run}"
        drop.latents(lake, CORPUS, [NAME], run)
    elif moments:
        first = draw.randrange(PLAN.n_contexts)
        last = min(first + draw.randrange(3), PLAN.n_contexts - 1)
        yield f"contexts {first} {last}"
        drop.text(lake, CORPUS, (first, last))


def collect(lake: Lake, draw: random.Random) -> Iterator[object]:
    yield ""
    lake.collect_garbage(GARBAGE_AGE_S["local" if storage.is_local(lake.path) else "store"])


def merge(lake: Lake, draw: random.Random) -> Iterator[object]:
    if lake.snapshot().select("moments", autoencoder=NAME):
        yield ""
        aggregate.merge(lake, NAME)


def copy_by_token(lake: Lake, draw: random.Random) -> Iterator[object]:
    missing = by_token.missing(lake.snapshot(), NAME)
    if missing:
        yield len(missing)
        by_token.refresh(lake, NAME, draw.choice([20_000, 200_000]))


WORK: Final = dict(zip(OPERATIONS, (encode_one, compact_some, drop_one, collect, merge, copy_by_token), strict=True))


def write(path: str, notes: Notes, seed: int, now: Any, spans: Any, stop: Any) -> None:
    """`now` is the operation's number, from 1, and its kind, 0 between two; `spans` is how long kinds took lately."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    draw, lake, number = random.Random(seed), Lake(path), 0
    while not stop.is_set():
        kind = draw.choices(range(len(OPERATIONS)), (6, 3, 2, 1, 1, 2))[0]
        name, number = OPERATIONS[kind], number + 1
        work = WORK[name](lake, draw)
        what = next(work, None)
        if what is None:
            continue
        notes.add("begin", name, what)
        began = time.monotonic()
        now.value = number * len(OPERATIONS) + kind
        try:
            next(work, None)
            notes.add("done", name, what)
        except LakeError as error:
            expected = isinstance(error, ConflictError) or any(text in str(error) for text in EXPECTED)
            notes.add("conflict" if expected else "error", name, what, error)
        except BaseException:
            notes.add("error", name, what, traceback.format_exc())
        now.value = 0
        spans[kind] += (time.monotonic() - began - spans[kind]) / 3


# The reader


def read(path: str, notes: Notes, stop: Any) -> None:
    """Opens the newest version, and asks it again after others have written and deleted."""
    try:
        while not stop.is_set():
            snapshot = Lake(path).snapshot()
            connection = connect(path, snapshot.version)
            for pause in (0.0, 2.0):
                time.sleep(pause)
                for fault in seen(snapshot, connection):
                    notes.add("error", "reader of version", snapshot.version, fault)
                notes.add("seen", snapshot.version)
    except BaseException:
        notes.add("error", "reader", traceback.format_exc())


def seen(snapshot: Any, connection: Any) -> Iterator[str]:
    def one(query: str) -> tuple[Any, ...]:
        (found,) = connection.sql(query).fetchall()
        return tuple(found)

    moments = snapshot.select("moments")
    rows, distinct = one("select count(*), count(distinct (atom, context_id, pos)) from latents")
    (n_active,) = one("select coalesce(sum(n_active), 0) from moments")
    if not rows == distinct == n_active == sum(file.rows for file in snapshot.select("latents")):
        yield f"{rows} rows, {distinct} of them distinct, {n_active} counted"
    copied, distinct = one("select count(*), count(distinct (atom, context_id, pos)) from latents_by_token")
    if not copied == distinct == rows:
        yield f"{copied} rows by token, {distinct} of them distinct, of {rows}"
    n_runs, n_distinct = one("select count(*), count(distinct run) from runs")
    units = sum(each.startswith("encode/") for each in snapshot.units)
    if not n_runs == n_distinct == len(moments) == units:
        yield f"{n_runs} runs, {n_distinct} of them distinct, {units} units"
    atoms, fired = one("select count(*), coalesce(sum(n_active), 0) from atoms")
    merged = snapshot.properties.get(f"aggregate/{NAME}")
    if atoms != (N_ATOMS if merged is not None else 0):
        yield f"{atoms} atoms"
    if merged == sorted(file.sha256 for file in moments) and fired != rows:
        yield f"atoms that fired {fired} times, of {rows}"
    (astray,) = one("select count(*) from latents anti join contexts using (context_id)")
    if astray:
        yield f"{astray} rows of contexts that are gone"


# The killer


def disturb(path: str, notes: Notes, kills: int, draw: random.Random) -> Counter[str]:
    """Kills as many writers, each kind of operation as often, at any moment that such operations have."""
    stop, killed, spans = fork.Event(), Counter[str](), fork.RawArray(ctypes.c_double, len(OPERATIONS))
    reader = fork.Process(target=read, args=(path, notes, stop))
    reader.start()
    with writing(path, notes, draw, spans, stop) as writers:
        while sum(killed.values()) < kills:
            if any(not process.is_alive() for process, _ in writers) or not reader.is_alive():
                notes.add("error", "a process ended by itself")
                break
            wanted = OPERATIONS[sum(killed.values()) % len(OPERATIONS)]
            at = draw.randrange(N_WRITERS)
            process, now = writers[at]
            doing: int = now.value
            if not doing or OPERATIONS[doing % len(OPERATIONS)] != wanted:
                time.sleep(0.0005)
                continue
            time.sleep(draw.uniform(0, 1.2 * spans[doing % len(OPERATIONS)]))
            os.kill(process.pid or 0, signal.SIGSTOP)
            # Stopped, so that it is certain what dies.
            if now.value == doing:
                process.kill()
                process.join()
                killed[wanted] += 1
                writers[at] = start(path, notes, draw, spans, stop)
            else:
                os.kill(process.pid or 0, signal.SIGCONT)
    reader.join()
    return killed


@contextmanager
def writing(
    path: str, notes: Notes, draw: random.Random, spans: Any, stop: Any
) -> Iterator[list[tuple[ForkProcess, Any]]]:
    writers = [start(path, notes, draw, spans, stop) for _ in range(N_WRITERS)]
    yield writers
    stop.set()
    for process, _ in writers:
        process.join()


def start(path: str, notes: Notes, draw: random.Random, spans: Any, stop: Any) -> tuple[ForkProcess, Any]:
    now = fork.RawValue(ctypes.c_int64, 0)
    process = fork.Process(target=write, args=(path, notes, draw.getrandbits(32), now, spans, stop))
    process.start()
    return process, now


# What is left


def faults_of(path: str, notes: Notes) -> list[str]:
    """What is wrong in the end, a line each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    lake = Lake(path)
    lost = list(unacknowledged(lake, notes))
    if lake.snapshot().select("moments"):
        aggregate.merge(lake, NAME)
    return [*lost, *wrong_answers(lake), *left_over(lake)]


def unacknowledged(lake: Lake, notes: Notes) -> Iterator[str]:
    """Where the log has less than was acknowledged, more than was begun, or a run twice."""
    lands: Counter[str] = Counter()
    there: set[int] = set()
    for entry in lake.log.entries(1):
        for run in range(N_RUNS):
            if unit("encode", NAME, CORPUS, run) in entry["forget"]:
                there.discard(run)
            if entry["set"].get(drop_mark(NAME, CORPUS, run)):
                lands[f"drop run {run}"] += 1
            if entry["unit"] == unit("encode", NAME, CORPUS, run):
                lands[f"encode {run}"] += 1
                if run in there:
                    yield f"run {run} was encoded twice, the second time as version {entry['version']}"
                there.add(run)
    done, begun, failed = (Counter(notes.of(kind)) for kind in ("done", "begin", "conflict"))
    for line in failed:
        failed_what = " ".join(line.split()[: 3 if line.startswith("drop run") else 2])
        begun[failed_what] -= failed[line]
    for what in {*done, *begun, *lands}:
        if what.startswith(("encode", "drop run")) and not done[what] <= lands[what] <= begun[what]:
            yield f"{what}: {done[what]} acknowledged, {begun[what]} begun, {lands[what]} in the log"
    gone = dropped_contexts(lake.snapshot(), CORPUS)
    for what in done:
        if what.startswith("drop contexts"):
            first, last = map(int, what.split()[2:])
            if ranges.without((first, last), gone):
                yield f"{what}: acknowledged, but not gone"


def wrong_answers(lake: Lake) -> Iterator[str]:
    """Tables that are not those of the rows that are left."""
    snapshot = lake.snapshot()
    gone = dropped_contexts(snapshot, CORPUS)
    encoded = [run for run in range(N_RUNS) if unit("encode", NAME, CORPUS, run) in snapshot.units]
    left = {run: ranges.without(PLAN.bounds(run), gone) for run in encoded}
    expected = {run: encode.run_tables(drawn(run, left[run]), ENCODING) for run in encoded}
    connection = connect(lake.path)
    for shown in ("latents", "latents_by_token", "moments", "histograms", "top", "samples"):
        table = "latents" if shown == "latents_by_token" else shown
        columns = SCHEMAS[table].names
        wanted = [
            row
            for run, tables in expected.items()
            for row in zip(
                *(
                    {"run": np.full(len(tables[table]["atom"]), run), **tables[table]}[name].tolist()
                    for name in columns
                ),
                strict=True,
            )
        ]
        if sorted(connection.sql(f"select {', '.join(columns)} from {shown}").fetchall()) != sorted(wanted):
            yield f"{shown}: not those of the runs, computed anew"
    act = np.concatenate([np.empty(0), *(tables["latents"]["act"] for tables in expected.values())]).astype(float)
    atom = np.concatenate([np.empty(0, int), *(tables["latents"]["atom"] for tables in expected.values())])
    n_tokens = sum(ranges.size(each) for each in left.values()) * WIDTH
    merged = connection.sql("select * from atoms order by atom").to_arrow_table()
    sums = [np.bincount(atom, act**power, N_ATOMS) for power in range(3)]
    for column, total in zip(("n_active", "mean_act", "mean_act_squared"), sums, strict=True):
        means = total if column == "n_active" else total / max(1, n_tokens)
        if not np.allclose(merged[column].to_numpy(), means, rtol=1e-12):
            yield f"atoms: {column} is not that of the rows"
    if not set(merged["n_tokens"].to_pylist()) <= {n_tokens}:
        yield "atoms: n_tokens is not that of the contexts that are left"


def left_over(lake: Lake) -> list[str]:
    """Files that remain after garbage was collected and are not the lake's."""
    lake.collect_garbage(0)
    found = {*storage.list_files(lake.path), *storage.list_files(lake.path, temporary=True)}
    checkpoints = [path for path in found if path.endswith(".checkpoint.json")]
    log = {lake.log.path(version).removeprefix(f"{lake.path}/") for version in lake.log.versions()}
    known = {*lake.snapshot().files, *log, *checkpoints, "_log/last_checkpoint"}
    missing = [f"{path}: missing" for path in sorted({*lake.snapshot().files} - found)]
    return [*missing, *(f"{path}: left over" for path in sorted(found - known)), *checkpoints[2:]]


if __name__ == "__main__":
    main()
