"""Random autoencoders of every kind, and what other programs can and can't express of them."""

from collections.abc import Callable
from typing import Final

import torch

from sae.activations import Activation, BatchTopK, GroupMax, Identity, JumpReLU, ReLU, TopK
from sae.matryoshka import Nested
from sae.model import Autoencoder
from sae.transcoder import Transcoder

N, D, OUT, K = 48, 12, 20, 6


def drawn(model: Autoencoder, seed: int = 0) -> Autoencoder:
    """With random weights, and thresholds that some pre-activations exceed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if "threshold" in model.own:
            model.own["threshold"].fill_(1.25)
    return model.eval().requires_grad_(False)


def sparse(
    activation: Activation, d: int = D, n: int = N, seed: int = 0, tied: bool = False, normalize: bool = False
) -> Autoencoder:
    return drawn(Autoencoder(n, d, activation, tied, normalize), seed)


def transcoder(activation: Activation, d_out: int = D, skip: bool = False, normalize: bool = False) -> Autoencoder:
    return drawn(Transcoder(N, D, d_out, activation, skip, normalize))


KINDS: Final[dict[str, Callable[[], Autoencoder]]] = {
    "relu": lambda: sparse(ReLU()),
    "relu-normalized": lambda: sparse(ReLU(), normalize=True),
    "topk": lambda: sparse(TopK(K)),
    "topk-normalized": lambda: sparse(TopK(K), normalize=True),
    "topk-tied": lambda: sparse(TopK(K), tied=True),
    "topk-normalized-tied": lambda: sparse(TopK(K), tied=True, normalize=True),
    "topk-identity": lambda: sparse(TopK(K, Identity())),
    "matryoshka": lambda: drawn(Autoencoder(N, D, TopK(K), nested=Nested((8, 20)))),
    "batchtopk": lambda: sparse(BatchTopK(K)),
    "batchtopk-normalized": lambda: sparse(BatchTopK(K), normalize=True),
    "jumprelu": lambda: sparse(JumpReLU()),
    "groupmax": lambda: sparse(GroupMax(K)),
    "transcoder": lambda: transcoder(ReLU(), OUT),
    "transcoder-normalized": lambda: transcoder(ReLU(), OUT, normalize=True),
    "transcoder-skip": lambda: transcoder(ReLU(), OUT, skip=True),
    "transcoder-skip-normalized": lambda: transcoder(ReLU(), OUT, skip=True, normalize=True),
    "transcoder-jumprelu": lambda: transcoder(JumpReLU(), OUT),
    "transcoder-jumprelu-skip": lambda: transcoder(JumpReLU(), OUT, skip=True),
    "transcoder-topk": lambda: transcoder(TopK(K)),
    "transcoder-topk-skip": lambda: transcoder(TopK(K), skip=True),
    "transcoder-topk-wide": lambda: transcoder(TopK(K), OUT),
    "transcoder-groupmax": lambda: transcoder(GroupMax(K)),
}
EXPRESSED: Final[dict[str, tuple[str, ...]]] = {
    "saelens": (
        "relu", "relu-normalized", "topk", "topk-normalized", "topk-tied", "topk-normalized-tied", "matryoshka",
        "batchtopk", "batchtopk-normalized", "jumprelu", "transcoder", "transcoder-normalized", "transcoder-skip",
        "transcoder-jumprelu", "transcoder-jumprelu-skip",
    ),
    "sparsify": (
        "topk", "topk-tied", "matryoshka", "groupmax", "transcoder-topk", "transcoder-topk-skip",
        "transcoder-groupmax",
    ),
    "openai-weights": ("relu", "topk-normalized", "topk-normalized-tied"),
}  # fmt: skip


def inputs(d: int = D, seed: int = 1, rows: int = 64) -> torch.Tensor:
    """Rows x [64, d] that are neither centred nor of unit norm."""
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5
