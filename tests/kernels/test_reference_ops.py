"""The kernels of the reference's ops against their twins in fp64: interpreted where there is no GPU, else on it."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels.addmul import add_mul
from sae.kernels.columns import column_sum, weighted_sum
from sae.kernels.decode import decode
from sae.kernels.dispatch import interpreter
from sae.kernels.mse import mse
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import CHUNK, sparse_t_matmul, sparse_t_matmul_coo

Op = Callable[..., Tensor]
Case = tuple[Op, list[Tensor]]

no_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
places = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=no_interpreter),
        pytest.param("cuda", torch.float32, id="gpu-fp32", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, id="gpu-bf16", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, id="gpu-fp16", marks=pytest.mark.gpu),
    ],
)


def indices_of(g: torch.Generator, n: int, *shape: int) -> Tensor:
    return torch.randint(0, n, shape, generator=g)


def decode_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    ids = indices_of(g, n, rows, k)
    return lambda v, w: decode(v, ids.to(v.device), w), [torch.randn(rows, k, generator=g), normal(g, n, d)]


def sampled_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    ids = indices_of(g, n, rows, k)
    return lambda x, w: sampled_matmul(x, w, ids.to(x.device)), [normal(g, rows, d), normal(g, n, d)]


def transposed_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    ids = indices_of(g, n, rows, k)
    return lambda v, x: sparse_t_matmul(v, ids.to(v.device), x, n), [normal(g, rows, k), normal(g, rows, d)]


def coo_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    at, cols = indices_of(g, max(rows, 1), rows * k), indices_of(g, n, rows * k)
    return lambda v, x: sparse_t_matmul_coo(at.to(v.device), cols.to(v.device), v, x, n), [
        normal(g, rows * k),
        normal(g, rows, d),
    ]


def add_mul_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    # b [d] or [rows, 1] by the parity of k, as the projection of a gradient has it; c of a's shape.
    b = normal(g, d) if k % 2 else normal(g, rows, 1)
    return add_mul, [normal(g, rows, d), b, normal(g, rows, d)]


def column_sum_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    return column_sum, [normal(g, rows * k, d)]


def mse_case(g: torch.Generator, rows: int, k: int, n: int, d: int) -> Case:
    return mse, [normal(g, rows + 1, d), normal(g, rows + 1, d)]


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


CASES = {
    "decode": decode_case,
    "sampled": sampled_case,
    "transposed": transposed_case,
    "coo": coo_case,
    "add_mul": add_mul_case,
    "column_sum": column_sum_case,
    "mse": mse_case,
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def kernels(device: str) -> Any:
    return interpreter() if device == "cpu" else nullcontext()


def results(op: Op, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """The op's output and, where it has them, its gradients for a random cotangent; in fp64, on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    found = [out]
    if out.requires_grad:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        found += torch.autograd.grad(out, inputs, cotangent.to(out))
    return [x.detach().cpu().double() for x in found]


def magnitudes(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    """What the op and its gradients would be if no two terms cancelled: the scale of rounding errors."""
    inputs = [x.abs().requires_grad_() for x in inputs]
    if op is mse:
        inputs[1] = (-inputs[1]).detach().requires_grad_()
    out = op(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.full_like(out, 4.0)) if out.requires_grad else ()
    return [x.detach().abs() for x in (out, *grads)]


def check(op: Op, inputs: list[Tensor], device: str, dtype: torch.dtype) -> None:
    """The kernel's error is at most the eager op's plus the rounding of its fp32 sums and of its result."""
    inputs = [x.to(dtype) for x in inputs]
    exact = [x.double() for x in inputs]
    with kernels(device):
        found = results(op, [x.to(device) for x in inputs])
    eager, expected, sizes = results(op, inputs), results(op, exact), magnitudes(op, exact)
    assert len(found) == len(expected)
    for f, e, x, size in zip(found, eager, expected, sizes, strict=True):
        # A lane adds at most some 30 products one after the other here, each step off by half an fp32 eps.
        tolerance = 16 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps / 2 * x.abs()
        excess = (f - x).abs() - (e - x).abs() - tolerance
        assert f.shape == x.shape
        # Written so that NaN fails. The smallest normal number of fp16 ends its relative precision.
        assert bool((excess <= torch.finfo(dtype).smallest_normal).all()), f"off by {excess.max()} too much"


@places
@cases
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([0, 1, 2, 7, 13]),
    k=st.sampled_from([1, 2, 3, 5, 17]),
    n=st.sampled_from([1, 2, 11, 37]),
    d=st.sampled_from([1, 3, 16, 31, 131]),
)
def test_kernel_forward_and_gradients_equal_the_twin_in_fp64(
    case: Callable[..., Case], device: str, dtype: torch.dtype, seed: int, rows: int, k: int, n: int, d: int
) -> None:
    check(*case(torch.Generator().manual_seed(seed), rows, k, n, d), device, dtype)


