"""Whether few latents tell the classes of documents apart: logistic probes on single latents and on k of them.

Shapes: D documents, n features (latents, or components of the activations), k features of a probe.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 4.2; the choice of features by the
difference of their means: Gurnee et al. 2023, "Finding neurons in a haystack", section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sae.model import Autoencoder

LEAST_DOCUMENTS: Final = 8
"""Of a class, and outside of it: half of them fit the probe, the others are what it is measured on."""
# Of single features, those that are tried: the ones whose means differ most.
_TRIED: Final = 20
# Weights of standardised features are drawn from a standard normal distribution, to the probe: else one that separates
# its documents wholly has no end.
_RIDGE: Final = 1.0
_NEWTON_STEPS: Final = 30


class Features(Protocol):
    """A matrix [D, n] of which few columns are wanted at once."""

    def columns(self, wanted: Tensor) -> Tensor:
        """float64 [D, k] of the wanted ones [k]."""
        ...

    def sums(self, weights: Tensor) -> Tensor:
        """float64 [n]: of each column over the rows, each times its weight [D]."""
        ...

    def squared(self, weights: Tensor) -> Tensor:
        """The same of the squares."""
        ...


class Dense(NamedTuple):
    """Every entry: values float64 [D, n]."""

    values: Tensor

    def columns(self, wanted: Tensor) -> Tensor:
        return self.values[:, wanted]

    def sums(self, weights: Tensor) -> Tensor:
        return weights @ self.values

    def squared(self, weights: Tensor) -> Tensor:
        return weights @ self.values.square()


class Sparse(NamedTuple):
    """Entries that are not zero, each once: row and column int64, value float64."""

    row: Tensor
    column: Tensor
    value: Tensor
    shape: tuple[int, int]

    def columns(self, wanted: Tensor) -> Tensor:
        place = torch.full((self.shape[1],), -1, dtype=torch.int64)
        place[wanted] = torch.arange(len(wanted))
        at = place[self.column]
        found = at >= 0
        dense = torch.zeros(self.shape[0], len(wanted), dtype=torch.float64)
        return dense.index_put((self.row[found], at[found]), self.value[found])

    def sums(self, weights: Tensor) -> Tensor:
        return torch.bincount(self.column, weights[self.row] * self.value, self.shape[1])

    def squared(self, weights: Tensor) -> Tensor:
        return torch.bincount(self.column, weights[self.row] * self.value.square(), self.shape[1])


class Pooling:
    """What documents are known by: the means over their tokens of each latent and of each encoded activation."""

    def __init__(self, autoencoder: Autoencoder, n_documents: int) -> None:
        self._autoencoder, self._documents = autoencoder, n_documents
        self._rounded = autoencoder.rounded_encoder()
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._acts = torch.zeros(n_documents, autoencoder.d_model, dtype=torch.float64)
        self._tokens = torch.zeros(n_documents, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor, document: Tensor) -> None:
        """x: [B, width] raw activations; document: int64 [B], on the CPU, whose tokens they are of: all of them."""
        n = self._autoencoder.n_latents
        self._acts.index_add_(0, document, self._autoencoder.seen(x)[0].double().cpu())
        self._tokens.index_add_(0, document, torch.ones(len(document), dtype=torch.float64))
        row, latent, value = (part.cpu() for part in self._autoencoder.nonzeros(x, self._rounded))
        keys, place = torch.unique(document[row] * n + latent, return_inverse=True)
        self._parts.append((keys, torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, value.double())))

    def latents(self) -> Sparse:
        """[D, n]."""
        n = self._autoencoder.n_latents
        keys, sums = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        row = keys // n
        return Sparse(row, keys % n, sums / self._tokens[row], (self._documents, n))

    def activations(self) -> Tensor:
        """float64 [D, d_model]."""
        return self._acts / self._tokens.clamp(min=1)[:, None]


@dataclass(frozen=True)
class Split:
    """Documents that fit a probe and, the others, those that it is measured on: bool [D]."""

    fits: Tensor

    @classmethod
    def of(cls, labels: Sequence[str], generator: torch.Generator) -> "Split":
        """Half of each class, drawn at random."""
        fits = torch.zeros(len(labels), dtype=torch.bool)
        for label in sorted(set(labels)):
            members = torch.tensor([at for at, one in enumerate(labels) if one == label])
            fits[members[torch.randperm(len(members), generator=generator)[::2]]] = True
        return cls(fits)


def principal_components(values: Tensor, split: Split) -> Dense:
    """Of values [D, d], in those of the documents that fit probes: what rotates activations to where they vary most."""
    fitting = values[split.fits]
    centred = values - fitting.mean(dim=0)
    return Dense(centred @ torch.linalg.svd(centred[split.fits], full_matrices=False)[2].T)


def classes(labels: Sequence[str]) -> list[str]:
    """Those that have enough documents inside and outside; of two that share all documents, one says it all."""
    numbers = {label: labels.count(label) for label in sorted(set(labels))}
    enough = [label for label, n in numbers.items() if LEAST_DOCUMENTS <= n <= len(labels) - LEAST_DOCUMENTS]
    return enough[:1] if len(numbers) == 2 else enough


def chance(labels: Sequence[str], split: Split) -> float:
    """Mean over classes of the cross-entropy, in nats, of the share that a class has in the documents that fit."""
    losses = []
    for inside, fits in _tasks(labels, split):
        share = inside[fits].mean()
        losses.append(float(F.binary_cross_entropy(share.expand(int((~fits).sum())), inside[~fits])))
    return sum(losses) / len(losses)


def probe_loss(features: Features, labels: Sequence[str], split: Split, k: int) -> float:
    """Mean over classes of the cross-entropy, in nats, of a logistic probe on the k best features.

    Of single ones the best is that with the least loss on the documents that fit, of those whose means differ most;
    k > 1 are those whose means differ most.
    """
    losses = []
    for inside, fits in _tasks(labels, split):
        order = _difference(features, inside, fits).argsort(descending=True, stable=True)
        sets = order[:_TRIED, None] if k == 1 else order[None, :k]
        losses.append(min(_fitted(features.columns(one), inside, fits) for one in sets)[1])
    return sum(losses) / len(losses)


def _tasks(labels: Sequence[str], split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for label in classes(labels):
        yield torch.tensor([float(one == label) for one in labels], dtype=torch.float64), split.fits


def _difference(features: Features, inside: Tensor, fits: Tensor) -> Tensor:
    """Of each feature's means in and out of a class, in standard deviations, [n], of documents that fit."""
    fit = fits.double()
    n, n_in = fit.sum(), (fit * inside).sum()
    total, total_in = features.sums(fit), features.sums(fit * inside)
    variance = features.squared(fit) / n - (total / n).square()
    difference = (total_in / n_in - (total - total_in) / (n - n_in)).abs()
    return torch.where(variance > 1e-12 * difference.square(), difference / variance.clamp(min=1e-300).sqrt(), 0)


