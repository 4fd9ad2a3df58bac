"""How well predictions agree with activations: of tokens that both are known of, zeros included."""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sae.n2g.compiled import Sparse

Array = npt.NDArray[Any]

_ROUNDING: Final = 1e-12  # of the sums of squares, below which what is left of a variance is rounding


class Scores(NamedTuple):
    """Of a atoms, [a] each; NaN where a score has no meaning.

    n_active, n_predicted: tokens with an activation, or a prediction, above 0
    recall: share of the active tokens that are predicted; precision: share of the predicted tokens that are active
    correlation: Pearson's, of predictions and activations over all tokens
    """

    n_active: Array
    n_predicted: Array
    recall: Array
    precision: Array
    correlation: Array


def scores(predicted: Sparse, real: Sparse, n_tokens: Array) -> Scores:
    """Of atoms that were measured on n_tokens [a] tokens each; every pair of atom and token comes once in each."""
    n_atoms, width = len(n_tokens), 1 + max(one.at.max(initial=0) for one in (predicted, real))
    ours, theirs = (one.atom * width + one.at for one in (predicted, real))
    _, of_predicted, of_real = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)

    def total(atom: Array, weights: Array | None = None) -> Array:
        return np.bincount(atom, weights, n_atoms)

    p, r = predicted.act.astype(np.float64), real.act.astype(np.float64)
    n_predicted, n_active, n_both = (total(atom) for atom in (predicted.atom, real.atom, real.atom[of_real]))
    products = total(real.atom[of_real], p[of_predicted] * r[of_real])
    sums = [total(one.atom, act) for one, act in ((predicted, p), (real, r))]
    squares = [total(one.atom, act * act) for one, act in ((predicted, p), (real, r))]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = n_both / n_active, n_both / n_predicted
        variances = [_variance(n_tokens, *both) for both in zip(sums, squares, strict=True)]
        covariance = n_tokens * products - sums[0] * sums[1]
        correlation = covariance / np.sqrt(variances[0] * variances[1])
    return Scores(n_active, n_predicted, recall, precision, np.clip(correlation, -1.0, 1.0))


def _variance(n: Array, sum_: Array, squares: Array) -> Array:
    """Times n squared; NaN where all are equal."""
    found = n * squares - sum_ * sum_
    return np.where(found > _ROUNDING * n * squares, found, np.nan)
