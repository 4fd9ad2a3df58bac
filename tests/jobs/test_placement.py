"""Where ranks are started: tp groups on one node as far as they fit, a wait that says for what, and its end."""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.util.placement_group import placement_group, remove_placement_group

from sae.jobs import cluster, placement, progress, ranks
from sae.jobs.placement import bundles_of_ranks, whole_groups
from sae.schemas.errors import WorkerError
from tests.in_process import run_of
from tests.tiny_run import Lab

Meshes = list[tuple[int, int]]

# Three nodes pretend to have GPUs.
SCRIPT = """
import json, os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from sae.jobs import cli, cluster, placement, ranks
from sae.schemas.errors import WorkerError

class Rank:
    def __init__(self, config, rank, n_ranks):
        self._rank = rank
    def sees(self):
        return self._rank, os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids()

def on_mesh(dp, tp, **more):
    return base.model_copy(update={"cluster": base.cluster.model_copy(update={"tp": tp, "dp": dp, **more})})

def nodes(config, again=False):
    tp, dp = config.cluster.tp, config.cluster.dp
    with placement.reserved(config, cluster.worker_options(config, tp * dp), again=again) as places:
        of_bundles = placement_group_table(places[0].placement_group)["bundles_to_node_id"]
        found = [of_bundles[place.placement_group_bundle_index] for place in places]
    return [found[group * tp : (group + 1) * tp] for group in range(dp)]

base = cli.load_config(sys.argv[1], [("lake", sys.argv[2])])
memory = {"object_store_memory": 10**8}
nodes_of = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
added = [nodes_of.add_node(num_cpus=4, num_gpus=gpus, **memory) for gpus in (3, 2, 3)]
ray.init(nodes_of.address, log_to_driver=False, logging_level="ERROR")
try:
    found = {"placed": [nodes(on_mesh(*mesh)) for mesh in json.loads(sys.argv[3])]}
    for gpus in (0, 1):
        with ranks.placed(on_mesh(2, 1, gpus_per_worker=gpus), Rank) as actors:
            found[f"with {gpus}"] = ray.get([actor.sees.remote() for actor in actors])
    replacing = ranks.on_gpus(on_mesh(8, 1))
    nodes_of.remove_node(added[0])
    placement._NODES_COME_WITHIN_S = 1.0
    try:
        nodes(replacing, again=True)
    except WorkerError as error:
        found["error"] = str(error)
    placement._NODES_COME_WITHIN_S = 60.0
    nodes_of.add_node(num_cpus=4, num_gpus=3, **memory)
    found["again"] = nodes(replacing, again=True)
finally:
    ray.shutdown()
    nodes_of.shutdown()
print(json.dumps(found))
"""
MESHES: Meshes = [(1, 3), (4, 2), (2, 4)]


@pytest.fixture(scope="module")
def small_nodes(lab: Lab) -> dict[str, Any]:
    """The nodes of ranks, by tp group, on nodes of three, two and three GPUs: by mesh, and after a node was lost."""
    command = [sys.executable, "-c", SCRIPT, str(lab.config), str(lab.lake), json.dumps(MESHES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
def test_tp_groups_are_on_one_node_as_far_as_they_fit(small_nodes: dict[str, Any]) -> None:
    of_one, of_four, of_two = small_nodes["placed"]
    assert [len({*group}) for group in of_one] == [1]
    assert sorted(len({*group}) for group in of_four) == [1, 1, 1, 2], "three, two and three have room for three pairs"
    assert sorted(len({*group}) for group in of_two) == [2, 2], "none has room for four"


@pytest.mark.long
def test_who_replaces_a_lost_rank_waits_for_a_gpu_of_its_own(small_nodes: dict[str, Any]) -> None:
    """Two ranks on one GPU could not join each other."""
    error = small_nodes["error"]
    assert error.startswith("cluster: no room for 8 workers (cluster.tp times cluster.dp) within 1 s; each takes ")
    assert "each takes 1 CPU and 1 GPU, and on 3 nodes there are free 8 of 8 CPU and 5 of 5 GPU" in error
    assert sorted(Counter(node for (node,) in small_nodes["again"]).values()) == [2, 3, 3]


@pytest.mark.long
def test_workers_that_ask_for_no_gpu_see_none(small_nodes: dict[str, Any]) -> None:
    """On nodes that have some."""
    assert small_nodes["with 0"] == [[0, "", []], [1, "", []]]
    assert all(visible and len(ids) == 1 for _, visible, ids in small_nodes["with 1"])


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 5), st.integers(1, 6))
def test_as_many_groups_are_whole_as_nodes_have_room_for(fits: list[int], tp: int, dp: int) -> None:
    whole = whole_groups(fits, tp, dp, to_come=False)
    assert whole <= dp
    left = sorted(fits, reverse=True)
    for _ in range(whole):
        left = sorted([left[0] - tp, *left[1:]], reverse=True)
    assert min(left, default=0) >= 0, "there is room for so many"
    assert whole == dp or max(left, default=0) < tp, "and for no further one"


