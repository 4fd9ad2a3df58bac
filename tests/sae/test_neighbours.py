"""Neighbours against whole matrices of similarities, and the extremes of rows against a sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae import neighbours
from sae.kernels.extremes import extremes
from sae.neighbours import Activity, nearest


def drawn_activity(seed: int, n_tokens: int, n_atoms: int) -> tuple[Tensor, Activity]:
    """Dense activations [t, n], some tokens without any and one atom that never fires, and the same as Activity."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n_tokens, n_atoms, generator=generator)
    dense *= torch.rand(n_tokens, n_atoms, generator=generator) < 0.3
    dense[:, 0] = 0
    token, atom = dense.nonzero(as_tuple=True)
    order = torch.randperm(len(token), generator=generator)
    token, atom = token[order], atom[order]
    # What tokens are called is of no concern.
    return dense, Activity.of(atom, 1000 - 3 * token, dense[token, atom], n_atoms, n_tokens)


@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(2, 12), st.integers(1, 20), st.integers(1, 50))
def test_coactive_atoms_have_the_largest_correlations(
    seed: int, n_tokens: int, n_atoms: int, k: int, pairs: int
) -> None:
    dense, activity = drawn_activity(seed, n_tokens, n_atoms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_PAIRS", pairs)
        columns, values = activity.correlated(0, n_atoms - 1, k)
    dense = dense.double()
    centred = dense - dense.mean(dim=0)
    correlation = (centred.T @ centred) / (centred.norm(dim=0)[:, None] * centred.norm(dim=0))
    together = (dense.T @ dense > 0) & (correlation > 1e-9) & ~torch.eye(n_atoms, dtype=torch.bool)
    expected = correlation.where(together, -torch.inf).topk(min(k, n_atoms), dim=1).values
    # Those that are 0 but for rounding may be on either side of it.
    sure = expected > 1e-6
    torch.testing.assert_close(values.double()[sure], expected[sure], atol=1e-6, rtol=0)
    torch.testing.assert_close(correlation.gather(1, columns)[sure], expected[sure], atol=1e-6, rtol=0)
    assert (values[~sure] < 1e-5).all()


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 50), st.integers(1, 400))
def test_nearest_atoms_have_the_largest_cosines(seed: int, n: int, k: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1)
    first = n // 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", block)
        columns, values = nearest(rows, first, n - 1, k)
    cosines = (rows @ rows.T).fill_diagonal_(-torch.inf)[first:]
    expected = cosines.topk(min(k, n), dim=1).values
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines.gather(1, columns), expected, atol=1e-6, rtol=0)


@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 20), st.booleans())
def test_extremes_are_those_of_a_sort(seed: int, width: int, n: int, largest: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-50, 50, (6, width), generator=generator).float()
    n = min(n, width)
    columns, values = extremes(scores, n, largest=largest)
    assert torch.equal(values, scores.sort(dim=1, descending=largest).values[:, :n])
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == n for row in columns.tolist())
