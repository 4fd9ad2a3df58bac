"""Reconstruction and sparsity losses.

Shapes: B rows, d features, n latents, k selected latents per row.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", sections 2.1, 2.4 and appendix A.2.
"""

import torch
from torch import Tensor


def ratio(error: Tensor, power: Tensor) -> Tensor:
    """error / power of each row; zero for a row of zeros, by which nothing can be measured.

    Subjects give such rows: one alone would make the mean of a batch infinite.
    """
    nothing = power == 0
    return torch.where(nothing, 0, error / torch.where(nothing, 1, power))


def mse(recons: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all features of all rows."""
    return (recons - target).square().mean()


def normalized_mse(recons: Tensor, x: Tensor) -> Tensor:
    """Mean over rows of (mean squared error of the row / mean square of the row of x [..., d]); see `ratio`."""
    return ratio((recons - x).square().mean(dim=-1), x.square().mean(dim=-1)).mean()


def normalized_l1(latents: Tensor, x: Tensor) -> Tensor:
    """Mean over rows of (sum of |latents| of the row / norm of the row of x [..., d]); see `ratio`."""
    return ratio(latents.abs().sum(dim=-1), torch.linalg.vector_norm(x, dim=-1)).mean()


def autoencoder_loss(recons: Tensor, x: Tensor, latents: Tensor, l1_coef: float) -> Tensor:
    """Loss of dense activations: normalized_mse + l1_coef * normalized_l1."""
    return normalized_mse(recons, x) + l1_coef * normalized_l1(latents, x)


def fvu(recons: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over squared distance from the mean row of x [B, d]."""
    return (recons - x).square().sum() / (x - x.mean(dim=0)).square().sum()


def mse_scale(sample: Tensor) -> Tensor:
    """1 / mean squared distance of sample [m, d] from its mean row, so that hooks compare."""
    return 1 / (sample - sample.mean(dim=0)).square().mean()


def auxk_loss(aux_recons: Tensor, recons: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """Normalised MSE of the dead latents' reconstruction of what the living ones left over (all [B, d]).

    aux_recons begins from bias [d], so it is to be target - recons + bias, without a gradient. A row with nothing left
    over (0 / 0) counts as zero, in the loss and in the gradient.
    """
    residual = target - recons.detach() + bias.detach()
    return ratio((aux_recons - residual).square().mean(dim=-1), residual.square().mean(dim=-1)).mean()
