"""The twins of decode, sampled_matmul, sparse_t_matmul and its COO form against dense products."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels.decode import decode
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul, sparse_t_matmul_coo

# float64 sums of at most 40 products of order one: the order of addition moves the 15th digit.
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def dense(values: Tensor, indices: Tensor, n: int) -> Tensor:
    matrix = torch.zeros(len(values), n, dtype=values.dtype)
    for row in range(len(values)):
        for value, index in zip(values[row], indices[row], strict=True):
            matrix[row, index] += value
    return matrix


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 8),
    n=st.integers(1, 12),
    d=st.integers(1, 9),
    k=st.integers(1, 5),
)
def test_all_equal_dense_products_with_repeated_and_unused_latents(
    seed: int, rows: int, n: int, d: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, n, (rows, k), generator=generator)
    weight = torch.randn(n, d, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    matrix = dense(values, indices, n)
    close(decode(values, indices, weight), matrix @ weight)
    close(sparse_t_matmul(values, indices, grad, n), matrix.T @ grad)
    shuffled = torch.randperm(rows * k, generator=generator)
    at, cols, entries = (shuffled // k, indices.flatten()[shuffled], values.flatten()[shuffled])
    close(sparse_t_matmul_coo(at, cols, entries, grad, n), matrix.T @ grad)
    expected = (grad @ weight.T).gather(1, indices)
    close(sampled_matmul(grad, weight, indices), expected)


def test_gradients_of_decode_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, 6, (4, 3))
    assert torch.autograd.gradcheck(lambda v, w: decode(v, indices, w), (values, weight))


def test_a_transposed_weight_gives_the_same_result_as_a_contiguous_one() -> None:
    weight = torch.randn(7, 5).T
    values, indices = torch.rand(3, 2), torch.tensor([[0, 4], [1, 1], [2, 3]])
    assert torch.equal(decode(values, indices, weight), decode(values, indices, weight.contiguous()))
    assert torch.equal(
        sampled_matmul(torch.ones(3, 7), weight, indices),
        sampled_matmul(torch.ones(3, 7), weight.contiguous(), indices),
    )


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    values, indices = torch.rand(512, 16), torch.randint(0, 300, (512, 16)) ** 2 // 300
    weight, grad = torch.randn(300, 96), torch.randn(512, 96)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [
            decode(values, indices, weight),
            sparse_t_matmul(values, indices, grad, 300),
            sampled_matmul(grad, weight, indices),
        ]

    before = torch.get_num_threads()
    try:
        one, two, three = run(1), run(2), run(3)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_disagreeing_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"received \(2, 3\) float32, \(2, 4\) int64 and \(5, 5\) float32"):
        decode(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"received \(2, 4\) float32, \(5, 3\) float32"):
        sampled_matmul(torch.zeros(2, 4), torch.zeros(5, 3), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dense \[B, d\] float, received .* and \(3, 4\)"):
        sparse_t_matmul(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4), 5)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_latent_out_of_range_is_refused_rather_than_dropped(index: int) -> None:
    with pytest.raises(ValueError, match=r"indices in \[0, 3\)"):
        sparse_t_matmul(torch.ones(2, 1), torch.tensor([[0], [index]]), torch.ones(2, 4), 3)