@places
@cases
@pytest.mark.parametrize(
    ("rows", "k", "n", "d"), [(3, 512, 600, 5), (2, 2, 3, 1031), (131, 1, 1, 3), (11, 3, 5, 770)], ids=str
)
def test_sizes_beyond_one_block(
    case: Callable[..., Case], device: str, dtype: torch.dtype, rows: int, k: int, n: int, d: int
) -> None:
    """k = 512, several blocks of columns, one latent that has every entry, d no power of two."""
    check(*case(torch.Generator().manual_seed(0), rows, k, n, d), device, dtype)


@places
@pytest.mark.parametrize("shift", [0, 1, CHUNK - 1])
def test_a_latent_on_every_row_is_summed_in_chunks(device: str, dtype: torch.dtype, shift: int) -> None:
    """The hot segment starts `shift` entries after a chunk's edge, and others lie on both sides of it."""
    g = torch.Generator().manual_seed(shift)
    hot, rows = torch.full((5 * CHUNK + 3,), 4), torch.arange(5 * CHUNK + 3 + shift + 9)
    cols = torch.cat([torch.full((shift,), 2), hot, torch.full((9,), 7)])

    def op(values: Tensor, dense: Tensor) -> Tensor:
        return sparse_t_matmul_coo(rows.to(values.device), cols.to(values.device), values, dense, 10)

    check(op, [normal(g, len(rows)), normal(g, len(rows), 19)], device, dtype)


@places
def test_each_gradient_of_mse_has_the_precision_of_its_input(device: str, dtype: torch.dtype) -> None:
    g, half = torch.Generator().manual_seed(0), torch.bfloat16 if device == "cpu" else dtype
    for types in ((half, torch.float32), (torch.float32, half)):
        inputs = [normal(g, 9, 37).to(device, kind).requires_grad_() for kind in types]
        with kernels(device):
            found = torch.autograd.grad(mse(*inputs), inputs)
        exact = torch.autograd.grad(mse(*(exactly := [x.detach().double().requires_grad_() for x in inputs])), exactly)
        for mine, true, kind in zip(found, exact, types, strict=True):
            assert mine.dtype == kind
            torch.testing.assert_close(mine.double(), true, rtol=torch.finfo(kind).eps, atol=1e-7)


@places
@cases
def test_the_same_input_gives_the_same_bits(case: Callable[..., Case], device: str, dtype: torch.dtype) -> None:
    op, inputs = case(torch.Generator().manual_seed(1), 61, 7, 13, 67)
    inputs = [x.to(device, dtype) for x in inputs]
    with kernels(device):
        for first, second in zip(results(op, inputs), results(op, inputs), strict=True):
            assert torch.equal(first, second)


