import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels.topk import topk


def stable_sort(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = x.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 6),
    n=st.integers(1, 80),
    n_values=st.sampled_from([1, 2, 3, 10, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_equals_a_stable_descending_sort_however_many_ties(
    seed: int, rows: int, n: int, n_values: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randint(0, n_values, (rows, n), generator=generator) - n_values // 2).to(dtype)
    values, indices = topk(x, k)
    expected_values, expected_indices = stable_sort(x, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


def test_zeros_of_both_signs_and_infinities_are_ordered_by_id() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0, float("-inf")], [float("inf"), 1.0, float("inf"), float("-inf")]])
    _, indices = topk(x, 3)
    assert indices.tolist() == [[0, 1, 2], [0, 2, 1]]


def test_gradient_reaches_the_winners_only() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]], requires_grad=True)
    values, _ = topk(x, 2)
    (values * torch.tensor([10.0, 20.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 10.0, 20.0, 0.0]]


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_k_is_refused_with_both_numbers(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} with n=4"):
        topk(torch.zeros(2, 4), k)
