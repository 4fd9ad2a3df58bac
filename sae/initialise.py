"""Initialisation from data.

Shapes: m sample rows, d features, n latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.1.
"""

import hashlib

import torch
from geom_median.torch import compute_geometric_median
from torch import Tensor

from sae.collectives import Group
from sae.losses import mse_scale
from sae.model import Autoencoder
from sae.optimise import normalise_rows_
from sae.schemas.errors import AutoencoderError

MEDIAN_ROWS = 32_768
N_PROBES = 256
DRAWN_ROWS = 1024  # of the dictionary at a time: every mesh draws the same numbers
# The package compares objectives in float32 and walks the points one by one in Python: a tighter
# tolerance never stops it on thousands of rows, and the median does not move any more.
MEDIAN_TOLERANCE = 1e-6


@torch.no_grad()
def initialise(
    autoencoder: Autoencoder,
    sample: Tensor,
    generator: torch.Generator | None = None,
    everyone: Group | None = None,
) -> float:
    """Set all parameters from a sample [m, d] of raw activations; return the scale of the MSE loss.

    The decoder gets random unit rows, the encoder the same rows rescaled so that unit inputs are
    reconstructed with unit norm on average, pre_bias the geometric median of the first 32,768 rows, and
    latent_bias zero. The scale is 1 / mean squared distance of the (normalised) sample from its mean.
    A tied autoencoder keeps unit rows. Of a transcoder, whose encoder gets rows of its own, the scale and the other
    bias are of what is to come out. `generator` is a CPU generator.

    Of a shard, `everyone` are all ranks that train it, who give the same sample and generator.

    Raises AutoencoderError when the sample has another width, is not finite or does not vary.
    """
    x, target = autoencoder.seen(sample.to(autoencoder.pre_bias))
    everyone = everyone if everyone is not None else Group()
    scale = float(everyone.broadcast_(mse_scale(target).clone())) if len(x) else float("nan")
    if not 0 < scale < float("inf"):
        raise AutoencoderError(
            f"the sample of {len(x)} activations that training starts from holds NaN or infinity, or all its "
            f"rows are equal: expected finite rows that differ; check the subject model and the hook"
        )
    _draw_rows(autoencoder.decoder_rows, autoencoder.tp, generator)
    autoencoder.latent_bias.zero_()
    autoencoder.stats_last_nonzero.zero_()
    _centre(autoencoder.pre_bias, x, everyone)
    encoder = autoencoder.encoder.weight
    if autoencoder.output_bias is not autoencoder.pre_bias:
        _centre(autoencoder.output_bias, target, everyone)
        _draw_rows(encoder, autoencoder.tp, generator)
    elif not autoencoder.tied:
        encoder.copy_(autoencoder.decoder_rows)
    if not autoencoder.tied:
        encoder.div_(_probe_norm(autoencoder, generator))
    return scale


def _centre(bias: Tensor, x: Tensor, everyone: Group) -> None:
    if everyone.rank == 0:
        bias.copy_(geometric_median(x[:MEDIAN_ROWS]))
    everyone.broadcast_(bias)


def _draw_rows(weight: Tensor, tp: Group, generator: torch.Generator | None) -> None:
    """Fill the rows [n, d] of a rank's latents with random unit vectors; a shard skips those of the others."""
    n, d = weight.shape
    first, total = tp.rank * n, tp.size * n
    for start in range(0, total, DRAWN_ROWS):
        drawn = torch.randn(min(DRAWN_ROWS, total - start), d, generator=generator)
        low, high = max(start, first), min(start + len(drawn), first + n)
        if low < high:
            weight[low - first : high - first].copy_(drawn[low - start : high - start])
    normalise_rows_(weight)


_latest: dict[bytes, Tensor] = {}


def geometric_median(points: Tensor) -> Tensor:
    """Return the point [d] with the least mean distance from points [m, d], in float32.

    It takes seconds, and autoencoders that are trained side by side start from the same points: the last is known.
    """
    points = points.float().cpu()
    key = hashlib.sha256(points.numpy().tobytes()).digest()
    median = _latest.get(key)
    if median is None:
        median = compute_geometric_median(points, skip_typechecks=True, ftol=MEDIAN_TOLERANCE).median
        _latest.clear()
        _latest[key] = median
    return median.clone()


def _probe_norm(autoencoder: Autoencoder, generator: torch.Generator | None) -> float:
    """Mean norm of the reconstruction, less its bias, of random unit vectors around pre_bias."""
    probes = torch.randn(N_PROBES, autoencoder.d_model, generator=generator)
    normalise_rows_(probes)
    x = probes.to(autoencoder.pre_bias) + autoencoder.pre_bias
    latents = autoencoder.activate(autoencoder.encode_pre_act(x))
    norm = float((autoencoder.recombine(latents) - autoencoder.output_bias).norm(dim=1).mean())
    return norm if norm > 0 else 1.0
