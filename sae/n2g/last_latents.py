"""Latents at the last token of short sequences of one length."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae.devices import send
from sae.model import Autoencoder
from sae.n2g.probes import ROWS, Latents
from sae.schemas.errors import SubjectError
from sae.subject import Subject


class LastLatents:
    """The subject up to the hook, and the autoencoder at the last position only.

    On a CPU a sequence gives the same bits in every batch: all its runs have its own length, and their rows are filled
    up to multiples of `ROWS`, between which matrix kernels sum in another order.
    """

    def __init__(self, subject: Subject, autoencoder: Autoencoder) -> None:
        self._subject, self._autoencoder = subject, autoencoder
        self._rounded_encoder = autoencoder.rounded_encoder()

    @torch.inference_mode()
    def __call__(self, token_ids: npt.NDArray[Any]) -> list[Latents]:
        """Those above zero, of token ids [n, T] within the vocabulary.

        Raises SubjectError where an activation is NaN or infinite.
        """
        n = len(token_ids)
        filled = np.concatenate([token_ids, np.repeat(token_ids[:1], -n % ROWS, axis=0)])
        acts = self._subject.forward(send(torch.from_numpy(filled), self._subject.device))[:, -1].float()
        if not bool(torch.isfinite(acts).all()):
            raise SubjectError(
                f"{self._subject.model} at {self._subject.hook}: an activation is NaN or infinite; try subject.dtype "
                "float32, or check the model's weights"
            )
        row, latent, value = (found.cpu().numpy() for found in self._autoencoder.nonzeros(acts, self._rounded_encoder))
        bounds = np.searchsorted(row, np.arange(n + 1))
        # Copies: a view of one sequence would keep its whole batch.
        return [
            (latent[low:high].astype(np.int32), value[low:high].astype(np.float32))
            for low, high in pairwise(bounds.tolist())
        ]
