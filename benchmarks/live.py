"""Tokens a second of live training, from token ids: the subject and the training step alone, in turn, overlapped.

GPT-2's shape with random weights, 8 blocks, contexts of 64 random tokens in memory. "Formerly" is the subject as it
was run at first: eager, and the host waits for each pass. The share of time without a kernel is of a profiled window.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._idle import idle_share
from benchmarks._report import RESULTS, Result, finish, machine
from sae.activations import TopK
from sae.devices import Check, no_check
from sae.initialise import initialise
from sae.jobs.activations import Array, Live, Source
from sae.jobs.contexts import Contexts
from sae.jobs.stream import TokenStream
from sae.model import Autoencoder
from sae.subject import Subject
from sae.training import StepConfig, TrainStep
from tests.models import tiny_gpt2

CONTEXT = 64
LR = 1e-5
SAMPLE = 4096
WARM_UP_CHUNKS = 2
PROFILED_CHUNKS = 4
MODES = ("formerly in turn", "in turn", "overlapped")
COLUMNS = ("tokens a step", "subject eager", "subject", "step", *MODES, "idle formerly", "idle", "peak GiB")
CAPTION = (
    "Tokens a second: GPT-2 shape, {layers} blocks, d {d}, context 64, {dtype}; n {n}, k {k}, chunks of {buffer} "
    "tokens, {contexts} contexts a pass. Idle: share of a profiled window without a kernel; it and peak memory are of "
    "overlapped training unless said otherwise."
)


@dataclass(frozen=True)
class Size:
    layers: int
    d: int
    heads: int
    vocab: int
    n: int
    k: int
    batches: tuple[int, ...]
    buffer: int  # tokens of a chunk
    contexts: int  # of one pass of the subject
    dtype: str


SIZES = {
    "cuda": Size(8, 768, 12, 50257, 32768, 32, (16384, 131072), 262144, 256, "bfloat16"),
    "cpu": Size(2, 32, 2, 320, 256, 8, (512, 1024), 2048, 16, "float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--device", choices=SIZES, default="cuda", help="cpu: to try the command, at tiny sizes")
    parser.add_argument(
        "--save", metavar="FOLDER", nargs="?", const=RESULTS, help="append the table to <date>.md there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA device; --device cpu tries the command")
        return
    device = torch.device(args.device)
    size = SIZES[device.type]
    started = time.perf_counter()
    subject = load_subject(size, device)
    compiled = subject.compiled(size.contexts, CONTEXT)
    print(f"subject loaded and compiled in {time.perf_counter() - started:.0f} s", flush=True)
    bench = Bench(size, device, args.seconds, random_contexts(size))
    rows = bench.rows(subject, compiled)
    finish(result(rows, size, device), args.save, args.json)


def load_subject(size: Size, device: torch.device) -> Subject:
    with tempfile.TemporaryDirectory() as folder:
        tiny_gpt2(Path(folder), size.layers + 1, size.d, size.vocab, n_head=size.heads)
        hook = f"blocks.{size.layers}.hook_resid_pre"
        return Subject.load(folder, hook, dtype=size.dtype, device=str(device))


def random_contexts(size: Size) -> Contexts:
    """Eight chunks of full contexts."""
    n = 8 * size.buffer // CONTEXT
    tokens = np.random.default_rng(0).integers(size.vocab, size=n * CONTEXT)
    return Contexts(np.arange(n), np.arange(n), tokens, np.arange(n + 1) * CONTEXT, CONTEXT)


class Waiting:
    """A source that waits: it reads whether activations are finite, and how many a mask keeps, pass by pass."""

    def __init__(self, subject: Subject, contexts: Contexts, batch: int) -> None:
        self._subject, self._contexts, self._batch = subject, contexts, batch

    def launch(self, rows: Array) -> tuple[Tensor, Check]:
        starts = range(0, len(rows), self._batch)
        return torch.cat([self._pass(rows[start : start + self._batch]) for start in starts]), no_check

    def _pass(self, rows: Array) -> Tensor:
        token_ids, lengths = self._contexts.padded(rows)
        acts = self._subject.activations(token_ids)
        return acts[self._subject.keep_mask(lengths, token_ids.shape[1]).to(acts.device)]


@dataclass(frozen=True)
class Bench:
    size: Size
    device: torch.device
    seconds: float
    contexts: Contexts

    def rows(self, subject: Subject, compiled: Subject) -> list[dict[str, Any]]:
        """One for each number of tokens a step."""
        waiting = Waiting(subject, self.contexts, self.size.contexts)
        live = Live(compiled, self.contexts, self.size.contexts)
        alone = {"subject eager": self.alone(waiting), "subject": self.alone(live)}
        return [{"batch": batch, **alone, **self.trained(batch, waiting, live)} for batch in self.size.batches]

    def alone(self, source: Source) -> float:
        """Tokens a second of a source of activations that nothing uses."""
        return self.rate(self.chunks(source))

    def chunks(self, source: Source) -> Iterator[Tensor]:
        per_chunk = self.size.buffer // CONTEXT
        for start in cycle(range(0, len(self.contexts), per_chunk)):
            vectors, check = source.launch(np.arange(start, start + per_chunk))
            check()
            yield vectors

    def trained(self, batch: int, waiting: Source, live: Source) -> dict[str, Any]:
        sample = next(self.chunks(live))
        train = self.train_step(sample[:SAMPLE].float())
        row: dict[str, Any] = {"step": self.rate(cycle(sample.split(batch)), train)}
        for mode, source, overlap in zip(MODES, (waiting, live, live), (None, None, self.device), strict=True):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with closing(self.stream(source, batch).batches(0, overlap)) as batches:
                row[mode] = self.rate(batches, train)
                row[f"idle {mode}"] = self.idle(batches, batch, train)
            row[f"peak {mode}"] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return row

    def stream(self, source: Source, batch: int) -> TokenStream:
        n = len(self.contexts)
        return TokenStream(source, np.arange(n), np.full(n, CONTEXT), batch, self.size.buffer, 0)

    def train_step(self, sample: Tensor) -> Callable[[Tensor], object]:
        size = self.size
        autoencoder = Autoencoder(size.n, size.d, TopK(size.k), normalize=True).to(self.device)
        scale = initialise(autoencoder, sample, torch.Generator().manual_seed(0))
        step = TrainStep(autoencoder, StepConfig(mse_scale=scale)).step
        return lambda x: step(x.float(), LR)

    def rate(self, batches: Iterator[Tensor], use: Callable[[Tensor], object] = id) -> float:
        """Tokens a second, once the first chunks are used up."""
        warm = 0
        while warm < WARM_UP_CHUNKS * self.size.buffer:
            warm += self.used(batches, use)
        self.synchronize()
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < self.seconds:
            n += self.used(batches, use)
        self.synchronize()
        return n / (time.perf_counter() - start)

    def used(self, batches: Iterator[Tensor], use: Callable[[Tensor], object]) -> int:
        batch = next(batches)
        use(batch)
        return len(batch)

    def idle(self, batches: Iterator[Tensor], batch: int, train: Callable[[Tensor], object]) -> float | None:
        if self.device.type != "cuda":
            return None
        steps = PROFILED_CHUNKS * self.size.buffer // batch

        def work() -> None:
            for x in islice(batches, steps):
                train(x)

        return idle_share(work)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def result(rows: list[dict[str, Any]], size: Size, device: torch.device) -> Result:
    return {
        "benchmark": "live",
        "command": "python -m benchmarks.live",
        "machine": machine(device),
        "caption": CAPTION.format(**vars(size)),
        "columns": COLUMNS,
        "table": [cells(row) for row in rows],
        "rows": rows,
    }


def cells(row: dict[str, Any]) -> list[str]:
    rates = [f"{row[name]:,.0f}" for name in ("subject eager", "subject", "step", *MODES)]
    idle = [share(row[f"idle {mode}"]) for mode in (MODES[0], MODES[2])]
    return [str(row["batch"]), *rates, *idle, f"{row['peak overlapped'] / 2**30:.2f}"]


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    main()
