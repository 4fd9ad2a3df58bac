"""What holds of every op of the fused path: any strides, no rows, rows that are not finite, more than 2^31 elements."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.kernels import aux_error, columns, dispatch, encode, exact, reconstruct, topk
from sae.kernels import centre as centring

D, N, K = 19, 150, 6

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def indices(rows: int) -> Tensor:
    return torch.rand(rows, N, generator=torch.Generator().manual_seed(rows)).argsort(dim=1)[:, :K].int()


# By op: a function of operands with one row for each row of the result [B, ...], and those operands.
Rowwise = Callable[..., Any]
OPS: dict[str, tuple[Rowwise, Callable[[int], list[Tensor]]]] = {
    "topk": (lambda x: topk.topk(x, K), lambda rows: [drawn(rows, N)]),
    "encode_topk": (
        lambda x: encode.encode_topk(x, drawn(N, D).to(x), drawn(N).to(x), K),
        lambda rows: [drawn(rows, D)],
    ),
    "encode_dense_topk": (
        lambda x: (encode.encode_dense_topk(x, drawn(N, D).to(x), drawn(N).to(x), K),),
        lambda rows: [drawn(rows, D)],
    ),
    "encode_exact": (
        lambda x: exact.encode_exact(x, drawn(N, D).to(x), drawn(N).to(x), K),
        lambda rows: [drawn(rows, D)],
    ),
    "centre": (lambda x: centring.centre(x, drawn(D).to(x), 1e-5, x.dtype), lambda rows: [drawn(rows, D)]),
    "aux_error": (
        lambda recons, error: aux_error.aux_error(recons, error, drawn(D).to(error)),
        lambda rows: [drawn(rows, D), drawn(rows, D, seed=1)],
    ),
    "reconstruct": (
        lambda target, values, at: reconstruct.reconstruct(values.relu(), at, drawn(N, D).to(target), target),
        lambda rows: [drawn(rows, D), drawn(rows, K), indices(rows)],
    ),
    "reconstruct_given": (
        lambda target, values, at, recons: reconstruct.reconstruct(
            values.relu(), at, drawn(N, D).to(target), target, recons
        ),
        lambda rows: [drawn(rows, D), drawn(rows, K), indices(rows), drawn(rows, D, seed=1)],
    ),
    "partial": (
        lambda values, at: (reconstruct.partial(values, at, drawn(N, D).to(values)),),
        lambda rows: [drawn(rows, K), indices(rows)],
    ),
}
every_op = pytest.mark.parametrize("op", OPS)


def kernels(device: str) -> Any:
    return dispatch.interpreter() if device == "cpu" else nullcontext()


def run(op: str, operands: list[Tensor], device: str) -> list[Tensor]:
    with kernels(device):
        return [result.cpu() for result in OPS[op][0](*(x.to(device) for x in operands))]


@every_op
@on_devices
def test_strides_do_not_matter(op: str, device: str) -> None:
    operands = [x.to(device) for x in OPS[op][1](5)]
    expected = run(op, operands, device)
    transposed = [x.T.contiguous().T for x in operands]
    padded = [torch.cat([x, x[:, :1]], dim=1)[:, :-1] for x in operands]
    assert not any(x.is_contiguous() for x in transposed + padded)
    for strided in (transposed, padded):
        for mine, theirs in zip(run(op, strided, device), expected, strict=True):
            assert torch.equal(mine, theirs)


@every_op
@on_devices
def test_no_rows_and_one_row(op: str, device: str) -> None:
    nothing = run(op, OPS[op][1](0), device)
    assert all(len(result) == 0 for result in nothing)
    one = OPS[op][1](1)
    with kernels(device):
        found = OPS[op][0](*(x.to(device) for x in one))
    for mine, twin, none in zip(found, OPS[op][0](*one), nothing, strict=True):
        assert mine.shape == twin.shape == (1, *none.shape[1:])
        torch.testing.assert_close(mine.cpu(), twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3])  # idle lanes could read row 0
@every_op
@on_devices
@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_not_finite_stays_in_its_row_and_shows_there(op: str, device: str, at: int, bad: float) -> None:
    clean = OPS[op][1](6)
    dirty = [clean[0].clone(), *clean[1:]]
    dirty[0][at] = bad
    others = torch.arange(6) != at
    expected, found = run(op, clean, device), run(op, dirty, device)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[others], theirs[others])
    assert not all(result[at].isfinite().all() for result in found)


@on_devices
def test_k_of_512(device: str) -> None:
    x = drawn(2, 701)
    x[1] = x[1].round()  # ties at the cut
    with kernels(device):
        _, found = topk.topk(x.to(device), 512)
    assert torch.equal(found.cpu(), x.sort(dim=1, descending=True, stable=True).indices[:, :512])


@pytest.mark.parametrize("rows", [0, 1, 131])
@on_devices
def test_weighted_sum_of_any_strides(device: str, rows: int) -> None:
    weights, x = drawn(rows).to(device), drawn(131, rows).to(device).T
    with kernels(device):
        found = columns.weighted_sum(weights, x)
    # Sums of at most 131 products of order one in float32.
    torch.testing.assert_close(found.double(), weights.double() @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("index", [-1, N])
@on_devices
def test_an_unknown_latent_gives_nan_in_its_row_only(device: str, index: int) -> None:
    values, at, weight = drawn(3, K).abs().to(device), indices(3).to(device), drawn(N, D).to(device)
    recons, target = drawn(3, D).to(device), drawn(3, D, seed=1).to(device)
    at[1, 2] = index
    alone = torch.tensor([True, False, True])
    with kernels(device):
        parts = reconstruct.partial(values, at, weight)
        whole = reconstruct.reconstruct(values, at, weight, target)
        given = reconstruct.reconstruct(values, at, weight, target, recons)
    for result in (parts, *whole, given.value_grads):
        assert result[1].isnan().any()
        assert result[alone].isfinite().all()
    assert given.value_grads[1].isnan().tolist() == [False, False, True, False, False, False]
    assert given.error.isfinite().all()


@on_devices
def test_what_the_parts_of_an_op_cannot_take_is_refused(device: str) -> None:
    x, weight, bias = (t.to(device) for t in (drawn(4, D), drawn(N, D), drawn(N)))
    entries = drawn(4, N).to(device)
    with kernels(device):
        maxima = topk.group_maxima(entries)
    turned = entries.T.contiguous().T
    calls: dict[str, Callable[[], Any]] = {
        "group_maxima": lambda: topk.group_maxima(turned),
        "select": lambda: topk.select(turned, maxima, K, N),
        "keep_topk": lambda: topk.keep_topk(turned, maxima, K),
        "pre_activations": lambda: encode.pre_activations(x.T.contiguous().T, weight, bias),
    }
    for op, call in calls.items():
        with kernels(device), pytest.raises(ValueError, match=f"{op} expects contiguous"):
            call()
    with kernels(device), pytest.raises(ValueError, match="group maxima of x"):
        topk.select(entries, maxima[:, 1:].contiguous(), K, N)
    for k in (0, N + 1):
        with kernels(device), pytest.raises(ValueError, match=f"k={k} with n={N}"):
            topk.select(entries, maxima, k, N)
        with kernels(device), pytest.raises(ValueError, match=f"k={k} with n={N}"):
            topk.keep_topk(entries, maxima, k)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["centre", "aux_error", "reconstruct"])
def test_more_than_two_to_the_31_elements(op: str) -> None:
    """The last rows of a batch are what they are alone."""
    rows, d = 2**31 // 256 + 5, 256
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    x[-5:] = drawn(5, d).bfloat16()
    bias, weight = drawn(d).cuda(), drawn(N, d).bfloat16().cuda()
    at = indices(5).cuda()[torch.arange(rows, device="cuda") % 5]

    def results(part: slice) -> tuple[Tensor, ...]:
        if op == "centre":
            return centring.centre(x[part], bias, 1e-5, x.dtype)
        if op == "aux_error":
            return aux_error.aux_error(x[part], x[part], bias)
        return reconstruct.reconstruct(torch.ones(at[part].shape, device="cuda"), at[part], weight, x[part])

    assert x.numel() > 2**31
    for whole, alone in zip(results(slice(None)), results(slice(rows - 5, rows)), strict=True):
        assert torch.equal(whole[-5:], alone)
