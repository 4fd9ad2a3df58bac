"""What `evaluate` measures, in a worker: the subject and the autoencoder on held-out contexts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.evaluation import distributions, probing
from sae.evaluation.ablation import PER_TOKEN, WINDOW, AblationSparsity
from sae.evaluation.downstream import Downstream
from sae.evaluation.reconstruction import Principal, Reconstruction
from sae.initialise import initialise
from sae.jobs import checkpoints, cluster, contexts
from sae.jobs.activations import kept_activations
from sae.jobs.contexts import Array, Contexts
from sae.jobs.labels import Labels
from sae.jobs.lake import Lake
from sae.jobs.stream import held_out
from sae.model import Autoencoder
from sae.schemas.config import Run
from sae.schemas.errors import CorpusError
from sae.subject import Subject
from sae.transcoder import from_config

_SAMPLE_TOKENS = 16_384


@dataclass(frozen=True)
class Measured:
    """metrics: those that can be measured, by name; bins: (distribution, number, lower, upper, n)."""

    metrics: dict[str, float]
    bins: list[tuple[str, int, float, float, int]]


def measure(config: Run, labels: dict[str, Labels]) -> Measured:
    """Everything of the config's autoencoder; raises CorpusError where there is too little text."""
    return _Measurement(config).all(labels)


