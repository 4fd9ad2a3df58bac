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
from sae.devices import Fetched
from sae.jobs import claims, cluster, contexts, ranks
from sae.jobs.activations import Cached, Live
from sae.jobs.checkpoints import known
from sae.jobs.halt import Halt
from sae.jobs.lake import Lake, Snapshot
from sae.jobs.stream import Lanes, held_out
from sae.jobs.trainee import Trainee, known_state, n_steps
from sae.mesh import Mesh
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, CorpusError, WorkerError
from sae.sparse_step import Metrics
from sae.subject import Subject

_SAMPLE_ROWS: Final = 32_768
_REPORT_EVERY_S: Final = 0.5

Report = tuple[int, str]


class Trainer:
    """Rank `rank` of `n_ranks`, which train one autoencoder together, or several side by side on the same batches."""

    def __init__(self, config: Run, rank: int = 0, n_ranks: int = 1, claim: int | None = None) -> None:
        """`claim` is the number of this start of the training, see claims; where absent, the lake's next."""
        self._config, self._claim = config, claim
        self._rank, self._n_ranks = rank, n_ranks
        self._device = cluster.use_device(n_ranks)
        self._on_gpu = self._device != "cpu"
        self._halt = Halt()

    def address(self) -> str:
        """Where the others of a mesh find this rank."""
        return ranks.free_address()

    def pause(self) -> int:
        """The step that this rank has begun last; it begins no further one until it is told to stop."""
        return self._halt.hold()

    def stop(self, last: int = 0) -> None:
        """Makes `train` end with a checkpoint after step `last`, which is the same for all ranks and begun by none."""
        self._halt.end_after(last)

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
        self._lake = Lake(config.lake)  # not before: Ray would hide that this node has no such folder
        corpus = contexts.load(self._lake, config.corpus.name)
        subject = Subject.load(**config.subject.model_dump(), device=self._device)
        live, batch = training.source == "live", cluster.contexts_at_once(training.harvest_batch, corpus.width)
        if live and cluster.worth_compiling(training.tokens):
            subject = subject.compiled(batch, corpus.width)
        source = Live(subject, corpus, batch) if live else Cached(self._lake, corpus, config.corpus.name, subject)
        kept = corpus.kept_tokens(config.subject.masked_positions)
        validation = held_out(corpus.doc_id, training.validation, config.seed)
        rows = np.flatnonzero(~validation)
        if kept[rows].sum() == 0:
            raise CorpusError(
                f"corpus {config.corpus.name}: no token is left to train on once training.validation, "
                f"{training.validation:g} of it, is held out; add text or set training.validation: 0"
            )
        described = {"model": config.subject.model, "hook": subject.hook, "d_model": subject.d_model}
        if subject.output_hook is not None:
            described |= {"output_hook": subject.output_hook, "d_out": subject.width - subject.d_model}
        self._held_out = self._validation_vectors(source, np.flatnonzero(validation), kept)
        while True:
            snapshot = self._divide(mesh, described)
            self._stream = Lanes(
                source, rows, kept[rows], batch=training.batch_tokens, buffer=training.buffer_tokens, seed=config.seed,
                n_lanes=self._n_lanes, rank=self._rank, n_ranks=self._n_ranks,
            )  # fmt: skip
            new = any(self._everyone.gather_objects(any(trainee.is_new for trainee in self._trainees)))
            sample = self._sample() if new else None
            for trainee in self._trainees:
                trainee.start(sample if trainee.is_new else None)
            # Last, so that what is refused takes nothing over.
            claim = mesh.everyone.gather_objects(self._claimed(snapshot) if self._rank == 0 else None)[0]
            if claim is not None:
                break
        for trainee in self._trainees:
            trainee.commit_as(claim)

    def _divide(self, mesh: Mesh, subject: dict[str, Any]) -> Snapshot:
        """One autoencoder is the whole mesh's; of several, each is one rank's, which needs all rows."""
        several = self._config.each()
        alone = len(several) > 1
        # All ranks go on from what the first has seen.
        snapshot = self._lake.snapshot(mesh.everyone.gather_objects(self._lake.snapshot().version)[0])
        mine = shares(self._unfinished(snapshot), self._n_ranks)[self._rank] if alone else several
        self._everyone, self._readers = mesh.everyone, mesh.everyone if alone else mesh.tp
        self._n_lanes = self._lanes_of([state for one in several if (state := known_state(snapshot, one))])
        of = Mesh() if alone else mesh
        self._trainees = [Trainee(one, self._lake, snapshot, subject, self._device, of, self._n_lanes) for one in mine]
        return snapshot

    def _claimed(self, snapshot: Snapshot) -> int | None:
        """Takes over what is to be trained; the claim, or None where another training has gone beyond `snapshot`."""
        names = [one.autoencoder.name for one in self._unfinished(snapshot)]

        def as_read(now: Snapshot) -> bool:
            return all(known(now, name) == known(snapshot, name) for name in names)

        with self._lake.transaction("train") as transaction:
            if not as_read(transaction.base):
                return None
            transaction.require(as_read, "another training saved a checkpoint meanwhile")
            claim = self._claim if self._claim is not None else claims.latest(transaction.base, names) + 1
            for name in names:
                claims.take(transaction, name, claim)
        return claim

    def _unfinished(self, snapshot: Snapshot) -> list[Run]:
        states = [(one, known_state(snapshot, one)) for one in self._config.each()]
        return [one for one, state in states if state is None or state["tokens"] < self._total]

    @property
    def _total(self) -> int:
        """Tokens of the whole training."""
        return n_steps(self._config) * self._config.training.batch_tokens

    def _lanes_of(self, states: list[dict[str, Any]]) -> int:
        """Those of the checkpoints that this training goes on from; or those of the finished autoencoders, so that
        the new ones see the same batches; or as many as ranks.
        """
        total = self._total
        begun = {state.get("lanes", 1) for state in states if state["tokens"] < total}
        finished = {state.get("lanes", 1) for state in states if state["tokens"] >= total}
        if len(begun) > 1:
            raise ConfigError(
                f"autoencoders: those of {self._config.lake} were begun with {sorted(begun)} lanes, so that they "
                "see other batches; train them one by one"
            )
        if not begun and not self._config.training.lanes and len(finished) == 1:
            begun = finished
        return int(begun.pop()) if begun else self._config.training.lanes or self._n_ranks

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
        # Busy cores are better left to the subject and the autoencoder in turn. To read cached activations takes a
        # twentieth of the processor time of a step at 2,048 latents, which a thread would only take from the step.
        overlap = torch.device(self._device) if self._on_gpu else None
        progress = _Progress(batch)
        with (
            self._ended(),
            closing(self._stream.batches(done * batch, overlap)) as batches,
            closing(self._shared(islice(batches, last - done))) as shared,
        ):
            for step, x in enumerate(shared, start=done + 1):
                self._halt.begin(step)
                metrics = [found for trainee in self._trainees if (found := trainee.step(step, x)) is not None]
                ends = step == last or self._halt.is_last(step)
                for trainee in self._trainees:
                    if ends or trainee.is_due(step):
                        trainee.save(self._held_out)
                if ends:
                    break
                if self._rank == 0:
                    yield from progress.after(step, metrics)
        yield step * batch, ""

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


