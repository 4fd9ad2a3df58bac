"""Matryoshka: prefixes of the latents that each reconstruct by themselves, so that the first latents stay general.

Shapes: B rows, d features, n latents, k selected ones per row.
Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from sae.collectives import sum_forward
from sae.schemas.errors import AutoencoderError

if TYPE_CHECKING:
    from sae.model import Autoencoder


@dataclass(frozen=True)
class Nested:
    """How many latents each prefix has, ascending; that of all latents goes without saying."""

    sizes: tuple[int, ...] = ()

    def check(self, n_latents: int) -> None:
        """Raises AutoencoderError where the sizes are not ascending, or not below n_latents."""
        bounds = (0, *self.sizes, n_latents)
        if not all(isinstance(size, int) for size in bounds) or any(a >= b for a, b in pairwise(bounds)):
            raise AutoencoderError(
                f"prefixes are {list(self.sizes)}, of {n_latents} latents: expected ascending numbers between 1 and "
                f"{n_latents - 1}"
            )

    def dense(self, model: Autoencoder, latents: Tensor) -> Iterator[Tensor]:
        """The reconstruction [B, d] of each prefix of dense latents [B, n]."""
        bounds = self._held(model)
        parts = zip(latents.tensor_split(bounds, dim=-1), model.decoder_rows.tensor_split(bounds), strict=True)
        sums = list(accumulate(model.product(latents, rows) for latents, rows in parts))
        return (sum_forward(of_shard, model.tp) + model.output_bias for of_shard in sums[:-1])

    def sparse(self, model: Autoencoder, values: Tensor, indices: Tensor) -> Iterator[Tensor]:
        """The same of sparse latents, values and indices [B, k]."""
        return (model.recombine_sparse(values.where(indices < bound, 0), indices) for bound in self._held(model))

    def _held(self, model: Autoencoder) -> list[int]:
        """How many of a shard's own latents each prefix has."""
        first = model.tp.rank * model.n_latents
        return [min(max(size - first, 0), model.n_latents) for size in self.sizes]