@given(st.lists(st.sampled_from("abcd"), max_size=24), st.integers(0, 3), st.integers(1, 4))
def test_each_rank_has_its_place_and_neighbours_share_nodes(nodes: list[str], whole: int, tp: int) -> None:
    """Of the ranks of groups that are divided, those on one node follow each other."""
    nodes = ["x"] * whole + nodes
    bundles = bundles_of_ranks(nodes, whole, tp)
    assert Counter(bundles) == {bundle: tp if bundle < whole else 1 for bundle in range(len(nodes))}
    assert bundles[: whole * tp] == [bundle for bundle in range(whole) for _ in range(tp)]
    runs = [node for node, _ in itertools.groupby(nodes[bundle] for bundle in bundles[whole * tp :])]
    assert len(runs) == len({*runs})


@pytest.fixture
def no_room(one_ray: None) -> Iterator[Any]:
    """All processors of the one node are in use until this is called."""
    taken = [placement_group([{"CPU": ray.cluster_resources()["CPU"]}])]
    ray.get(taken[0].ready())

    def free() -> None:
        while taken:
            remove_placement_group(taken.pop())

    yield free
    free()
    # Ray counts what was taken as free again a little later; the next test's line tells how much there is.
    give_up = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < give_up
        time.sleep(0.05)


class Never:
    """A worker that is not started, for there is no room."""


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("gpus", [None, 0])
def test_a_wait_says_for_what_and_ends(
    dp: int,
    gpus: int | None,
    no_room: Any,
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever asks for no GPUs waits for none; one rank alone is told so too."""
    monkeypatch.setattr(placement, "_SAY_AFTER_S", 0.1)
    monkeypatch.setattr(placement, "_SAY_EVERY_S", 0.2)
    monkeypatch.setattr(placement, "_OTHERS_END_WITHIN_S", 1.0)
    config = run_of(lab, cluster__dp=dp, cluster__gpus_per_worker=gpus)
    with pytest.raises(WorkerError) as raised, ranks.placed(config, Never):
        raise AssertionError("there is no room")
    workers = "1 worker" if dp == 1 else "2 workers"
    assert str(raised.value).startswith(
        f"cluster: no room for {workers} (cluster.tp times cluster.dp) within 1 s; each"
    )
    assert "and on 1 node there are free 0 of 2 CPU; wait for whoever uses the nodes" in str(raised.value)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"waiting for room for {workers} (cluster.tp times cluster.dp), 0 of 1 s; each takes ")
    assert second.startswith("waiting for room for ")


def test_ranks_that_ask_for_gpus_wait_longer(
    one_ray: None, lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An autoscaler may bring some."""
    monkeypatch.setattr(placement, "_SAY_AFTER_S", 0.1)
    monkeypatch.setattr(placement, "_NODES_COME_WITHIN_S", 1.0)
    monkeypatch.setattr(placement, "_OTHERS_END_WITHIN_S", 0.0)
    config = run_of(lab, cluster__dp=2, cluster__gpus_per_worker=1)
    with pytest.raises(WorkerError, match="within 1 s; each takes 1 CPU and 1 GPU"), ranks.placed(config, Never):
        raise AssertionError("there is no room")
    assert "0 of 1 s; each takes 1 CPU and 1 GPU, and on 1 node there are free 2 of 2 CPU and 0 of 0 GPU" in (
        capsys.readouterr().err
    )


def test_a_wait_ends_with_room(no_room: Any, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_SAY_AFTER_S", 0.1)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        no_room()

    monkeypatch.setattr(progress, "say", say)
    config = run_of(lab, cluster__dp=2)
    with placement.reserved(config, cluster.worker_options(config, 2), again=False) as places:
        assert len(places) == 2
    assert len(said) == 1
