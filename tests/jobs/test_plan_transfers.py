"""What ranks really send each other in a step, against what `sae plan` says of it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sae.jobs import costs
from sae.mesh import Mesh
from sae.model import Autoencoder, TopK
from sae.training import StepConfig, TrainStep
from tests.ranks import Ranks

ROWS, D, N, K, AUXK = 24, 16, 128, 4, 8
OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
# On a CPU products are in float32 too: the new weights of all latents are twice as many bytes as on a GPU.
WIDER = {"new weights": 2 * 2 * D}

Sent = dict[tuple[str, str], int]


@pytest.fixture(scope="module")
def ranks(one_ray: None) -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.end()


class Counting(TorchDispatchMode):
    """Counts bytes of whole results of collectives, by axis and operation."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        groups = {"tp": mesh.tp, "dp": mesh.dp, "all": mesh.everyone}
        self._axes = {axis: group._group.group_name for axis, group in groups.items() if group._group is not None}
        self.seen: Sent = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = OPERATIONS.get(function.__name__.split(".")[0])
        if operation is not None:
            tensors, group = (args[0], args[1]) if operation == "all-reduce" else (args[:2], args[2])
            name = dist.ProcessGroup.unbox(group).group_name
            size = max(tensor.nbytes for tensor in tensors)
            for key in [(axis, operation) for axis, of_axis in self._axes.items() if of_axis == name]:
                self.seen[key] = self.seen.get(key, 0) + size
        return function(*args, **(kwargs or {}))


def counted_step(mesh: Mesh, dead: float, multi: bool) -> Sent:
    """What one step's collectives give on this rank."""
    autoencoder = Autoencoder(N // mesh.tp.size, D, TopK(K), tp=mesh.tp)
    autoencoder.stats_last_nonzero[: int(dead * autoencoder.n_latents)] = 10**9
    # So large a bias that the others are never selected, and the dead stay dead.
    autoencoder.latent_bias.data[int(dead * autoencoder.n_latents) :] = 100.0
    config = StepConfig(auxk=AUXK, dead_after_tokens=10**6, multi_topk_coef=multi / 8)
    step = TrainStep(autoencoder, config, mesh)
    with Counting(mesh) as counted:
        step.step(torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)), 1e-3)
    seen: Sent = counted.seen
    return seen


def planned(tp: int, dp: int, dead: float, multi: bool) -> Sent:
    sizes = costs.Sizes(ROWS * dp, D, N, K, auxk=AUXK, dead=dead, multi=multi)
    found: Sent = {}
    for one in costs.transfers(sizes, costs.Mesh(tp, dp)):
        if one.what != "rows of the batch":  # they were gathered before the step
            size = one.size + WIDER.get(one.what, 0) * sizes.local(costs.Mesh(tp, dp))
            found[one.over, one.operation] = found.get((one.over, one.operation), 0) + size
    return found


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("dead", "multi"), [(0.0, False), (0.25, False), (0.0, True)])
def test_ranks_send_what_was_planned(ranks: Ranks, tp: int, dp: int, dead: float, multi: bool) -> None:
    few = 24  # bytes of counts that are added or compared on their own
    expected = planned(tp, dp, dead, multi)
    for seen in ranks.on_mesh(dp, tp, counted_step, dead, multi):
        assert set(seen) == set(expected)
        for key, size in seen.items():
            assert abs(size - expected[key]) <= few