@places
def test_the_order_of_latents_within_a_row_does_not_change_the_weight_gradient(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.rand(90, 23, generator=g).argsort(dim=1)[:, :6]
    values, dense = normal(g, 90, 6).to(device, dtype), normal(g, 90, 21).to(device, dtype)
    order = torch.rand(90, 6, generator=g).argsort(dim=1)
    shuffled = values.gather(1, order.to(device)), ids.gather(1, order).to(device)
    with kernels(device):
        expected = sparse_t_matmul(values, ids.to(device), dense, 23)
        assert torch.equal(sparse_t_matmul(*shuffled, dense, 23), expected)


@places
@cases
def test_strides_do_not_matter(case: Callable[..., Case], device: str, dtype: torch.dtype) -> None:
    op, inputs = case(torch.Generator().manual_seed(3), 9, 3, 11, 37)
    inputs = [x.to(device, dtype) for x in inputs]
    transposed = [x.T.contiguous().T if x.ndim == 2 else x for x in inputs]
    padded = [torch.cat([x, x[:, :1]], dim=1)[:, :-1] if x.ndim == 2 else x for x in inputs]
    with kernels(device):
        expected = op(*inputs)
        assert torch.equal(op(*transposed), expected)
        assert torch.equal(op(*padded), expected)


@places
@cases
def test_gradients_of_a_sum_which_have_no_strides(case: Callable[..., Case], device: str, dtype: torch.dtype) -> None:
    op, inputs = case(torch.Generator().manual_seed(4), 9, 3, 11, 37)
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    with kernels(device):
        out = op(*inputs)
        if out.requires_grad:
            expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
            for found, expected in zip(expanded, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
                assert torch.equal(found, expected)


# numpy warns of inf * 0 in lanes that the interpreter then masks.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@places
@pytest.mark.parametrize("at", [0, 4], ids=["row0", "row4"])  # idle lanes could read row 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row_or_column(device: str, dtype: torch.dtype, bad: float, at: int) -> None:
    g = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(6, generator=g)[:3] + 6 * (row == at) for row in range(9)]).to(device)
    values, weight, x = (normal(g, *s).to(device, dtype) for s in ((9, 3), (12, 37), (9, 37)))
    wrong_values, wrong_x = values.clone(), x.clone()
    wrong_values[at, 1], wrong_x[at, 5] = bad, bad

    def gradient(x: Tensor) -> Tensor:
        recons = x.detach().requires_grad_()
        return torch.autograd.grad(mse(recons, torch.ones_like(x)), recons)[0]

    def per_row(values: Tensor, x: Tensor) -> list[Tensor]:
        return [decode(values, ids, weight), sampled_matmul(x, weight, ids), add_mul(x, x[:, :1], x), gradient(x)]

    with kernels(device):
        right, wrong = per_row(values, x), per_row(wrong_values, wrong_x)
        by_latent = sparse_t_matmul(values, ids, x, 12), sparse_t_matmul(values, ids, wrong_x, 12)
        by_column = column_sum(x), column_sum(wrong_x)
    others = torch.arange(9) != at
    for r, w in zip(right, wrong, strict=True):
        assert torch.equal(r[others], w[others])
        assert not w[at].isfinite().all()
    assert torch.equal(by_latent[0][:6], by_latent[1][:6])
    assert not by_latent[1][ids[at], 5].isfinite().any()
    columns = torch.arange(37) != 5
    assert torch.equal(by_column[0][columns], by_column[1][columns])
    assert not by_column[1][5].isfinite()


@places
@pytest.mark.parametrize("index", [-1, 11])
def test_an_unknown_latent_gives_nan_in_its_row_only(device: str, dtype: torch.dtype, index: int) -> None:
    g = torch.Generator().manual_seed(6)
    weight, x, values = (normal(g, *s).to(device, dtype) for s in ((11, 37), (3, 37), (3, 2)))
    ids = torch.tensor([[0, 1], [2, index], [3, 4]], device=device)
    with kernels(device):
        assert decode(values, ids, weight).isnan().all(dim=1).tolist() == [False, True, False]
        assert sampled_matmul(x, weight, ids).isnan().tolist() == [[False, False], [False, True], [False, False]]


@places
def test_fp32_values_of_a_half_precision_dictionary_are_not_rounded(device: str, dtype: torch.dtype) -> None:
    value = 1 + torch.finfo(torch.float32).eps
    half = torch.bfloat16 if device == "cpu" else dtype
    with kernels(device):
        big = torch.tensor([[2.0**8]], device=device, dtype=half)
        out = decode(
            torch.tensor([[value, -1.0]], device=device), torch.zeros(1, 2, dtype=torch.int64, device=device), big
        )
    assert out.dtype == half
    assert out.item() == 2.0**8 * torch.finfo(torch.float32).eps


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = (4, 3), (4, 3), (3,), (4, 1)
    a, b, row, column = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(mse, (a, b))
    assert torch.autograd.gradcheck(column_sum, (a,))
    for factors in ((b, row), (column, b), (row, column)):
        assert torch.autograd.gradcheck(add_mul, (a, *factors))


