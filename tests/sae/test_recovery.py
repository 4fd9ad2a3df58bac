"""Training finds the dictionary that data was made with, whatever the activation, where it has as many latents."""

import pytest
import torch
from torch import Tensor

from sae.activations import Activation, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from sae.initialise import initialise
from sae.matryoshka import Nested
from sae.model import Autoencoder
from sae.training import StepConfig, TrainStep

N, D, K = 64, 32, 3
ROWS, LR = 512, 2e-2


class Planted:
    """Rows of three of 64 atoms in 32 dimensions, with an offset and some noise."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.atoms = torch.nn.functional.normalize(torch.randn(N, D, generator=self._generator), dim=1)
        self._offset = torch.randn(D, generator=self._generator)

    def rows(self, n: int) -> Tensor:
        active = torch.rand(n, N, generator=self._generator).topk(K, dim=1).indices
        strength = 1 + torch.rand(n, K, generator=self._generator)
        latents = torch.zeros(n, N).scatter(1, active, strength)
        return latents @ self.atoms + self._offset + 0.02 * torch.randn(n, D, generator=self._generator)


def trained(
    activation: Activation, sparsity_coef: float, prefixes: tuple[int, ...], steps: int, seed: int
) -> tuple[float, float]:
    """Mean over atoms of the cosine with the nearest row of the decoder, before training and after it."""
    planted = Planted(seed)
    model = Autoencoder(N, D, activation, nested=Nested(prefixes))
    scale = initialise(model, planted.rows(2048), torch.Generator().manual_seed(seed + 100))
    train = TrainStep(model, StepConfig(scale, 16, 0.25, 5000, sparsity_coef, ema_decay=None))
    before = cosine(model, planted)
    for step in range(steps):
        train.step(planted.rows(ROWS), LR * min(1, 2 * (1 - step / steps)))
    return before, cosine(model, planted)


def cosine(model: Autoencoder, planted: Planted) -> float:
    return float((planted.atoms @ model.decoder_rows.detach().T).max(dim=1).values.mean())


# Behind each the least and the largest of four seeds; untrained 0.40 to 0.42.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("activation", "sparsity_coef", "prefixes", "steps"),
    [
        (TopK(K), 0.0, (), 1000),  # 0.984 to 0.990
        (BatchTopK(K), 0.0, (), 1000),  # 0.985 to 0.996
        (GroupMax(8), 0.0, (), 1000),  # 0.975 to 0.983
        (ReLU(), 0.1, (), 1000),  # 0.980 to 0.987
        (JumpReLU(0.1, 0.1), 0.03, (), 1500),  # 0.958 to 0.975
        (TopK(K), 0.0, (16, 32), 1000),  # 0.970 to 0.991
    ],
    ids=["topk", "batchtopk", "groupmax", "relu", "jumprelu", "matryoshka"],
)
def test_a_dictionary_of_the_same_size_is_recovered(
    activation: Activation, sparsity_coef: float, prefixes: tuple[int, ...], steps: int, seed: int
) -> None:
    before, after = trained(activation, sparsity_coef, prefixes, steps, seed)
    assert before < 0.6
    assert after >= 0.95
