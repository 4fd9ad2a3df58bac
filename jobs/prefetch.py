"""Chunks of activations made ahead of their use: in a thread, and on a CUDA stream beside the one that trains."""

import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

import torch
from torch import Tensor

from sae.devices import Check

Chunk = tuple[Tensor, Check]


def ahead(chunks: Iterator[Chunk], device: torch.device, depth: int = 2) -> Generator[Chunk, None, None]:
    """The same chunks in the same order, of which at most `depth` are made and not yet used up.

    A chunk is used up once the next is asked for and, on a GPU, the current stream has done what was asked of it until
    then. What the thread raises is raised here in the place of the chunk. Closing this iterator ends the thread.
    """
    maker = _Maker(chunks, device, depth)
    maker.start()
    try:
        while (chunk := maker.take()) is not None:
            yield chunk
            del chunk
            maker.release()
    finally:
        maker.stop()


class _Maker(threading.Thread):
    def __init__(self, chunks: Iterator[Chunk], device: torch.device, depth: int) -> None:
        super().__init__(name="chunks ahead", daemon=True)
        self._chunks, self._device = chunks, device
        self._made: SimpleQueue[tuple[Chunk, _Mark] | BaseException | None] = SimpleQueue()
        self._free: SimpleQueue[_Mark] = SimpleQueue()
        self._stopping = False
        for _ in range(depth):
            self._free.put(_Mark(torch.device("cpu")))

    def run(self) -> None:
        try:
            with _own_stream(self._device):
                while self._may_go_on():
                    self._made.put(self._make())
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            self._made.put(error)

    def _may_go_on(self) -> bool:
        self._free.get().synchronize()
        return not self._stopping

    def _make(self) -> tuple[Chunk, "_Mark"] | None:
        chunk = next(self._chunks, None)
        return None if chunk is None else (chunk, _Mark(self._device))

    def take(self) -> Chunk | None:
        """The next chunk, to be used on the current stream; None behind the last."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        if made is None:
            return None
        (vectors, check), ready = made
        ready.wait()
        if vectors.is_cuda:  # its memory must not be given away while this stream may still read it
            vectors.record_stream(torch.cuda.current_stream(vectors.device))
        return vectors, check

    def release(self) -> None:
        self._free.put(_Mark(self._device))

    def stop(self) -> None:
        self._stopping = True
        self._free.put(_Mark(torch.device("cpu")))
        self.join()


class _Mark:
    """How far the current stream has come; on the CPU everything that was asked for is done."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def wait(self) -> None:
        """Makes the current stream wait, not the host."""
        if self._event is not None:
            self._event.wait()


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
