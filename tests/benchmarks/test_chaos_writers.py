"""Writers that are killed lose nothing: the benchmark, with fewer kills."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def killed(n: int, *options: str) -> dict[str, Any]:
    """What the benchmark says after so many kills."""
    command = [sys.executable, "-m", "benchmarks.chaos_writers", "--kills", str(n), *options, "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row


@pytest.mark.slow
@pytest.mark.parametrize("n", [6, pytest.param(20, marks=pytest.mark.long)])
def test_killed_writers_lose_nothing(n: int) -> None:
    row = killed(n)
    assert (row["kills"], row["faults"]) == (n, 0)
    assert row["reader_checks"] > 0


@pytest.mark.long
def test_killed_writers_lose_nothing_in_a_store_whose_network_fails() -> None:
    row = killed(6, "--store", "s3", "--faults", "0.02")
    assert (row["kills"], row["faults"]) == (6, 0)
    assert row["reader_checks"] > 0
    assert row["lost answer"] > 0
