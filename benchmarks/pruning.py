"""A question about one atom on a lake of many files: with all of them in the view, and with those that can hold it.

The files are small and stay in the page cache, so that what is measured is the opening of files.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa

from benchmarks._timing import seconds
from sae.jobs.lake import Lake, connect

ATOMS_PER_FILE = 16
ROWS_PER_ATOM = 64
QUESTION = "select count(*), max(act) from latents where autoencoder = 'many' and atom = "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(folder, args.files)
        row = measure(folder, args.files * ATOMS_PER_FILE // 2, args.rounds)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        print(json.dumps({"benchmark": "pruning", "duckdb": duckdb.__version__, "files": args.files, **row}))


def write(folder: str, n_files: int) -> None:
    """A lake of compacted latents, each file a range of atoms."""
    draw = np.random.default_rng(0)
    n = ATOMS_PER_FILE * ROWS_PER_ATOM
    with Lake(folder, create=True).transaction("compact") as transaction:
        for file in range(n_files):
            columns = {
                "atom": np.repeat(np.arange(file * ATOMS_PER_FILE, (file + 1) * ATOMS_PER_FILE), ROWS_PER_ATOM),
                "context_id": np.sort(draw.integers(0, 100_000, (ATOMS_PER_FILE, ROWS_PER_ATOM)), axis=1).reshape(-1),
                "pos": draw.integers(0, 64, n),
                "act": draw.random(n),
            }
            transaction.write("latents", pa.table(columns), autoencoder="many")


def measure(folder: str, atom: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the question and of connecting, medians."""
    connections = {"all": connect(folder), "one": connect(folder, atoms=(atom, atom))}
    connecting = {"all": partial(connect, folder), "one": partial(connect, folder, atoms=(atom, atom))}
    asking = {name: partial(answer, connection, atom) for name, connection in connections.items()}
    answers = {name: ask() for name, ask in asking.items()}
    if answers["all"] != answers["one"]:
        raise SystemExit(f"the answers differ: {answers}")
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in connections:
            times.setdefault(f"query_{name}_ms", []).append(1000 * seconds(asking[name]))
            times.setdefault(f"connect_{name}_ms", []).append(1000 * seconds(connecting[name]))
    return {name: round(statistics.median(taken), 2) for name, taken in times.items()}


def answer(connection: duckdb.DuckDBPyConnection, atom: int) -> list[tuple[int, float]]:
    return connection.execute(f"{QUESTION}{atom}").fetchall()


if __name__ == "__main__":
    main()
