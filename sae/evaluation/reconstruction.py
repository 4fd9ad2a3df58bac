"""How well activations are reconstructed, and by how many latents.

Shapes: B rows of a batch, m rows of a sample, d features, n latents. "Model space" is what the autoencoder encodes: the
input after `preprocess`.
"""

from typing import Final

import torch
from torch import Tensor

from sae.losses import ratio
from sae.model import Autoencoder

# Dense latents that are made at once: 256 MB in float32.
_DENSE: Final = 1 << 26


class Errors:
    """Of reconstructions in one space; `mean` [d] is that of training rows, which a constant would predict."""

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean.double()
        self._by_row, self._cosine, self._squared, self._total = (self._mean.new_zeros(()) for _ in range(4))
        self._shift, self._rows = torch.zeros_like(self._mean), 0

    def add(self, recons: Tensor, target: Tensor) -> None:
        """recons, target: [B, d]."""
        recons, target = recons.double(), target.double()
        error, power = (recons - target).square().sum(dim=1), target.square().sum(dim=1)
        norms = torch.linalg.vector_norm(recons, dim=1) * power.sqrt()
        centred = target - self._mean
        self._by_row += ratio(error, power).sum()
        self._cosine += ratio(torch.linalg.vecdot(recons, target), norms).sum()
        self._squared += error.sum()
        self._total += centred.square().sum()
        self._shift += centred.sum(dim=0)
        self._rows += len(target)

    def metrics(self) -> dict[str, float]:
        """Three ratios of a squared error, and a cosine.

        normalized_mse: mean over rows of the row's squared error over its squared norm; fvu: the error of all rows over
        their squared distance from their own mean; fvu_train_mean: over that from the mean of training rows, which is
        what Gao et al. 2024 call normalised MSE; cosine: mean over rows.
        """
        spread = self._total - self._shift.square().sum() / self._rows
        return {
            "normalized_mse": float(self._by_row / self._rows),
            "fvu": float(self._squared / spread),
            "fvu_train_mean": float(self._squared / self._total),
            "cosine": float(self._cosine / self._rows),
        }


class Reconstruction:
    """Of an autoencoder on batches of raw activations.

    Kept for each latent: on how many rows it is active, int64 [n], and its largest activation, [n]; and how many rows
    have so many active latents, int64 [up to n + 1].
    """

    def __init__(self, autoencoder: Autoencoder, sample: Tensor) -> None:
        """sample: [m, width] raw activations of training text."""
        self._autoencoder = autoencoder
        target, raw = autoencoder.seen(sample)[1], autoencoder.expected(sample)
        self._inner, self._outer = (Errors(rows.double().mean(dim=0)) for rows in (target, raw))
        n, device = autoencoder.n_latents, sample.device
        self.n_active = torch.zeros(n, dtype=torch.int64, device=device)
        self.max_act = torch.zeros(n, device=device)
        self.rows_by_l0 = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: [B, width]."""
        for rows in x.split(max(1, _DENSE // self._autoencoder.n_latents)):
            self._add(rows)

    def _add(self, x: Tensor) -> None:
        model = self._autoencoder
        seen, target = model.seen(x)
        latents, info = model.encode(x)
        self._inner.add(model.add_bypass(model.recombine(latents), seen), target)
        self._outer.add(model.decode(latents, info), model.expected(x))
        active = latents > 0
        self.n_active += active.sum(dim=0)
        self.max_act = torch.maximum(self.max_act, latents.amax(dim=0))
        of_rows = active.sum(dim=1)
        counted = torch.bincount(of_rows, minlength=len(self.rows_by_l0))
        counted[: len(self.rows_by_l0)] += self.rows_by_l0
        self.rows_by_l0 = counted

    @property
    def rows(self) -> int:
        return int(self.rows_by_l0.sum())

    @property
    def density(self) -> Tensor:
        """Fraction of rows on which each latent is active, float64 [n]."""
        return self.n_active.double() / self.rows

    def metrics(self) -> dict[str, float]:
        """Errors in model space and, named _input, in the subject's; active latents a row and their quantiles.

        silent_fraction, dense_fraction: of latents, those that are active on none of the rows, and on over a tenth.
        """
        density = self.density
        return {
            **self._inner.metrics(),
            **{f"{name}_input": value for name, value in self._outer.metrics().items()},
            "l0": float(self.n_active.sum() / self.rows),
            **{f"l0_p{percent:02}": self._l0_quantile(percent) for percent in (5, 25, 50, 75, 95)},
            "l0_max": float(len(self.rows_by_l0) - 1),
            "silent_fraction": float((density == 0).double().mean()),
            "dense_fraction": float((density > 0.1).double().mean()),
        }

    def _l0_quantile(self, percent: int) -> float:
        """The least number of active latents that so many percent of the rows do not exceed."""
        reached = self.rows_by_l0.cumsum(0) * 100 >= self.rows * percent
        return float(reached.nonzero()[0])


class Principal:
    """FVU of what is left of rows after projecting them on a sample's first principal components, however many."""

    def __init__(self, sample: Tensor) -> None:
        """sample: [m, d]."""
        sample = sample.double()
        self._mean = sample.mean(dim=0)
        centred = sample - self._mean
        self._components = torch.linalg.eigh(centred.T @ centred)[1].flip(1)
        self._energy, self._shift = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        self._total, self._rows = self._mean.new_zeros(()), 0

    def add(self, x: Tensor) -> None:
        """x: [B, d]."""
        centred = x.double() - self._mean
        self._energy += (centred @ self._components).square().sum(dim=0)
        self._total += centred.square().sum()
        self._shift += centred.sum(dim=0)
        self._rows += len(x)

    def fvu(self, k: int) -> float:
        """Of k components."""
        spread = self._total - self._shift.square().sum() / self._rows
        return float((self._total - self._energy[:k].sum()) / spread)
