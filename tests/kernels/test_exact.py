"""Selection by a product in bfloat16 must be the selection in float32, whatever the numbers are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import dispatch, exact, topk
from sae.kernels.sampled import sampled_matmul

CPU = "cpu"
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
SHAPES = [(5, 17, 300, 5), (1, 7, 1, 1), (3, 33, 37, 37), (2, 8, 131, 1), (0, 8, 70, 3)]
LARGE = [(300, 768, 4099, 32), (65, 100, 3000, 512), (64, 1031, 5000, 64), (1, 4096, 8192, 64)]


def kernels(device: str) -> Any:
    return dispatch.interpreter() if device == CPU else nullcontext()


def drawn(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def problem(rows: int, d: int, n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = drawn(rows, d, seed=1, device=device), drawn(n, d, seed=2, device=device) / d**0.5
    return x, weight, drawn(n, seed=3, device=device) / 10


def check(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> topk.Selected:
    """The selection, equal to that of float64 but for latents within float32's rounding of the k-th value."""
    with kernels(x.device.type):
        found = exact.encode_exact(x, weight, bias, k)
    true = x.double() @ weight.double().T + bias.double()
    at = found.indices.long()
    assert (at[:, 1:] > at[:, :-1]).all()
    slack = 1e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + bias.double().abs() + 1e-30)
    assert ((found.values - true.gather(1, at)).abs() <= slack.gather(1, at)).all()
    kth = true.sort(dim=1, descending=True).values[:, k - 1 : k]
    chosen = torch.zeros_like(true, dtype=torch.bool).scatter_(1, at, True)
    assert chosen[true > kth + 2 * slack].all()
    assert not chosen[true < kth - 2 * slack].any()
    return found


@pytest.mark.parametrize(
    ("device", "rows", "d", "n", "k"),
    [*((CPU, *shape) for shape in SHAPES), *(pytest.param("cuda", *s, marks=pytest.mark.gpu) for s in SHAPES + LARGE)],
)
def test_it_is_the_selection_in_float32(device: str, rows: int, d: int, n: int, k: int) -> None:
    check(*problem(rows, d, n, device), k)


@on_devices
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 2.0**-20, 2.0**-12, 2.0**-8, 1.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    hot=st.sampled_from([1.0, 1e4]),
    k=st.integers(1, 12),
)
def test_latents_that_bfloat16_cannot_tell_apart(
    device: str, seed: int, spread: float, scale: float, hot: float, k: int
) -> None:
    """Many near ties around the cut, on both sides of it, and a feature that dwarfs the others."""
    x = drawn(3, 24, seed=seed, device=device)
    x[:, 0] *= hot
    base = drawn(1, 24, seed=seed + 1, device=device)
    weight = base + spread * drawn(150, 24, seed=seed + 2, device=device)
    check(x, scale * weight, torch.zeros(150, device=device), k)


@on_devices
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5])
def test_a_row_is_selected_as_if_it_were_alone(device: str, spread: float) -> None:
    """Latents that a product in float32 can't tell apart either: its last bits depend on the number of rows."""
    x = drawn(4, 64, seed=1, device=device)
    weight = drawn(1, 64, seed=2, device=device) + spread * drawn(60, 64, seed=3, device=device)
    bias = torch.zeros(60, device=device)
    with kernels(device):
        together = exact.encode_exact(x, weight, bias, 5)
        for row in (0, 3):
            alone = exact.encode_exact(x[row : row + 1], weight, bias, 5)
            assert torch.equal(alone.indices[0], together.indices[row])
            assert torch.equal(alone.values[0], together.values[row])
        scores = sampled_matmul(x, weight, torch.arange(60, device=device).expand(4, -1))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :5].sort(dim=1).values
    assert torch.equal(together.indices.long(), best)


@on_devices
def test_the_best_may_look_like_hundreds_of_others_in_bfloat16(device: str) -> None:
    """All latents round to the same, by differences of the same norm: the best are known in float32 alone."""
    n, d, k = 400, 16, 3
    signs = drawn(n, d, seed=0, device=device).sign()
    signs[:, 0] = -1
    signs[-k:] = 1
    weight = 1 + 2.0**-10 * signs  # within half a unit of bfloat16's last place
    found = check(torch.ones(2, d, device=device), weight, torch.zeros(n, device=device), k)
    assert found.indices.tolist() == [[n - 3, n - 2, n - 1]] * 2


