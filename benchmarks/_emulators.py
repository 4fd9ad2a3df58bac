"""An object store's emulator in a process of its own, behind a network that fails at random."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Final

from tests.object_stores import serve_through_proxy
from tests.proxies import Fault

FAULTS: Final[tuple[Fault, ...]] = ("500", "500 although done", "lost request", "lost answer", "cut", "slow")
_fork: Final = multiprocessing.get_context("fork")


@contextmanager
def serving(store: str, rate: float, seed: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Gives a bucket's path, and from the end of the block on how many requests there were and what became of some.

    The environment is such that this process and those that it forks find the store.
    """
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(store, rate, seed, theirs))
    process.start()
    bucket, environment = ours.recv()
    if bucket is None:
        sys.exit(f"--store {store}: {environment}")
    os.environ.update(environment)
    requests: dict[str, int] = {}
    try:
        yield bucket, requests
    finally:
        ours.send(None)
        requests.update(ours.recv())
        process.join()


def _serve(store: str, rate: float, seed: int, pipe: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)  # of servers that write a line for each request
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    before = dict(os.environ)
    try:
        with serve_through_proxy(store) as (bucket, proxy):
            changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
            happened = proxy.misbehave(rate, FAULTS, seed)
            pipe.send((bucket, changed))
            pipe.recv()
            pipe.send({"requests": len(proxy.requests), **{fault: happened[fault] for fault in FAULTS}})
    except BaseException as error:  # that a server is not installed, too
        pipe.send((None, f"the emulator did not start: {error}"))
