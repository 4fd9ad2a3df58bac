"""A run's sort and statistics: numpy on the host, the rows copied there first, against torch where the rows are.

Both begin with the unsorted rows on the device and end with the five tables in host memory. They take turns in one
process; times are wall times, as the last thing that either does is to wait for its tables.
"""

import argparse
import json
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks._timing import seconds
from sae.device_statistics import DeviceRun
from sae.statistics import Columns, SortedRun
from tests.latent_rows import power_law_rows, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2**23 if torch.cuda.is_available() else 2**19)
    parser.add_argument("--atoms", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    row = measure(power_law_rows(args.rows, args.atoms, torch.device(args.device)), args.rounds)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        versions = {"torch": torch.__version__, "device": args.device, "atoms": args.atoms}
        print(json.dumps({"benchmark": "statistics", **versions, **row}))


def measure(rows: Sequence[Tensor], rounds: int) -> dict[str, float]:
    def by_numpy() -> list[Columns]:
        return tables(SortedRun.from_rows(*(column.cpu().numpy() for column in rows)))

    def by_torch() -> list[Columns]:
        return tables(DeviceRun.from_rows(*rows))

    times: dict[str, list[float]] = {"numpy_s": [], "device_s": []}
    for _ in range(rounds + 1):
        times["numpy_s"].append(seconds(by_numpy))
        times["device_s"].append(seconds(by_torch))
    # The first round warms both up.
    medians = {name: round(statistics.median(taken[1:]), 4) for name, taken in times.items()}
    return {"rows": len(rows[0]), **medians, "speedup": round(medians["numpy_s"] / medians["device_s"], 2)}


if __name__ == "__main__":
    main()
