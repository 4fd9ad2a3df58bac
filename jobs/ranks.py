"""Ranks: the workers of one training as Ray actors, placed, joined by torch.distributed, and watched.

Plain actors rather than Ray Train's worker group: that costs 15 s a start, and keeps its own checkpoints beside the
lake's. A worker that dies leaves the others waiting in a collective; whoever watches kills them, and starts all anew.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import get_node_ip_address

from sae.jobs import cluster, placement
from sae.mesh import Mesh
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, SaeError

_OTHERS_TELL_WITHIN_S: Final = 3.0
# How far ranks may be apart, and how long nothing may be heard of them, which collectives in CUDA graphs have no limit
# for; one that is dead is noticed otherwise, and at once.
_APART: Final = timedelta(minutes=30)
_DEAD_BECAUSE: Final = "The actor is dead because "


class Lost(Exception):
    """A worker is gone, or lost another one; what was committed is not. `at` is the monotonic time of the news."""

    def __init__(self, reason: str, at: float) -> None:
        super().__init__(reason)
        self.at = at


class UnreachableError(ConfigError):
    """A rank does not find the others, which may be the network's fault or that of one which died meanwhile."""


def n_ranks(config: Run) -> int:
    return config.cluster.tp * config.cluster.dp


# In a worker


def free_address() -> str:
    """An address of this machine that nobody listens at."""
    host = get_node_ip_address()
    with socket.socket() as free:
        free.bind((host, 0))
        return f"tcp://{host}:{free.getsockname()[1]}"


@contextmanager
def joined(config: Run, rank: int, size: int, address: str) -> Iterator[Mesh]:
    """The mesh of all ranks, of which the first is found at `address`."""
    if size == 1:
        yield Mesh()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu and not dist.is_nccl_available():
        raise ConfigError("cluster: tp and dp on GPUs need a torch with NCCL, which this one lacks; install another")
    timeout = timedelta(seconds=config.cluster.timeout_s)
    one = torch.ones(1, device="cuda" if on_gpu else "cpu")
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", address, timeout, size, rank)
        dist.all_reduce(one)
        mesh = Mesh.join(config.cluster.tp, config.cluster.dp, _APART)
        for group in (mesh.tp, mesh.dp, mesh.everyone):
            group.sum_(one)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreachableError(
            f"cluster: rank {rank} on {get_node_ip_address()} can't reach the others by {address} within "
            f"cluster.timeout_s, {config.cluster.timeout_s:.0f} s ({reason}); open the ports between the nodes, or "
            "name the network's interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None
    yield mesh
    # Not after an error: others may be in a collective, and this process is killed anyway.
    dist.destroy_process_group()


# In the driver


@contextmanager
def placed(config: Run, worker: type, *given: Any, again: bool = False) -> Iterator[list[Any]]:
    """Actors `worker(config, rank, n_ranks, *given)` for all ranks, which end with the block.

    If they are placed `again`, nodes that were lost may come back: there is more time for it.
    """
    size = n_ranks(config)
    options = cluster.worker_options(config, size)
    actors: list[Any] = []
    with placement.reserved(config, options, again=again) as places:
        try:
            for rank, place in enumerate(places):
                made: Any = ray.remote(worker).options(max_concurrency=2, scheduling_strategy=place, **options)
                actors.append(made.remote(config, rank, size, *given))
            yield actors
        finally:
            for actor in actors:
                ray.kill(actor)


def on_gpus(config: Run) -> Run:
    """The config of ranks that replace lost ones: where there are GPUs now, each then waits for one of its own too."""
    if config.cluster.gpus_per_worker is not None or not ray.cluster_resources().get("GPU"):
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"gpus_per_worker": 1.0})})


def check_gpus(config: Run) -> None:
    """Raises ConfigError where there are GPUs, but fewer than ranks, each of which needs one of its own."""
    size, known = n_ranks(config), int(ray.cluster_resources().get("GPU", 0))
    share = config.cluster.gpus_per_worker
    if size > 1 and share is not None and 0 < share < 1:
        raise ConfigError(f"cluster.gpus_per_worker: got {share}, but ranks of tp and dp need a GPU each; give 1")
    if share is None and 0 < known < size:
        raise ConfigError(
            f"cluster.tp {config.cluster.tp} times cluster.dp {config.cluster.dp} is {size} ranks, each on a GPU of "
            f"its own, but there are {known}; lower them, or set cluster.gpus_per_worker: 1 to wait for more"
        )


