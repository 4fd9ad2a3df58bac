"""The training actor: one rank of a mesh. It reads its rows of each batch, shares them, steps, validates and commits.

A resumed run gives the same bits on a CPU, on a mesh of the same shape.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sae.collectives import Wait
from sae.jobs import cluster, contexts, ranks
from sae.jobs.activations import Cached, Live
from sae.jobs.lake import Lake
from sae.jobs.stream import Lanes, held_out
from sae.jobs.trainee import Trainee, n_steps
from sae.mesh import Mesh
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, CorpusError, WorkerError
from sae.subject import Subject

_SAMPLE_ROWS: Final = 32_768
_REPORT_EVERY_S: Final = 0.5
# Ranks agree on whether to stop now and then only: on a GPU the host has to wait for it.
_AGREE_EVERY_STEPS: Final = 16
# Compiling takes about half a minute, in which a GPU trains on as many tokens of a small model.
_COMPILE_FROM_TOKENS: Final = 50_000_000

Report = tuple[int, str]


class Trainer:
    """Rank `rank` of `n_ranks`, which train one autoencoder together, or several side by side on the same batches."""

    def __init__(self, config: Run, rank: int = 0, n_ranks: int = 1) -> None:
        self._config, self._lake = config, Lake(config.lake)
        self._rank, self._n_ranks = rank, n_ranks
        self._device = cluster.use_device(n_ranks)
        self._on_gpu = self._device != "cpu"
        self._stopping = False

    def address(self) -> str:
        """Where the others of a mesh find this rank."""
        return ranks.free_address()

    def stop(self) -> None:
        """Makes `train` end with a checkpoint, soon, once it was called on all ranks."""
        self._stopping = True

    def follow(self, address: str) -> None:
        """`train` of a rank whose reports nobody needs."""
        for _ in self.train(address):
            pass

    def train(self, address: str = "") -> Iterator[Report]:
        """Yields (tokens seen, a note) about twice a second and after the last step."""
        try:
            with ranks.joined(self._config, self._rank, self._n_ranks, address) as mesh:
                self._prepare(mesh)
                yield from self._loop()
        except torch.OutOfMemoryError as error:
            raise WorkerError(
                f"train: out of GPU memory on rank {self._rank} ({str(error).splitlines()[0][:150]}); raise "
                "cluster.tp, or lower training.batch_tokens, training.buffer_tokens or autoencoder.n_latents; sae "
                "plan tells how much is needed"
            ) from None

    def _prepare(self, mesh: Mesh) -> None:
        config, training = self._config, self._config.training
        corpus = contexts.load(self._lake, config.corpus.name)
        subject = Subject.load(**config.subject.model_dump(), device=self._device)
        live = training.source == "live"
        if live and self._on_gpu and training.tokens >= _COMPILE_FROM_TOKENS:
            subject = subject.compiled(training.harvest_batch, corpus.width)
        source = (
            Live(subject, corpus, training.harvest_batch)
            if live
            else Cached(self._lake, corpus, config.corpus.name, subject)
        )
        kept = corpus.kept_tokens(config.subject.masked_positions)
        validation = held_out(corpus.doc_id, training.validation, config.seed)
        rows = np.flatnonzero(~validation)
        if kept[rows].sum() == 0:
            raise CorpusError(
                f"corpus {config.corpus.name}: no token is left to train on once {training.validation:.0%} is "
                "held out; add text or set training.validation: 0"
            )
        described = {"model": config.subject.model, "hook": subject.hook, "d_model": subject.d_model}
        self._divide(mesh, described)
        self._stream = Lanes(
            source, rows, kept[rows], batch=training.batch_tokens, buffer=training.buffer_tokens, seed=config.seed,
            n_lanes=self._n_lanes(), rank=self._rank, n_ranks=self._n_ranks,
        )  # fmt: skip
        self._held_out = self._validation_vectors(source, np.flatnonzero(validation), kept)
        new = any(self._everyone.gather_objects(any(trainee.is_new for trainee in self._trainees)))
        sample = self._sample() if new else None
        for trainee in self._trainees:
            trainee.start(sample if trainee.is_new else None)

    def _divide(self, mesh: Mesh, subject: dict[str, Any]) -> None:
        """One autoencoder is the whole mesh's; of several, each is one rank's, which needs all rows."""
        several = self._config.each()
        alone = len(several) > 1
        mine = shares(several, self._n_ranks)[self._rank] if alone else several
        self._everyone, self._readers = mesh.everyone, mesh.everyone if alone else mesh.tp
        lanes = self._config.training.lanes or self._n_ranks
        of = Mesh() if alone else mesh
        self._trainees = [Trainee(one, self._lake, subject, self._device, of, lanes) for one in mine]

    def _n_lanes(self) -> int:
        """Of the checkpoints that this training goes on from, or of a new one."""
        known = {trainee.n_lanes for trainee in self._trainees if not trainee.is_new}
        all_known = set().union(*self._everyone.gather_objects(known))
        if len(all_known) > 1:
            raise ConfigError(
                f"autoencoders: those of {self._config.lake} were begun with {sorted(all_known)} lanes, so that they "
                "see other batches; train them one by one"
            )
        return all_known.pop() if all_known else self._config.training.lanes or self._n_ranks

    def _validation_vectors(self, source: Live | Cached, rows: Any, kept: Any) -> Tensor | None:
        """A sample of validation_tokens held-out activations [m, d]; None where nothing is held out."""
        if not len(rows):
            return None
        limit = self._config.training.validation_tokens
        rows = np.random.default_rng(self._config.seed).permutation(rows)
        n_rows = int(np.searchsorted(np.cumsum(kept[rows]), limit)) + 1
        vectors = source.vectors(rows[:n_rows])[:limit]
        return vectors if len(vectors) > 1 else None

    def _sample(self) -> Tensor:
        """The first batches [m, d], whole, on all ranks."""
        sample: list[Tensor] = []
        with closing(self._stream.batches()) as batches:
            for rows in batches:
                sample.append(self._everyone.gather(rows.to(self._device)))
                if sum(map(len, sample)) >= min(_SAMPLE_ROWS, self._stream.epoch_tokens):
                    break
        return torch.cat(sample)[:_SAMPLE_ROWS].float()

    def _loop(self) -> Iterator[Report]:
        batch, last = self._config.training.batch_tokens, n_steps(self._config)
        done = min(self._everyone.gather_objects(min((trainee.steps_done for trainee in self._trainees), default=last)))
        # Two busy cores are better left to the subject and the autoencoder in turn.
        overlap = torch.device(self._device) if self._on_gpu else None
        reported = 0.0
        with (
            self._ended(),
            closing(self._stream.batches(done * batch, overlap)) as batches,
            closing(self._shared(islice(batches, last - done))) as shared,
        ):
            for step, x in enumerate(shared, start=done + 1):
                metrics = [found for trainee in self._trainees if (found := trainee.step(step, x)) is not None]
                ends = step == last or self._agree_to_stop(step)
                for trainee in self._trainees:
                    if ends or trainee.is_due(step):
                        trainee.save(self._held_out)
                if ends:
                    break
                if metrics and self._rank == 0 and time.monotonic() - reported > _REPORT_EVERY_S:
                    reported = time.monotonic()
                    yield step * batch, f"fvu {float(metrics[0]['fvu']):.3f}, dead {float(metrics[0]['dead']):.1%}"
        yield step * batch, "; ".join(trainee.report for trainee in self._trainees)

    def _shared(self, batches: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """This rank's rows with those that others read for it; the next are on their way while these are in use."""
        if self._readers.size == 1:
            for rows in batches:
                yield rows.to(self._device)
            return
        begun: tuple[Tensor, Wait] | None = None
        for rows in batches:
            following = self._readers.begin_gather(rows.to(self._device))
            if begun is not None:
                begun[1]()
                yield begun[0]
            begun = following
        if begun is not None:
            begun[1]()
            yield begun[0]

    def _agree_to_stop(self, step: int) -> bool:
        if self._n_ranks == 1:
            return self._stopping
        if step % _AGREE_EVERY_STEPS:
            return False
        return bool(self._everyone.max_(torch.tensor(int(self._stopping), device=self._device)))

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Tells the trainees at the end whether there was an error."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            for trainee in self._trainees:
                trainee.end(error)


def shares(several: list[Run], n_ranks: int) -> list[list[Run]]:
    """Which of several autoencoders each rank trains: the largest first, each to the rank with the least to do."""
    found: list[list[Run]] = [[] for _ in range(n_ranks)]
    for one in sorted(several, key=lambda one: -one.autoencoder.n_latents):
        min(found, key=lambda given: sum(other.autoencoder.n_latents for other in given)).append(one)
    return found