@on_devices
def test_equal_latents_go_by_number(device: str) -> None:
    x, weight = torch.full((3, 16), 1 / 3, device=device), torch.full((200, 16), 0.7, device=device)
    found = check(x, weight, torch.zeros(200, device=device), 7)
    assert found.indices.tolist() == [list(range(7))] * 3


@on_devices
def test_ordinary_rows_are_proven_without_a_product_in_float32(device: str) -> None:
    x, weight, bias = problem(10, 64, 1024, device)
    with kernels(device):
        found, sure = exact._encode_proven(x, weight, bias, 16, exact.round_encoder(weight))
        again = exact._encode_in_float32(x, weight, bias, 16)
    assert sure.float().mean() >= 0.9
    assert torch.equal(found.indices[sure], again.indices[sure])
    assert torch.equal(found.values[sure], again.values[sure])


@on_devices
def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    x, weight, bias = problem(12, 16, 300, device)
    weight[100:] = weight[100]  # rows that cannot be proven, for ties
    with kernels(device):
        rounded = exact.round_encoder(weight)
        whole = exact.encode_exact(x, weight, bias, 5, rounded)
        for row in range(12):
            alone = exact.encode_exact(x[row : row + 1], weight, bias, 5)
            assert torch.equal(alone.values[0], whole.values[row])
            assert torch.equal(alone.indices[0], whole.indices[row])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maxima
@pytest.mark.filterwarnings("ignore:invalid value")
@on_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_as_in_float32(device: str, bad: float) -> None:
    x, weight, bias = problem(6, 16, 300, device)
    x[2, 3], x[4] = bad, bad
    expected = exact._encode_exact_torch(x, weight, bias, 5)
    with kernels(device):
        found = exact.encode_exact(x, weight, bias, 5)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6, equal_nan=True)


@on_devices
def test_the_bounds_are_bounds(device: str) -> None:
    x, weight, _ = problem(40, 131, 257, device)
    with kernels(device):
        bounds = exact._round_rows(x).double() @ exact.round_encoder(weight).double().T
    true = x.double() @ weight.double().T
    assert (bounds >= true).all()
    assert (bounds - true <= 2.0**-6 * x.norm(dim=1, keepdim=True) * weight.norm(dim=1)).all()


def test_other_types_are_computed_in_their_own() -> None:
    x, weight, bias = (t.double() for t in problem(4, 16, 50, CPU))
    with kernels(CPU):
        found = exact.encode_exact(x, weight, bias, 5)
    values, indices = topk.topk(x @ weight.T + bias, 5)
    assert found.values.dtype == torch.float64
    assert torch.equal(found.indices, indices.sort(dim=1).values.int())
    torch.testing.assert_close(found.values.sum(), values.sum())


def test_disagreeing_arguments_are_named() -> None:
    x, weight, bias = problem(4, 16, 50, CPU)
    with pytest.raises(ValueError, match="k=51"):
        exact.encode_exact(x, weight, bias, 51)
    with pytest.raises(ValueError, match=r"\(4, 15\) float32, \(50, 16\) float32 and"):
        exact.encode_exact(x[:, 1:], weight, bias, 5)
    with pytest.raises(ValueError, match=r"weight \[n, d\] float, .* received \(4, 16\) float32, \(50,\) float32 and"):
        exact.encode_exact(x, bias, bias, 5)
    with pytest.raises(ValueError, match=r"of one type, received \(4, 16\) float64, \(50, 16\) float32 and"):
        exact.encode_exact(x.double(), weight, bias, 5)
    with pytest.raises(ValueError, match=r"rounded \[50, 24\], received \(50, 16\)"):
        exact.encode_exact(x, weight, bias, 5, weight)


@pytest.mark.gpu
def test_memory_is_that_of_a_product_in_bfloat16() -> None:
    x, weight, bias = problem(4096, 256, 32768, "cuda")
    rounded = exact.round_encoder(weight)
    exact.encode_exact(x, weight, bias, 32, rounded)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    exact.encode_exact(x, weight, bias, 32, rounded)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2 * 4096 * 32768
