"""On two GPUs: steps of a mesh, whose collectives are NCCL's, are recorded with them and keep their bits."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from sae.activations import TopK
from sae.graphs import Replay
from sae.initialise import initialise
from sae.mesh import BUCKETS, Mesh
from sae.model import Autoencoder
from sae.training import StepConfig, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

N, D, ROWS, STEPS = 4096, 160, 1024, 40
TIMEOUT = timedelta(seconds=60)


def data() -> Tensor:
    """Activations of which some directions are large: a third of the latents die."""
    rows = torch.randn(STEPS * ROWS, D, generator=torch.Generator().manual_seed(5))
    return rows / torch.arange(1, D + 1)


def trained(mesh: Mesh, graphs: bool, **of_config: Any) -> dict[str, Tensor]:
    """Training state and metrics after STEPS steps, of this rank."""
    rows = data().cuda()
    held = Autoencoder(N // mesh.tp.size, D, TopK(16), normalize=True, tp=mesh.tp).cuda()
    scale = initialise(held, rows[:4096], torch.Generator().manual_seed(0), mesh.everyone)
    config = StepConfig(mse_scale=scale, auxk=64, dead_after_tokens=5_000, ema_decay=0.99, graphs=graphs, **of_config)
    train = TrainStep(held, config, mesh)
    metrics = [train.step(batch[mesh.dp.share(ROWS)], 3e-4) for batch in rows.split(ROWS)]
    found = {name: value.clone() for name, value in train.state_dict().items()}
    train.end()
    return found | {name: torch.stack([one[name] for one in metrics]) for name in metrics[0]}


def cases() -> Iterator[tuple[Mesh, dict[str, Any]]]:
    """Meshes of two, and what their steps do beside reconstructing."""
    rows, latents = Mesh.join(1, 2, TIMEOUT), Mesh.join(2, 1, TIMEOUT)
    assert rows.n_buckets == 1
    for mesh in (rows, replace(rows, n_buckets=BUCKETS), latents):
        for of_config in ({}, {"clip": 0.5}, {"multi_topk_coef": 0.125}):
            yield mesh, of_config


def compare(rank: int, address: str) -> None:
    torch.cuda.set_device(rank)
    replayed = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replayed
        replayed += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[assignment, method-assign]
    alone = trained(Mesh(), graphs=True)
    dist.init_process_group("nccl", address, TIMEOUT, 2, rank)
    for mesh, of_config in cases():
        before, by_one = replayed, trained(mesh, graphs=False, **of_config)
        assert replayed == before
        recorded = trained(mesh, graphs=True, **of_config)
        assert replayed > before + STEPS / 3 > before + Replay.WARM_UP
        for name, value in by_one.items():
            assert torch.equal(recorded[name], value), f"{name}, tp {mesh.tp.size}, {mesh.n_buckets} parts, {of_config}"
        assert by_one["dead"].max() > 0.05
        if not of_config:
            torch.testing.assert_close(recorded["loss"], alone["loss"], rtol=2e-2, atol=0)
    dist.destroy_process_group()


def test_recorded_steps_of_a_mesh_have_the_bits_of_steps_launched_one_by_one() -> None:
    """And the losses of one GPU, but for the rounding of bfloat16."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    spawn(compare, (address,), nprocs=2)
