"""How sparse the effects of latents are: of which part of the logits ablating one of them changes anything.

Shapes: T tokens from the ablated one on, V vocabulary, n latents.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 4.5.
"""

from typing import Final

import torch
from torch import Tensor

from sae.model import Autoencoder
from sae.subject import Subject

WINDOW: Final = 16
"""Tokens whose predictions are looked at, the ablated one among them."""
PER_TOKEN: Final = 3
"""Latents that are ablated at one position, each by itself: they share the run without a change."""


class AblationSparsity:
    """The mean, over latents that are active somewhere, of the effective fraction of logits that each changes."""

    def __init__(self, subject: Subject, autoencoder: Autoencoder, generator: torch.Generator) -> None:
        self._subject, self._autoencoder, self._generator = subject, autoencoder, generator
        self.fractions: list[float] = []

    @torch.no_grad()
    def add(self, token_ids: Tensor, pos: int, n: int = PER_TOKEN) -> None:
        """Ablates up to n latents that are active at a position of a context, token_ids int64 [tokens].

        What the autoencoder does not explain stays.
        """
        rows = token_ids[: pos + WINDOW].repeat(n + 1, 1)
        ablated = 0

        def replace(acts: Tensor) -> Tensor:
            nonlocal ablated
            new = self._autoencoder.expected(acts.float()).clone()
            contributions = self._contributions(acts[:1, pos].float(), n)
            ablated = len(contributions)
            new[1 : 1 + ablated, pos] -= contributions
            return new

        logits = self._subject.logits(rows, replace)[:, pos:].float()
        found = (effective_fraction(logits[row] - logits[0]) for row in range(1, 1 + ablated))
        self.fractions += [fraction for fraction in found if fraction is not None]

    def _contributions(self, x: Tensor, n: int) -> Tensor:
        """[up to n, d] what active latents, drawn at random, each add to the output, of x [1, width]."""
        _, latent, value = self._autoencoder.nonzeros(x)
        chosen = torch.randperm(len(latent), generator=self._generator)[:n].to(x.device)
        alone = x.new_zeros(len(chosen), self._autoencoder.n_latents)
        alone[torch.arange(len(chosen), device=x.device), latent[chosen]] = value[chosen].to(x.dtype)
        info = self._autoencoder.preprocess(x)[1]
        return self._autoencoder.decode(alone, info) - self._autoencoder.decode(torch.zeros_like(alone), info)

    def metrics(self) -> dict[str, float]:
        """Nothing where no ablation changed any logit."""
        if not self.fractions:
            return {}
        return {"ablation_sparsity": sum(self.fractions) / len(self.fractions)}


def effective_fraction(change: Tensor) -> float | None:
    """(L1 / L2)^2 / (T V) of changes in logits [T, V], each token's median taken out: it moves no probability.

    Between 1 / (T V), of one logit, and 1, of all alike; None where nothing changes.
    """
    change = change.double()
    change = change - change.median(dim=-1, keepdim=True).values
    squared = change.square().sum()
    return float(change.abs().sum().square() / squared / change.numel()) if squared > 0 else None