def test_what_they_compute() -> None:
    a, b, row = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((2, 2), 10.0), torch.tensor([1.0, -1.0])
    assert add_mul(a, b, row).tolist() == [[11.0, -8.0], [13.0, -6.0]]
    assert column_sum(torch.full((4097, 2), 1.0, dtype=torch.bfloat16)).tolist() == [4097.0, 4097.0]
    assert mse(a, torch.ones(2, 2)).item() == (0 + 1 + 4 + 9) / 4
    assert mse(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()


def test_disagreeing_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"received \(2, 3\) float32, \(2,\) float32 and \(2, 3\)"):
        add_mul(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"received \(2, 3\) int64"):
        column_sum(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"received \(2, 3\) float32 and \(2, 4\) float32"):
        mse(torch.zeros(2, 3), torch.zeros(2, 4))
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"received \(2,\) int64, \(2,\) int64, \(3,\) float32"):
        sparse_t_matmul_coo(ids, ids, torch.zeros(3), torch.zeros(4, 5), 6)
    with pytest.raises(ValueError, match=r"rows in \[0, 4\), received 4\.\.4"):
        sparse_t_matmul_coo(ids + 4, ids, torch.zeros(2), torch.zeros(4, 5), 6)
    with pytest.raises(ValueError, match=r"cols in \[0, 6\), received 6\.\.6"):
        sparse_t_matmul_coo(ids, ids + 6, torch.zeros(2), torch.zeros(4, 5), 6)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**31 // 64 + 7
    big = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    last = torch.arange(1.0, 65.0, device="cuda")
    big[-1] = last
    ids, values = torch.tensor([[rows - 1]], device="cuda"), torch.full((1, 1), 2.0, device="cuda")
    assert torch.equal(decode(values, ids, big)[0].float(), 2 * last)
    assert sampled_matmul(last[None].bfloat16(), big, ids).item() == pytest.approx((last**2).sum().item(), rel=2**-8)
    assert torch.equal(column_sum(big), last)
    assert torch.equal(weighted_sum(torch.full((rows,), 3.0, device="cuda"), big), 3 * last)
    one = torch.ones(1, 1, device="cuda", dtype=torch.bfloat16)
    summed = add_mul(big, one, one)
    assert torch.equal(summed[-1].float(), last + 1)
    del summed
    recons = torch.zeros_like(big).requires_grad_()
    mse(recons, big).mul(rows * 64).backward()
    assert recons.grad is not None
    assert torch.equal(recons.grad[-1].float(), -2 * last)
    del recons
    every = torch.arange(rows, device="cuda").unsqueeze(1) % 1000
    transposed = sparse_t_matmul(torch.ones(rows, 1, device="cuda"), every, big, 1000)
    assert torch.equal(transposed[(rows - 1) % 1000].float(), last)
    assert transposed.float().sum() == last.sum()
    wide = sparse_t_matmul(values, ids, last[None].bfloat16(), rows)
    assert torch.equal(wide[-1].float(), 2 * last)
    assert wide[: rows - 1].count_nonzero() == 0
    del wide
    long = decode(torch.ones(rows, 1, device="cuda"), every, last.bfloat16().expand(1000, 64))
    assert torch.equal(long[-1].float(), last)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_host_never_waits_for_the_device() -> None:
    ids = torch.randint(0, 40, (300, 4), device="cuda")
    values, x, weight = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((300, 4), (300, 64), (40, 64)))

    def step() -> Tensor:
        loss = mse(decode(values, ids, weight), x) + column_sum(add_mul(x, x[:, :1], x)).sum()
        loss.backward()
        return sparse_t_matmul_coo(ids[:, 0], ids[:, 1], values[:, 0], x, 40)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
