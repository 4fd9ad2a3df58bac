"""The paper's joint form of a reconstruction's error in the number of latents and in k.

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)

The second term is what no dictionary, however large, gets below at that k.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 3.1.3, equation 5.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STARTS, _ITERATIONS = 8, 400


class Law(NamedTuple):
    """Coefficients, and the root mean square of what is left of ln L."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float
    residual: float

    def error(self, n: float, k: float) -> float:
        """L(n, k)."""
        return float(_logarithm(torch.tensor(self[:6]).double(), *_features([n], [k])).exp())


def fit(n: Sequence[float], k: Sequence[float], error: Sequence[float]) -> Law:
    """The law with the least squares in ln L, of m measurements each; the best of several starts.

    Raises ValueError for fewer than six measurements, as many as coefficients, or errors that are not above 0.
    """
    if len(error) < 6:
        raise ValueError(f"a fit of six coefficients expects at least six measurements, received {len(error)}")
    if min(error) <= 0:
        raise ValueError(f"errors are expected to be above 0, received {min(error)}")
    features, wanted = _features(n, k), torch.tensor(error).double().log()
    centre = torch.stack(features).mean(dim=1)
    around = features[0] - centre[0], features[1] - centre[1]  # better conditioned than the law's own coordinates
    generator = torch.Generator().manual_seed(0)
    best: tuple[float, Tensor] | None = None
    for start in range(_STARTS):
        drawn = torch.randn(6, generator=generator).double() * 0.3
        # Of the floor any share of what is seen, small at first: that is where most optima are.
        drawn[0], drawn[4] = wanted.mean(), wanted.min() - 0.5 - start / 4
        left, found = _descended(drawn, around, wanted)
        if best is None or left < best[0]:
            best = left, found
    assert best is not None
    return Law._make([*_uncentred(best[1], centre).tolist(), (best[0] / len(error)) ** 0.5])


def _features(n: Sequence[float], k: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(n).double().log(), torch.tensor(k).double().log()


def _logarithm(law: Tensor, ln_n: Tensor, ln_k: Tensor) -> Tensor:
    alpha, beta_k, beta_n, gamma, zeta, eta = law
    return torch.logaddexp(alpha + beta_k * ln_k + beta_n * ln_n + gamma * ln_k * ln_n, zeta + eta * ln_k)


def _descended(start: Tensor, features: tuple[Tensor, Tensor], wanted: Tensor) -> tuple[float, Tensor]:
    law = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([law], max_iter=_ITERATIONS, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def squares() -> Tensor:
        optimiser.zero_grad()
        left = (_logarithm(law, *features) - wanted).square().sum()
        left.backward()
        return left

    optimiser.step(squares)
    return float(squares().detach()), law.detach()


def _uncentred(law: Tensor, centre: Tensor) -> Tensor:
    """The same law of ln n and ln k themselves, from that of their distances from the centre."""
    alpha, beta_k, beta_n, gamma, zeta, eta = law
    ln_n, ln_k = centre
    return torch.stack(
        [
            alpha - beta_k * ln_k - beta_n * ln_n + gamma * ln_k * ln_n,
            beta_k - gamma * ln_n,
            beta_n - gamma * ln_k,
            gamma,
            zeta - eta * ln_k,
            eta,
        ]
    )
