"""Activations as a language model's are thought to be, drawn on the device, and an autoencoder to begin with.

Sizes: B rows, d features, n latents.
"""

import torch
from torch import Tensor

from benchmarks._shapes import Shape
from sae.activations import TopK
from sae.model import Autoencoder
from sae.optimise import normalise_rows_

ATOMS_PER_FEATURE = 4
NOISE_SHARE = 0.1
HOT = 0
HOT_STRENGTH = 8.0
DEAD_SHARE = 0.1
DEAD_SCALE = 1e-3
DEAD_SINCE = 2_000_000_000


class Dictionary:
    """Sparse sums of unit atoms, drawn with Zipf's frequencies and exponential strengths, plus a tenth of noise."""

    def __init__(self, d_model: int, active: int, generator: torch.Generator) -> None:
        self.active = active
        self._generator = generator
        device = generator.device
        self.atoms = torch.randn(ATOMS_PER_FEATURE * d_model, d_model, device=device, generator=generator)
        normalise_rows_(self.atoms)
        frequency = 1 / torch.arange(1, len(self.atoms) + 1, device=device, dtype=torch.float64)
        self._cumulative = (frequency.cumsum(0) / frequency.sum()).float()

    def draw(self, batch: int) -> Tensor:
        """A fresh batch [B, d] of unit variance; bfloat16 on CUDA, the same precision in float32 elsewhere."""
        shape, device = (batch, self.active), self.atoms.device
        level = torch.rand(shape, device=device, generator=self._generator)
        chosen = torch.searchsorted(self._cumulative, level).clamp_(max=len(self.atoms) - 1)
        strength = torch.empty(shape, device=device).exponential_(generator=self._generator)
        signal = torch.nn.functional.embedding_bag(chosen, self.atoms, per_sample_weights=strength, mode="sum")
        noise = torch.randn(signal.shape, device=device, generator=self._generator)
        x = signal / signal.std() * (1 - NOISE_SHARE) ** 0.5 + noise * NOISE_SHARE**0.5
        return rounded(x)


def rounded(x: Tensor) -> Tensor:
    """In bfloat16 on CUDA, as a subject model gives it; the same values in float32 elsewhere."""
    return x.bfloat16() if x.is_cuda else x.bfloat16().float()


def autoencoder(shape: Shape, sample: Tensor, generator: torch.Generator, normalize: bool = True) -> Autoencoder:
    """One on the sample's device with random unit rows, the same in both weights, and the sample's mean as pre_bias."""
    with torch.device(sample.device):
        made = Autoencoder(shape.n_latents, shape.d_model, TopK(shape.k), normalize=normalize)
    with torch.no_grad():
        rows = torch.randn(shape.n_latents, shape.d_model, device=sample.device, generator=generator)
        normalise_rows_(rows)
        made.decoder_rows.copy_(rows)
        made.encoder.weight.copy_(rows)
        made.pre_bias.copy_(made.preprocess(sample.float())[0].mean(dim=0))
    return made


@torch.no_grad()
def kill(model: Autoencoder, generator: torch.Generator) -> None:
    """Make a random tenth of the latents dead for good.

    Their encoder rows are too short to be among the k largest, and a small learning rate leaves them so. Unlike a very
    negative bias this keeps half of their pre-activations positive, so that AuxK has real work to do.
    """
    chosen = torch.randperm(model.n_latents, device=generator.device, generator=generator)
    dead = chosen[: round(DEAD_SHARE * model.n_latents)]
    model.encoder.weight[dead] *= DEAD_SCALE
    model.stats_last_nonzero[dead] = DEAD_SINCE


@torch.no_grad()
def isolate_hot(model: Autoencoder) -> Tensor:
    """Let one latent alone see a direction [d], which is returned: on inputs that all have it, that latent is hot."""
    direction = model.decoder_rows[HOT].detach().clone()
    weight = model.encoder.weight
    weight.addr_(weight @ direction, direction, alpha=-1)
    weight[HOT] = direction
    return direction


def add_hot(x: Tensor, direction: Tensor) -> Tensor:
    """x [B, d] with the direction in every row, strong enough to be among the k largest latents."""
    return rounded(x.float() + HOT_STRENGTH * direction)