def _fitted(x: Tensor, inside: Tensor, fits: Tensor) -> tuple[float, float]:
    """Losses of a probe on features [D, k]: on the documents that fit it, and on the others."""
    # A latent can be far stronger in one document than in all that fit: one line through both is then sure, and wrong.
    x = torch.minimum(torch.maximum(x, x[fits].amin(dim=0)), x[fits].amax(dim=0))
    mean, std = x[fits].mean(dim=0), x[fits].std(dim=0, correction=0)
    x = torch.cat([(x - mean) / torch.where(std > 0, std, 1), x.new_ones(len(x), 1)], dim=1)
    scores = x @ newton(x[fits], inside[fits])
    losses = F.binary_cross_entropy_with_logits(scores, inside, reduction="none")
    return float(losses[fits].mean()), float(losses[~fits].mean())


def newton(x: Tensor, y: Tensor) -> Tensor:
    """Weights [k + 1] of the logistic regression of y [D] on x [D, k + 1], of which the last is 1 and has no prior."""
    prior = torch.full((x.shape[1],), _RIDGE, dtype=x.dtype)
    prior[-1] = 1e-9

    def loss(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") + (prior * w.square()).sum() / 2

    w = x.new_zeros(x.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - y) + prior * w
        step = torch.linalg.solve((x.T * (p * (1 - p))) @ x + prior.diag(), gradient)
        before, size = loss(w), 1.0
        while loss(w - size * step) > before and size > 1e-6:
            size /= 2
        w = w - size * step
        if float(step.abs().max()) < 1e-9:
            break
    return w