class _Measurement:
    def __init__(self, config: Run) -> None:
        self._config = config
        device = cluster.use_device(1)
        lake = Lake(config.lake)
        self._corpus = contexts.load(lake, config.corpus.name)
        # The loss needs the layers behind the hook as well.
        self._subject = Subject.load(**{**config.subject.model_dump(), "layers": None}, device=device)
        name = config.autoencoder.name
        loaded = checkpoints.load(lake, name, config.encode.weights, config.encode.checkpoint)
        self._autoencoder: Autoencoder = loaded.to(device)
        checkpoints.check_fit(self._autoencoder, self._subject, name)
        self._train, self._test = self._split()

    def _split(self) -> tuple[Array, Array]:
        """Contexts of training text, for a sample, and held-out ones."""
        config, corpus = self._config, self._corpus
        validation = held_out(corpus.doc_id, config.training.validation, config.seed)
        kept = corpus.kept_tokens(config.subject.masked_positions)
        shuffle = np.random.default_rng(config.seed).permutation
        test = first_of(shuffle(np.flatnonzero(validation)), kept, config.evaluate.tokens)
        train = first_of(shuffle(np.flatnonzero(~validation)), kept, _SAMPLE_TOKENS)
        if not kept[train].any() or not kept[test].any():
            raise CorpusError(f"corpus {config.corpus.name}: too few documents to hold any out; add text")
        return train, test

    @torch.inference_mode()
    def all(self, labels: dict[str, Labels]) -> Measured:
        autoencoder = self._autoencoder
        sample = torch.cat([x for x, _ in self._activations(self._train)])
        measured, of_baselines = self._reconstruction(sample)
        since = autoencoder.stats_last_nonzero
        metrics = {
            **measured.metrics(),
            **of_baselines,
            "tokens_evaluated": float(measured.rows),
            "dead_fraction": float((since > self._config.training.dead_tokens).double().mean()),
            **self._losses(autoencoder.expected(sample).double().mean(dim=0).float()),
            **self._ablation(),
        }
        for column, of_documents in labels.items():
            metrics |= self._probes(column, of_documents)
        return Measured(
            {name: value for name, value in metrics.items() if math.isfinite(value)}, _rows(distributions.of(measured))
        )

    def _batches(self, rows: Array) -> Iterator[Array]:
        at_once = self._config.evaluate.batch_contexts
        return (rows[start : start + at_once] for start in range(0, len(rows), at_once))

    def _activations(self, rows: Array) -> Iterator[tuple[Tensor, Array]]:
        """Activations [m, width] of the kept tokens of contexts, batch by batch, and the context [m] of each."""
        for batch in self._batches(rows):
            x, (at_row, _) = kept_activations(self._subject, self._corpus, batch)
            yield x.float(), batch[at_row]

    def _reconstruction(self, sample: Tensor) -> tuple[Reconstruction, dict[str, float]]:
        """Of held-out activations; beside it the FVU, in model space, of what any autoencoder has to beat.

        PCA has as many components as latents are active on average.
        """
        autoencoder = self._autoencoder
        untrained = from_config(autoencoder.config()).to(sample.device)
        initialise(untrained, sample, torch.Generator().manual_seed(self._config.seed))
        measured, drawn = Reconstruction(autoencoder, sample), Reconstruction(untrained, sample)
        principal = Principal(autoencoder.seen(sample)[1])
        for x, _ in self._activations(self._test):
            measured.add(x)
            drawn.add(x)
            principal.add(autoencoder.seen(x)[1])
        components = max(1, round(measured.metrics()["l0"]))
        return measured, {"fvu_pca": principal.fvu(components), "fvu_untrained": drawn.metrics()["fvu"]}

    def _losses(self, mean: Tensor) -> dict[str, float]:
        downstream = Downstream(self._subject, self._autoencoder, mean)
        for batch in self._batches(self._test):
            downstream.add(*self._corpus.padded(batch))
        return downstream.metrics()

    def _ablation(self) -> dict[str, float]:
        """Of latents at positions drawn at random, a few of each."""
        seed, left = self._config.seed, self._config.evaluate.ablations
        draw = np.random.default_rng([seed, len(self._test)])
        sparsity = AblationSparsity(self._subject, self._autoencoder, torch.Generator().manual_seed(seed))
        for row in self._test:
            if left <= 0:
                break
            places = _places(self._corpus, row, self._config.subject.masked_positions)
            if len(places):
                (token_ids,), (length,) = self._corpus.padded(np.array([row]))
                sparsity.add(token_ids[: int(length)], int(draw.choice(places)), min(left, PER_TOKEN))
                left -= PER_TOKEN
        return sparsity.metrics()

    def _probes(self, column: str, labels: Labels) -> dict[str, float]:
        """Of labelled documents, each known by its first context."""
        doc_id, first = np.unique(self._corpus.doc_id, return_index=True)
        kept = self._corpus.kept_tokens(self._config.subject.masked_positions)
        documents = [
            (int(row), labels[int(one)])
            for one, row in zip(doc_id, first, strict=True)
            if int(one) in labels and kept[row] > 0
        ]
        rows, of_documents = np.array([row for row, _ in documents]), [label for _, label in documents]
        if not probing.classes(of_documents):
            raise CorpusError(
                f"evaluate.labels: too few labelled documents: of column {column!r} {len(documents)} have a token that "
                "is not at a masked position; raise evaluate.probe_documents"
            )
        pooling = probing.Pooling(self._autoencoder, len(rows))
        for x, of_context in self._activations(rows):
            pooling.add(x, torch.from_numpy(np.searchsorted(rows, of_context)))
        split = probing.Split.of(of_documents, torch.Generator().manual_seed(self._config.seed))
        latents, components = pooling.latents(), probing.principal_components(pooling.activations(), split)
        found = {f"probe_{column}_chance": probing.chance(of_documents, split)}
        for k in self._config.evaluate.probe_latents:
            found[f"probe_{column}_k{k}"] = probing.probe_loss(latents, of_documents, split, k)
            found[f"probe_{column}_pca_k{k}"] = probing.probe_loss(components, of_documents, split, k)
        return found


def first_of(rows: Array, kept: Array, n_tokens: int) -> Array:
    """The first rows that give n_tokens kept tokens together, or all."""
    return rows[: int(np.searchsorted(np.cumsum(kept[rows]), n_tokens)) + 1]


def _places(corpus: Contexts, row: int, masked: tuple[int, ...]) -> Array:
    """Kept positions of a context: those with a whole window of tokens from there on, where there are any."""
    length = int(corpus.lengths[row])
    kept = np.setdiff1d(np.arange(length), masked)
    with_window = kept[kept <= length - WINDOW]
    return with_window if len(with_window) else kept


def _rows(found: dict[str, distributions.Histogram]) -> list[tuple[str, int, float, float, int]]:
    return [
        (name, number, *bin_)
        for name, histogram in found.items()
        for number, bin_ in enumerate(zip(*(column.tolist() for column in histogram), strict=True))
    ]
