"""Ranks of a torch.distributed job over gloo, as Ray actors that are used again and again."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from sae.mesh import Mesh

TIMEOUT = timedelta(seconds=60)


class _Rank:
    def __init__(self) -> None:
        torch.set_num_threads(1)

    def free_address(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def run(self, address: str, rank: int, dp: int, tp: int, work: Callable[..., Any], *given: Any) -> Any:
        if dp * tp == 1:
            return work(Mesh(), *given)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=dp * tp, timeout=TIMEOUT)
        try:
            return work(Mesh.join(tp, dp, TIMEOUT), *given)
        finally:
            dist.destroy_process_group()


class Ranks:
    """Actors that are started once they are needed."""

    def __init__(self) -> None:
        self._actors: list[Any] = []

    def on_mesh(self, dp: int, tp: int, work: Callable[..., Any], *given: Any) -> list[Any]:
        """What work(mesh, *given) gives on each rank of a mesh."""
        while len(self._actors) < dp * tp:
            self._actors.append(ray.remote(_Rank).options(num_cpus=0).remote())
        address = ray.get(self._actors[0].free_address.remote())
        chosen = enumerate(self._actors[: dp * tp])
        found: list[Any] = ray.get([actor.run.remote(address, rank, dp, tp, work, *given) for rank, actor in chosen])
        return found

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
