"""Quality of a reconstruction on held-out activations.

Shapes: m rows, d features, k components. "Model space" is what the autoencoder encodes: the input after `preprocess`.
"""

import torch
from torch import Tensor

from sae.collectives import Group
from sae.losses import fvu, normalized_mse
from sae.model import Autoencoder


@torch.no_grad()
def reconstruction(autoencoder: Autoencoder, x: Tensor, dp: Group | None = None, batch: int = 512) -> dict[str, Tensor]:
    """normalized_mse, fvu and l0 in model space, and fvu_input in the subject's, for activations x [m, d].

    With `dp` each of its ranks, which are all given x, works on some of the rows.
    """
    dp = dp if dp is not None else Group()
    mine = x[len(x) * dp.rank // dp.size : len(x) * (dp.rank + 1) // dp.size]
    target, raw = autoencoder.seen(mine)[1], autoencoder.expected(mine)
    means = [total / len(x) for total in dp.sum_all(target.sum(dim=0), raw.sum(dim=0))]
    spreads = [(rows - mean).square().sum() for rows, mean in zip((target, raw), means, strict=True)]
    sums = torch.stack(
        [_sums(autoencoder, *parts) for parts in zip(mine.split(batch), target.split(batch), strict=True)]
    )
    by_row, inner, outer, active = sums.sum(dim=0)
    active = autoencoder.tp.sum_(active.clone())
    by_row, inner, outer, active, spread, spread_input = dp.sum_all(by_row, inner, outer, active, *spreads)
    return {
        "normalized_mse": by_row / len(x),
        "fvu": inner / spread,
        "fvu_input": outer / spread_input,
        "l0": active / len(x),
    }


def _sums(autoencoder: Autoencoder, x: Tensor, target: Tensor) -> Tensor:
    """[4] over rows x: normalised squared error, squared error in model space, in the subject's, active latents."""
    latents, info = autoencoder.encode(x)
    recons = autoencoder.add_bypass(autoencoder.recombine(latents), autoencoder.seen(x)[0])
    outer = autoencoder.decode(latents, info) - autoencoder.expected(x)
    by_row = normalized_mse(recons, target) * len(x) if len(x) else x.new_zeros(())
    return torch.stack(
        [by_row, (recons - target).square().sum(), outer.square().sum(), (latents > 0).sum().to(x.dtype)]
    )


@torch.no_grad()
def pca_fvu(sample: Tensor, x: Tensor, k: int) -> Tensor:
    """FVU of x [m, d] projected on the k first principal components of a sample [m', d], in double precision."""
    sample, x = sample.double(), x.double()
    mean = sample.mean(dim=0)
    _, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean))
    basis = vectors[:, -k:]
    return fvu((x - mean) @ basis @ basis.T + mean, x)