class _Progress:
    """Reports about twice a second, once their figures have come: a GPU is not waited for."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch, self._last = batch_tokens, 0.0
        self._due: tuple[int, Fetched | None] | None = None

    def after(self, step: int, metrics: list[Metrics]) -> Iterator[Report]:
        """What there is to report after a step with these metrics, those of one autoencoder each."""
        if self._due is None and time.monotonic() - self._last > _REPORT_EVERY_S:
            self._last = time.monotonic()
            shown = torch.stack([metrics[0]["fvu"], metrics[0]["dead"]]) if metrics else None
            self._due = step, Fetched(shown) if shown is not None else None
        if self._due is None:
            return
        then, figures = self._due
        if figures is None:
            yield then * self._batch, ""
        elif figures.arrived:
            fvu, dead = figures.values()
            yield then * self._batch, f"fvu {fvu:.3f}, dead {dead:.1%}"
        else:
            return
        self._due = None


def shares(several: list[Run], n_ranks: int) -> list[list[Run]]:
    """Which of several autoencoders each rank trains: the largest first, each to the rank with the least to do."""
    found: list[list[Run]] = [[] for _ in range(n_ranks)]
    for one in sorted(several, key=lambda one: -one.autoencoder.n_latents):
        min(found, key=lambda given: sum(other.autoencoder.n_latents for other in given)).append(one)
    return found
