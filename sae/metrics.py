"""Quality of a reconstruction on held-out activations.

Shapes: m rows, d features, k components. "Model space" is what the autoencoder encodes: the input after `preprocess`.
"""

import torch
from torch import Tensor

from sae.losses import fvu, normalized_mse
from sae.model import Autoencoder


@torch.no_grad()
def reconstruction(autoencoder: Autoencoder, x: Tensor, batch: int = 512) -> dict[str, Tensor]:
    """normalized_mse, fvu and l0 in model space, and fvu_input in the subject's, for activations x [m, d]."""
    normed, inner, outer, active = [], [], [], []
    for part in x.split(batch):
        latents, info = autoencoder.encode(part)
        normed.append(autoencoder.preprocess(part)[0])
        inner.append(latents @ autoencoder.decoder_rows + autoencoder.pre_bias)
        outer.append(autoencoder.decode(latents, info))
        active.append((latents > 0).sum(dim=-1).float())
    target, recons = torch.cat(normed), torch.cat(inner)
    return {
        "normalized_mse": normalized_mse(recons, target),
        "fvu": fvu(recons, target),
        "fvu_input": fvu(torch.cat(outer), x),
        "l0": torch.cat(active).mean(),
    }


@torch.no_grad()
def pca_fvu(sample: Tensor, x: Tensor, k: int) -> Tensor:
    """FVU of x [m, d] projected on the k first principal components of a sample [m', d], in double precision."""
    sample, x = sample.double(), x.double()
    mean = sample.mean(dim=0)
    _, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean))
    basis = vectors[:, -k:]
    return fvu((x - mean) @ basis @ basis.T + mean, x)
