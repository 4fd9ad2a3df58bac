"""Transcoders: latents of one place in the subject that reconstruct what is found at a later one.

latents = activation(encoder(x - pre_bias) + latent_bias);  recons = decoder(latents) + post_bias [+ skip(x)]

Shapes: B rows, d_model features that go in, d_out features that come out.
Source: Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits", section 3; the skip connection:
Paulo et al. 2025, "Transcoders beat sparse autoencoders for interpretability", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sae.activations import Activation
from sae.collectives import Group
from sae.matryoshka import Nested
from sae.model import Autoencoder, Info
from sae.schemas.errors import AutoencoderError


class Transcoder(Autoencoder):
    """An autoencoder whose raw input [..., d_model + d_out] holds what goes in and, behind it, what is to come out.

    To encode, what goes in is enough. With `normalize` only that is normalised.

    Raises AutoencoderError for sizes that cannot be, and for tied weights.
    """

    def __init__(
        self,
        n_latents: int,
        d_model: int,
        d_out: int,
        activation: Activation | None = None,
        skip: bool = False,
        normalize: bool = False,
        tp: Group | None = None,
        nested: Nested | None = None,
        tied: bool = False,
    ) -> None:
        if tied:
            raise AutoencoderError("a transcoder was to be tied: its encoder and its decoder are of other places")
        super().__init__(n_latents, d_model, activation, False, normalize, tp, nested, d_out)
        self.post_bias = nn.Parameter(torch.zeros(d_out))
        self.skip = nn.Linear(d_model, d_out, bias=False) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    def like(self, n_latents: int, tp: Group) -> Self:
        skip = self.skip is not None
        return type(self)(n_latents, self.d_model, self.d_out, self.activation, skip, self.normalize, tp, self.nested)

    @property
    def output_bias(self) -> Tensor:
        return self.post_bias

    def preprocess(self, x: Tensor) -> tuple[Tensor, Info]:
        """Of x [..., d_model] or [..., d_model + d_out] what goes in, and what of it bypasses the latents."""
        if x.ndim and x.shape[-1] == self.d_model + self.d_out:
            x = x[..., : self.d_model]
        x, _ = super().preprocess(x)
        return x, {} if self.skip is None else {"bypass": self.skip(x)}

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != self.d_model + self.d_out:
            raise AutoencoderError(
                f"input has width {x.shape[-1]}, the transcoder needs {self.d_model} features that go in and "
                f"{self.d_out} that are to come out: give the activations of both hooks"
            )
        return self.preprocess(x)[0], self.expected(x)

    def expected(self, x: Tensor) -> Tensor:
        return x[..., self.d_model :]

    def add_bypass(self, recons: Tensor, x: Tensor) -> Tensor:
        return recons if self.skip is None else recons + self.skip(x)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "d_out": self.d_out, "skip": self.skip is not None}

    @staticmethod
    def _given(config: Mapping[str, Any]) -> dict[str, Any]:
        return {**Autoencoder._given(config), "d_out": config["d_out"], "skip": config["skip"]}

    def _undo(self, recons: Tensor, info: Info | None) -> Tensor:
        if self.skip is None:
            return recons
        if not info:
            raise AutoencoderError(
                "decoding was called without info on a transcoder with a skip connection: pass the info that encode "
                "or preprocess returned"
            )
        return recons + info["bypass"]


def from_config(config: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder, or the transcoder, of a `config`; see `Autoencoder.from_config`."""
    return (Transcoder if "d_out" in config else Autoencoder).from_config(config)
