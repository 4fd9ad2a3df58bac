"""A node is lost while its actors encode: the others do its runs, each of which is in the lake once."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from sae.jobs import runs
from sae.jobs.lake import Lake
from tests.in_process import encoder, train
from tests.tiny_run import CORPUS, NAME, Lab, rows

RUN_TOKENS = 32
TABLES = ("latents", "moments", "histograms", "top", "samples", "runs")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without processors, for the driver, and two nodes with one each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    memory: dict[str, Any] = {"object_store_memory": 10**8}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, **memory)
        yield nodes
    finally:
        nodes.shutdown()


def lose_one_that_encodes(cluster: Any) -> None:
    """Kills a node with all its processes."""
    actors = {node: actors_of(node) for node in cluster.list_all_nodes()}
    lost = next(node for node in actors if actors[node])
    cluster.remove_node(lost, allow_graceful=False)
    for actor in actors[lost]:
        with suppress(psutil.NoSuchProcess):
            actor.kill()


def actors_of(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [one for one in raylet.children(recursive=True) if (one.cmdline() or [""])[0].startswith("ray::MapWorker")]


@pytest.mark.long
def test_encode_goes_on_without_a_node_that_is_lost(tokenized: Lab, cluster: Any, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    train(lab, training__tokens=640)
    undisturbed = lab.copy(tmp_path / "undisturbed")
    lake = Lake(str(lab.lake))
    plan, every = runs.outstanding(lake.snapshot(), "encode", NAME, CORPUS, RUN_TOKENS)
    options = {"lake": lab.lake, "encode.run_tokens": RUN_TOKENS}
    options |= {"cluster.address": cluster.address, "cluster.encode_actors": 2}
    command = [sys.executable, "-m", "sae.jobs.cli", "encode", str(lab.config)]
    command += [f"--{key}={value}" for key, value in options.items()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as encoding:
        while len(lake.snapshot().select("moments")) < len(every) // 4 and encoding.poll() is None:
            time.sleep(0.01)
        lose_one_that_encodes(cluster)
        n_encoded = len(lake.snapshot().select("moments"))
        _, stderr = encoding.communicate(timeout=200)
    assert (encoding.returncode, n_encoded < len(every)) == (0, True), stderr
    assert [file.run for file in lake.snapshot().select("moments")] == every

    alone = encoder(undisturbed, encode__run_tokens=RUN_TOKENS)
    for run in range(plan.n_runs):
        alone({"run": [run]})
    for table in TABLES:
        assert rows(lab.lake, table) == rows(undisturbed.lake, table), table