class Reports:
    """What the first rank's `train` yields, while the others `follow`; an interrupt while waiting changes nothing.

    Raises the SaeError of whichever rank has one, and Lost where a rank is gone.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._stream: Any = None
        self._others: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            self._begin()
            while True:
                found, _ = ray.wait([self._stream, *self._others], num_returns=1, timeout=_APART.total_seconds())
                if not found:
                    raise Lost(f"nothing was heard of any rank for {_APART}", time.monotonic())
                (ready,) = found
                if ready in self._others:
                    ray.get(ready)
                    self._others.remove(ready)
                else:
                    return ray.get(next(self._stream))
        except StopIteration:
            self._finish()
            raise
        except RayError as error:
            raise self._cause(error) from None

    def stop(self) -> None:
        """Lets all ranks end with a checkpoint, and waits for it; nothing where they have not begun.

        A rank that is lost meanwhile ends the others too: their last checkpoint is there.
        """
        if self._stream is None:
            return
        try:
            reached = max(ray.get([actor.pause.remote() for actor in self._actors]))
            ray.get([actor.stop.remote(reached + 1) for actor in self._actors])
            for _ in self:
                pass
        except (Lost, RayError):
            return

    def _begin(self) -> None:
        if self._stream is None:
            first, *rest = self._actors
            # All of them are up before the first waits for the others: starting is not what cluster.timeout_s limits.
            ray.get([actor.__ray_ready__.remote() for actor in rest])
            address = ray.get(first.address.remote()) if rest else ""
            others = [actor.follow.remote(address) for actor in rest]
            self._stream, self._others = first.train.options(num_returns="streaming").remote(address), others

    def _finish(self) -> None:
        try:
            ray.get(self._others)
        except RayError as error:
            raise self._cause(error) from None

    def _cause(self, error: RayError) -> BaseException:
        """Why the ranks end: the one that is heard of first may only have missed another one that had a reason."""
        at, found = time.monotonic(), cluster.cause(error)
        if _is_reason(found):
            return found
        if dead := _dead(self._actors):
            rank, death = next(iter(dead.items()))
            # What its constructor raises would come again.
            return death if death.actor_init_failed else Lost(f"rank {rank}: {_of_death(death)}", at)
        told = [found, *map(cluster.cause, _errors(self._others))]
        for reason in (_is_reason, lambda one: isinstance(one, SaeError)):
            if chosen := [one for one in told if reason(one)]:
                return chosen[0]
        if isinstance(error, RayTaskError) and not isinstance(found, RuntimeError):
            return error  # a fault of the program: it would come again
        return Lost(_last_line(found), at)


def _is_reason(error: BaseException) -> bool:
    return isinstance(error, SaeError) and not isinstance(error, UnreachableError)


def _dead(actors: list[Any]) -> dict[int, RayActorError]:
    """The ranks whose actors are dead; one that is alive answers although it works."""
    asked = [actor.__ray_ready__.remote() for actor in actors]
    ray.wait(asked, num_returns=len(asked), timeout=_OTHERS_TELL_WITHIN_S)
    dead = {}
    for rank, answer in enumerate(asked):
        try:
            ray.get(answer, timeout=0)
        except RayActorError as error:
            dead[rank] = error
        except GetTimeoutError:
            continue
    return dead


def _errors(others: list[Any]) -> Iterator[RayError]:
    """What those have raised that end soon."""
    ended, _ = ray.wait(others, num_returns=len(others), timeout=_OTHERS_TELL_WITHIN_S) if others else ([], [])
    for one in ended:
        try:
            ray.get(one)
        except RayError as error:
            yield error


def _of_death(error: RayActorError) -> str:
    """What Ray says of an actor's death, without its list of ids and its advice."""
    if isinstance(error, ActorUnavailableError):
        return "out of reach"
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line.startswith(_DEAD_BECAUSE)), lines[0])
    return said.removeprefix(_DEAD_BECAUSE).split(". ")[0][:200].removesuffix(".")


def _last_line(error: BaseException) -> str:
    """That of a traceback: what was raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
