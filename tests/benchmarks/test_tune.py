"""The command that measures launch settings, at a tiny size in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tune import fastest
from sae.kernels.launches import OPS

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_that_lose_least_over_all_shapes_win() -> None:
    a, b, c = OPS["product"].candidates[:3]
    times = {"small": {"a": 1.0, "b": 1.1, "c": 0.9}, "large": {"a": 100.0, "b": 60.0}}  # c does not fit the large one
    rows = [
        {"shape": shape, "op": "product", "settings": {"a": a, "b": b, "c": c}[name], "ms": ms}
        for shape, by_name in times.items()
        for name, ms in by_name.items()
    ]
    rows.append({"shape": "small", "op": "select", "settings": {"num_warps": 8}, "ms": 1.0})
    assert fastest(rows) == {"product": b, "select": {"num_warps": 8}}


@pytest.mark.long
def test_the_command_prints_an_entry_of_each_op_that_runs_here() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--device", "cpu", "--shapes", "3,8,33,2", "--rounds", "1", "--json"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "tune"
    assert found["shipped"].keys() == {"product", "select_few", "reconstruct", "update_narrow"}
    assert all(settings in OPS[op].candidates for op, settings in found["shipped"].items())
