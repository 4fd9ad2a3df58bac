"""Room for ranks on the nodes of a cluster: for those of a tp group on one node, as far as nodes are large enough."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sae.jobs import progress
from sae.schemas.config import Run
from sae.schemas.errors import WorkerError

# Others end, or nodes come.
_OTHERS_END_WITHIN_S: Final = 30.0
_NODES_COME_WITHIN_S: Final = 1800.0
_SAY_AFTER_S: Final = 5.0
_SAY_EVERY_S: Final = 60.0

Needs = dict[str, float]
"""What a rank takes of a node, by kind of resource."""


@contextmanager
def reserved(config: Run, options: dict[str, Any], *, again: bool) -> Iterator[list[PlacementGroupSchedulingStrategy]]:
    """Where each rank is to be started, by actors of these options; the room is free again behind the block.

    Nodes may come for ranks that are placed `again` and for those that ask for GPUs: there is more time for it. Raises
    WorkerError where there is no room in time.
    """
    tp, dp = config.cluster.tp, config.cluster.dp
    needs = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
    needs = {kind: amount for kind, amount in needs.items() if amount}
    asks = bool(config.cluster.gpus_per_worker)
    whole = whole_groups(_fits(needs), tp, dp, to_come=asks)
    sizes = [tp] * whole + [1] * (tp * (dp - whole))
    group = placement_group([{kind: size * amount for kind, amount in needs.items()} for size in sizes], "PACK")
    try:
        _wait(group, config, needs, _NODES_COME_WITHIN_S if asks or again else _OTHERS_END_WITHIN_S)
        node_of = placement_group_table(group)["bundles_to_node_id"]
        bundles = bundles_of_ranks([node_of[bundle] for bundle in range(len(sizes))], whole, tp)
        yield [PlacementGroupSchedulingStrategy(group, bundle) for bundle in bundles]
    finally:
        remove_placement_group(group)


def whole_groups(fits: list[int], tp: int, dp: int, *, to_come: bool) -> int:
    """How many of dp groups of tp ranks find room on one node each, where nodes have room for so many ranks.

    Of nodes that are `to_come` nothing is known; they are taken to be as large as the largest, or large enough.
    """
    if to_come and (not any(fits) or max(fits) >= tp):
        return dp
    return min(dp, sum(ranks // tp for ranks in fits))


def bundles_of_ranks(nodes: list[str], whole: int, tp: int) -> list[int]:
    """The bundle of each rank. The first bundles are of whole groups, the others of single ranks, each on its node.

    Groups that must be divided are so as little as a simple rule can: neighbours go to the same node.
    """
    singles = range(whole, len(nodes))
    on_node = Counter(nodes[bundle] for bundle in singles)
    ordered = sorted(singles, key=lambda bundle: (-on_node[nodes[bundle]], nodes[bundle]))
    return [*(bundle for bundle in range(whole) for _ in range(tp)), *ordered]


def _fits(needs: Needs) -> list[int]:
    """For how many ranks each node is large enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Ray counts in units of 1e-4.
    return [int(min(node.get(kind, 0) / amount for kind, amount in needs.items()) + 1e-4) for node in nodes]


def _wait(group: PlacementGroup, config: Run, needs: Needs, within: float) -> None:
    began, next_line, ready = time.monotonic(), _SAY_AFTER_S, group.ready()
    n = config.cluster.tp * config.cluster.dp
    wanted = f"{n} {'worker' if n == 1 else 'workers'} (cluster.tp times cluster.dp)"
    while not ray.wait([ready], timeout=max(0.0, began + min(within, next_line) - time.monotonic()))[0]:
        waited = time.monotonic() - began
        if waited >= within:
            raise WorkerError(
                f"cluster: no room for {wanted} within {waited:.0f} s; {_room(needs)}; wait for whoever uses the "
                "nodes, or add some, or lower cluster.tp or cluster.dp"
            )
        if waited >= next_line:
            progress.say(f"waiting for room for {wanted}, {waited:.0f} of {within:,.0f} s; {_room(needs)}")
            next_line = waited + _SAY_EVERY_S
    ray.get(ready)


def _room(needs: Needs) -> str:
    """What a worker takes and what there is, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    each = " and ".join(f"{amount:.3g} {kind}" for kind, amount in needs.items())
    there = " and ".join(f"{free.get(kind, 0):.3g} of {total.get(kind, 0):.3g} {kind}" for kind in needs)
    n = sum(node["Alive"] for node in ray.nodes())
    return f"each takes {each}, and on {n} {'node' if n == 1 else 'nodes'} there are free {there}"
