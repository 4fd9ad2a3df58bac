"""What becomes of the subject's predictions when activations are reconstructed, and when they are taken away.

Shapes: B contexts, T tokens, d features that come out, V vocabulary.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 4.1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sae.model import Autoencoder
from sae.subject import Subject

Replace = Callable[[Tensor], Tensor]
"""Of what is seen at the hooks [B, T, width], what the subject goes on with [B, T, d]."""


class Downstream:
    """Losses of the subject over batches of contexts, with activations at kept positions left as they are, replaced by
    their reconstruction, by zeros, or by their mean; those at masked positions are always left.
    """

    def __init__(self, subject: Subject, autoencoder: Autoencoder, mean: Tensor) -> None:
        """mean: [d] of the activations that come out, on training text."""
        self._subject, self._autoencoder, self._mean = subject, autoencoder, mean
        self._losses = dict.fromkeys(("clean", "reconstructed", "zero_ablated", "mean_ablated"), 0.0)
        self._kl, self._predicted = 0.0, 0

    @torch.no_grad()
    def add(self, token_ids: Tensor, lengths: Tensor) -> None:
        """token_ids: [B, T] int64, padded on the right; lengths: [B] their real tokens."""
        keep = self._subject.keep_mask(lengths, token_ids.shape[1]).to(self._subject.device)[..., None]
        clean = self._subject.logits(token_ids)
        for name in self._losses:
            replace = partial(getattr(self, f"_{name}"), keep)
            logits = clean if name == "clean" else self._subject.logits(token_ids, replace)
            # Row by row: a float32 copy of all logits would double the peak memory.
            for row, before, ids, length in zip(logits, clean, token_ids, lengths.tolist(), strict=True):
                ahead, following = row[: length - 1].float(), ids[1:length].to(row.device)
                self._losses[name] += float(F.cross_entropy(ahead, following, reduction="none").double().sum())
                if name == "reconstructed":
                    self._kl += float(kl(before[: length - 1].float(), ahead).double().sum())
        self._predicted += int((lengths - 1).sum())

    def metrics(self) -> dict[str, float]:
        """loss_*: nats a token; loss_recovered: how much of what zeroing costs the reconstruction gives back, and
        loss_recovered_mean of what the mean costs; kl_reconstructed: KL(clean || reconstructed), nats a token.
        """
        clean, recons, zero, mean = (total / self._predicted for total in self._losses.values())
        return {
            **{f"loss_{name}": total / self._predicted for name, total in self._losses.items()},
            **({"loss_recovered": (zero - recons) / (zero - clean)} if zero != clean else {}),
            **({"loss_recovered_mean": (mean - recons) / (mean - clean)} if mean != clean else {}),
            "kl_reconstructed": self._kl / self._predicted,
        }

    def _reconstructed(self, keep: Tensor, acts: Tensor) -> Tensor:
        latents, info = self._autoencoder.encode(acts.float())
        return torch.where(keep, self._autoencoder.decode(latents, info), self._autoencoder.expected(acts.float()))

    def _zero_ablated(self, keep: Tensor, acts: Tensor) -> Tensor:
        return self._autoencoder.expected(acts).masked_fill(keep, 0)

    def _mean_ablated(self, keep: Tensor, acts: Tensor) -> Tensor:
        return torch.where(keep, self._mean, self._autoencoder.expected(acts.float()))

    def _clean(self, keep: Tensor, acts: Tensor) -> Tensor:
        return self._autoencoder.expected(acts)


def kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row of logits [T, V], in nats."""
    log_before, log_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    found: Tensor = torch.linalg.vecdot(log_before.exp(), log_before - log_after)
    return found
