"""Writers that are killed lose nothing: the benchmark, with fewer kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_writers_lose_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos_writers", "--kills", "20", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout.splitlines()[-1])
    assert (row["kills"], row["faults"]) == (20, 0)
    assert row["reader_checks"] > 0
