"""The kernels of the training step against their twins in double precision, and against themselves."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import aux_error, columns, dispatch, encode, order, reconstruct, topk, tuning, update
from sae.kernels import centre as centring
from sae.kernels.launches import OPS

CPU = "cpu"
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(5, 17, 100, 5), (1, 7, 1, 1), (3, 33, 37, 37), (2, 8, 131, 1)]
LARGE = [(300, 768, 4099, 32), (257, 100, 1000, 512), (64, 1031, 5000, 64), (1, 4096, 8192, 64)]


def cases() -> list[Any]:
    """(device, dtype, B, d, n, k)."""
    on_gpu = [(dtype, *shape) for shape in SHAPES + LARGE for dtype in (torch.float32, torch.bfloat16)]
    return [
        *((CPU, torch.float32, *shape) for shape in SHAPES),
        *(pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in on_gpu),
    ]


def kernels(device: str) -> Any:
    return dispatch.interpreter() if device == CPU else nullcontext()


def drawn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_close(found: Tensor, exact: Tensor, eager: Tensor, rounded: torch.dtype = torch.float32) -> None:
    """Each entry's error is at most that of the same sums in torch, plus its rounding and that of sums in float32.

    The rounding of a sum goes by its terms, for which the largest entry of the row stands.
    """
    sums = 64 * torch.finfo(torch.float32).eps * exact.abs().amax(dim=-1, keepdim=True)
    limit = (eager.double() - exact).abs() + torch.finfo(rounded).eps / 2 * exact.abs() + sums + 1e-6
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25)
@given(
    rows=st.integers(0, 4),
    n=st.integers(1, 140),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    special=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_topk_is_a_stable_descending_sort(
    device: str, rows: int, n: int, levels: int, dtype: torch.dtype, special: bool, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randint(0, levels, (rows, n), generator=generator) - levels // 2) / 7).to(dtype)
    if special:
        x = x.where(torch.rand(rows, n, generator=generator) > 0.1, torch.inf)
        x = x.where(torch.rand(rows, n, generator=generator) > 0.1, -torch.inf)
        x = x.where(torch.rand(rows, n, generator=generator) > 0.1, -0.0)
    expected = x.sort(dim=1, descending=True, stable=True)
    with kernels(device):
        values, indices = topk.topk(x.to(device), k)
    assert torch.equal(indices.cpu(), expected.indices[:, :k])
    assert torch.equal(values.cpu(), expected.values[:, :k])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use", ["kernel", "twin"])
def test_topk_takes_nan_last_and_shows_it_where_nothing_else_is_left(device: str, use: str) -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0, 2.0], [4.0, 3.0, 2.0, 1.0]], device=device)
    with kernels(device) if use == "kernel" else nullcontext():
        _, indices = topk.topk(x, 3)
        everything, _ = topk.topk(x, 4)
    assert indices.tolist() == [[2, 3, 0], [0, 1, 2]]
    assert everything[0].isnan().tolist() == [False, False, False, True]
    assert torch.isfinite(everything[1]).all()


@pytest.mark.parametrize(("device", "dtype", "rows", "d", "n", "k"), cases())
def test_encode_selects_the_k_largest(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int) -> None:
    x, weight = drawn(rows, d, device=device, dtype=dtype), drawn(n, d, device=device, dtype=dtype, seed=1)
    bias = drawn(n, device=device, seed=2)
    with kernels(device):
        found = encode.encode_topk(x, weight, bias, k)
    exact = x.double() @ weight.double().T + bias.double()
    eager = torch.nn.functional.linear(x, weight, bias.to(dtype)).double()
    assert (found.indices[:, 1:] > found.indices[:, :-1]).all()
    assert found.indices.min() >= 0
    assert found.indices.max() < n
    at = found.indices.long()
    assert_close(found.values, exact.gather(1, at), eager.gather(1, at), dtype)
    # Whatever was left out is no larger than the least one taken, but for rounding.
    left = exact.scatter(1, at, -torch.inf).max(dim=1).values
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    slack = rounding * exact.abs().max(dim=1).values
    assert (left <= exact.gather(1, at).min(dim=1).values + 2 * slack).all()


@pytest.mark.parametrize(("device", "dtype", "rows", "d", "n", "k"), cases())
def test_dense_latents_are_those_selected(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int) -> None:
    x, weight = drawn(rows, d, device=device, dtype=dtype), drawn(n, d, device=device, dtype=dtype, seed=1)
    bias = drawn(n, device=device, seed=2)
    with kernels(device):
        selected = encode.encode_topk(x, weight, bias, k)
        dense = encode.encode_dense_topk(x, weight, bias, k)
    expected = torch.zeros(rows, n, device=device).scatter(1, selected.indices.long(), selected.values.relu())
    assert torch.equal(dense.float(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_rows_keep_exactly_k_and_the_smaller_latents(device: str) -> None:
    x, weight = torch.ones(4, 16, device=device), torch.ones(200, 16, device=device)
    with kernels(device):
        found = encode.encode_topk(x, weight, torch.zeros(200, device=device), 7)
    assert found.indices.tolist() == [list(range(7))] * 4


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maxima
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_is_not_finite_does_not_touch_the_others(device: str) -> None:
    x, weight = drawn(6, 16, device=device), drawn(70, 16, device=device, seed=1)
    bias = torch.zeros(70, device=device)
    bad = x.clone()
    bad[2, 3], bad[4, 0] = float("nan"), float("inf")
    with kernels(device):
        clean, found = encode.encode_topk(x, weight, bias, 5), encode.encode_topk(bad, weight, bias, 5)
    with kernels(device):
        dense = encode.encode_dense_topk(bad, weight, bias, 5)
    assert dense[2].isnan().sum() == 5
    others = [0, 1, 3, 5]
    assert torch.isfinite(dense[others]).all()
    assert found.values[2].isnan().all()
    assert torch.equal(found.values[others], clean.values[others])
    assert torch.equal(found.indices[others], clean.indices[others])


@pytest.mark.parametrize(("device", "dtype", "rows", "d", "n", "k"), cases())
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_centre(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int, eps: float | None) -> None:
    x, bias = drawn(rows, d, device=device, dtype=dtype), drawn(d, device=device, seed=1)
    exact = centring.centre(x.double(), bias.double(), eps, torch.float64)
    eager = centring._centre_torch(x, bias, eps, dtype)
    with kernels(device):
        found = centring.centre(x, bias, eps, dtype)
    for name in found._fields:
        mine = getattr(found, name)
        assert_close(mine, getattr(exact, name), getattr(eager, name), mine.dtype)


@pytest.mark.parametrize(("device", "dtype", "rows", "d", "n", "k"), cases())
def test_aux_error(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int) -> None:
    recons, error = drawn(rows, d, device=device, dtype=dtype), drawn(rows, d, device=device, dtype=dtype, seed=1)
    bias = drawn(d, device=device, seed=2)
    exact = aux_error._aux_error_torch(recons.double(), error.double(), bias.double())
    eager = aux_error._aux_error_torch(recons, error, bias)
    with kernels(device):
        found = aux_error.aux_error(recons, error, bias)
        nothing_left = aux_error.aux_error(recons, torch.zeros_like(error), torch.zeros_like(bias))
    for mine, true, plain in zip(found, exact, eager, strict=True):
        assert_close(mine, true, plain, mine.dtype)
    assert not any(result.any() for result in nothing_left)


@pytest.mark.parametrize(("device", "dtype", "rows", "d", "n", "k"), cases())
def test_reconstruct(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int) -> None:
    values = drawn(rows, k, device=device).relu()
    indices = torch.randint(0, n, (rows, k), generator=torch.Generator().manual_seed(3)).to(device, torch.int32)
    weight, target = drawn(n, d, device=device, dtype=dtype), drawn(rows, d, device=device, dtype=dtype, seed=1)
    exact = reconstruct._reconstruct_torch(values.double(), indices, weight.double(), target.double(), None)
    eager = reconstruct._reconstruct_torch(values, indices, weight, target, None)
    with kernels(device):
        found = reconstruct.reconstruct(values, indices, weight, target)
    for name in found._fields:
        mine = getattr(found, name)
        assert_close(mine, getattr(exact, name), getattr(eager, name), mine.dtype)
    assert (found.value_grads[values == 0] == 0).all()


def parameter(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> update.Parameter:
    weight, exp_avg, average = (drawn(*shape, device=device, seed=seed + i) for i in range(3))
    shadow = weight.to(dtype) if dtype != torch.float32 else None
    # A step divides by its root: near zero, what rounding does to a gradient would be seen many times over.
    exp_avg_sq = drawn(*shape, device=device, seed=seed + 5).square() + 1e-2
    return update.Parameter(weight, exp_avg * 0.1, exp_avg_sq, average, shadow)


def fresh(latents: update.Latents) -> update.Latents:
    every = slice(0, len(latents.bias.weight))
    return update.Latents(*(copy.deepcopy(parameter.rows(every)) for parameter in latents))


def copied(latents: update.Latents, dtype: torch.dtype) -> update.Latents:
    return update.Latents(*(update.Parameter(*(t.to(dtype).clone() for t in p[:4] if t is not None)) for p in latents))


def gradient_of(device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int, hot: bool, dead: bool) -> Any:
    indices = drawn(rows, n, device=device, seed=7).argsort(dim=1)[:, :k]
    if hot:
        indices[:, 0] = n // 2
    extra = None
    if dead:
        place = torch.full((n,), -1, dtype=torch.int32, device=device)
        place[: n // 2 + 1] = torch.arange(n // 2 + 1, device=device, dtype=torch.int32).flip(0)
        m = n // 2 + 1
        extra = update.DeadGradients(
            place, drawn(m, d, device=device), drawn(m, device=device), drawn(m, d, device=device, seed=4)
        )
    index = order.latent_index(indices, n)
    values, grads = drawn(rows, k, device=device).relu(), drawn(rows, k, device=device, seed=3)
    error, centred = drawn(rows, d, device=device, dtype=dtype), drawn(rows, d, device=device, dtype=dtype, seed=6)
    return update.SparseGradient(index, values, grads, error, centred, 0.37, extra)


def widened(of: update.SparseGradient) -> update.SparseGradient:
    dead = of.dead and update.DeadGradients(of.dead.place, *(t.double() for t in of.dead[1:]))
    return update.SparseGradient(
        of.index, of.values.double(), of.grads.double(), of.error.double(), of.centred.double(), of.scale, dead
    )


UPDATES = [(CPU, torch.float32, 40, 17, 23, 3), (CPU, torch.float32, 150, 9, 5, 2), (CPU, torch.float32, 1, 5, 7, 1)]
UPDATES_GPU = [
    ("cuda", dtype, *shape)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in [(40, 17, 23, 3), (3000, 768, 500, 16), (2000, 1031, 3000, 8), (500, 4096, 300, 4), (90, 64, 700, 512)]
]
# On both sides of where the index goes over from 16 to 32 bits.
UPDATES_GPU += [("cuda", torch.bfloat16, 200, 17, n, 8) for n in (2**15 - 1, 2**15, 40_000)]


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "d", "n", "k"),
    [*UPDATES, *(pytest.param(*case, marks=pytest.mark.gpu) for case in UPDATES_GPU)],
)
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_update_in_one_pass_and_in_two(
    device: str, dtype: torch.dtype, rows: int, d: int, n: int, k: int, hot: bool, dead: bool
) -> None:
    rows_of = update.Latents(
        parameter((n, d), device, dtype, 0),
        parameter((n,), device, torch.float32, 10),
        parameter((n, d), device, dtype, 20),
    )
    update.normalise_rows_(rows_of.decoder.weight)
    of = gradient_of(device, dtype, rows, d, n, k, hot, dead)
    scalars = torch.tensor([1e-2, 1.3, 1.0], device=device)
    exact = copied(rows_of, torch.float64)
    squares = update.update(exact, widened(of), update.Hyper(scalars.double(), 0.1))
    results = []
    for _ in range(2):
        one = fresh(rows_of)
        with kernels(device):
            found = update.update(one, of, update.Hyper(scalars, 0.1))
        results.append((one, found))
    torch.testing.assert_close(found.double(), squares, rtol=1e-4, atol=1e-6)
    for mine, true in zip(one, exact, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq", "average"):
            torch.testing.assert_close(getattr(mine, name).double(), getattr(true, name), rtol=1e-4, atol=1e-4)
        if mine.shadow is not None:
            assert torch.equal(mine.shadow, mine.weight.to(dtype))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
    with kernels(device):
        parts = [update.gradients(of, slice(0, n // 3)), update.gradients(of, slice(n // 3, n))]
        grads = update.Gradients(*(torch.cat(of_part) for of_part in zip(*parts, strict=True)))
        given, again = fresh(rows_of), fresh(rows_of)
        squares_of_given = update.update(
            given, update.Gradients(*(g.clone() for g in grads)), update.Hyper(scalars, 0.1)
        )
        squares_in_steps = update.project(again, grads)
        update.apply_gradients(again, grads, update.Hyper(scalars, 0.1))
    for other, its_squares in ((given, squares_of_given), (again, squares_in_steps)):
        torch.testing.assert_close(its_squares, found, rtol=1e-5, atol=1e-6)
        for first, second in zip(one, other, strict=True):
            # A gradient that all but cancels is rounded otherwise by each, and Adam divides it by its own size.
            torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=3e-5)


def test_the_twin_adds_up_gradients_of_bfloat16_in_float32() -> None:
    of, every = gradient_of(CPU, torch.bfloat16, 40, 17, 23, 3, hot=True, dead=False), slice(0, 23)
    found = update.gradients(of, every)
    expected = update.gradients(replace(of, error=of.error.float(), centred=of.centred.float()), every)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20)
@given(
    rows=st.integers(0, 9),
    k=st.integers(1, 5),
    n=st.sampled_from([1, 7, 2**15 - 1, 2**15, 2**16 + 1]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_index_orders_entries_by_latent_and_row(
    device: str, rows: int, k: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, n + 1, (rows, k), generator=generator).to(device, dtype)
    indices[:, :1] = n - 1  # often, and the largest
    found = order.latent_index(indices, n)
    entries = sorted((latent, number) for number, latent in enumerate(indices.flatten().tolist()))
    assert list(zip(found.latents.tolist(), found.entries.tolist(), strict=True)) == entries
    at = torch.tensor([latent for latent, _ in entries], dtype=torch.int64)
    assert torch.equal(found.starts.cpu(), torch.searchsorted(at, torch.arange(n + 1)))


@pytest.mark.parametrize("device", DEVICES)
def test_an_index_of_more_latents_than_16_bits_count_is_read_alike(device: str) -> None:
    of = gradient_of(device, torch.float32, 150, 9, 5, 2, hot=True, dead=True)
    wide = replace(of, index=of.index._replace(latents=of.index.latents.int()))
    assert of.index.latents.dtype == torch.int16
    with kernels(device):
        for mine, other in zip(update.gradients(wide, slice(0, 5)), update.gradients(of, slice(0, 5)), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use", ["kernel", "twin"])
def test_512_latents_of_a_row_get_their_gradients(device: str, use: str) -> None:
    of = gradient_of(device, torch.float32, 3, 5, 515, 512, hot=False, dead=False)
    indices = torch.zeros(3 * 512, dtype=torch.int64, device=device)
    indices[of.index.entries] = of.index.latents.long()

    def dense(entries: Tensor) -> Tensor:
        matrix = torch.zeros(3, 515, dtype=torch.float64, device=device)
        matrix.scatter_add_(1, indices.view(3, 512), entries.double() * of.scale)
        return matrix

    with kernels(device) if use == "kernel" else nullcontext():
        found = update.gradients(of, slice(0, 515))
    exact = (
        dense(of.grads).T @ of.centred.double(),
        dense(of.grads).sum(dim=0),
        dense(of.values).T @ of.error.double(),
    )
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["values", "grads", "error", "centred"])
def test_gradients_that_are_not_finite_show_in_the_latents_of_their_row_alone(
    device: str, bad: float, name: str
) -> None:
    n, k, row = 30, 2, 100
    of = gradient_of(device, torch.float32, 150, 9, n, k, hot=False, dead=False)
    wrong = getattr(of, name).clone()
    wrong[row] = bad
    dirty = replace(of, **{name: wrong})
    concerned = of.index.latents[of.index.entries // k == row].long()
    others = torch.ones(n, dtype=torch.bool, device=device).index_fill_(0, concerned, False)
    latents = update.Latents(*(parameter(shape, device, torch.float32, 0) for shape in ((n, 9), (n,), (n, 9))))
    results = []
    with kernels(device):
        for given in (of, dirty):
            moved = fresh(latents)
            squares = update.update(moved, given, update.Hyper(torch.ones(3, device=device)))
            results.append((squares, *(p.weight for p in moved), *update.gradients(given, slice(0, n))))
    for clean, found in zip(*results, strict=True):
        assert torch.equal(found[others], clean[others])
    squares, encoder, _, decoder, *_ = results[1]
    assert not squares[concerned].isfinite().any()
    moved_by_it = decoder if name in ("values", "error") else encoder
    assert not moved_by_it[concerned].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_entries_of_no_latent_count_for_nothing(device: str) -> None:
    n, k = 9, 4
    full = gradient_of(device, torch.float32, 200, 5, n, k, hot=True, dead=False)
    indices = torch.empty(200 * k, dtype=torch.int64, device=device)
    indices[full.index.entries] = full.index.latents.long()
    absent = (torch.arange(200 * k, device=device) % 3 == 0).view(200, k)
    silent = replace(full, values=full.values.masked_fill(absent, 0), grads=full.grads.masked_fill(absent, 0))
    left_out = replace(full, index=order.latent_index(indices.view(200, k).masked_fill(absent, n), n))
    with kernels(device):
        found, expected = (update.gradients(of, slice(0, n)) for of in (left_out, silent))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_partial_reconstructions_add_up_to_the_whole(device: str) -> None:
    values, weight = drawn(7, 6, device=device).relu(), drawn(30, 13, device=device, seed=1)
    indices, target = torch.arange(42, device=device).view(7, 6) % 30, drawn(7, 13, device=device, seed=2)
    with kernels(device):
        whole = reconstruct.reconstruct(values, indices, weight, target)
        recons = reconstruct.partial(values[:, :2], indices[:, :2], weight)
        recons += reconstruct.partial(values[:, 2:], indices[:, 2:], weight)
        again = reconstruct.reconstruct(values, indices, weight, target, recons)
    for name in whole._fields:
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layout_that_the_update_cannot_take_is_refused(device: str) -> None:
    rows = [parameter(shape, device, torch.float32, 0) for shape in ((6, 4), (6,), (6, 4))]
    turned = rows[2]._replace(weight=rows[2].weight.T.contiguous().T)
    of = gradient_of(device, torch.float32, 5, 4, 6, 2, hot=False, dead=False)
    with pytest.raises(ValueError, match="contiguous"):
        update.update(update.Latents(rows[0], rows[1], turned), of, update.Hyper(torch.ones(3, device=device)))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_layout_that_the_update_cannot_take_are_refused(device: str) -> None:
    n, d = 6, 4
    rows = [parameter(shape, device, torch.float32, 0) for shape in ((n, d), (n,), (n, d))]
    latents, hyper = update.Latents(*rows), update.Hyper(torch.ones(3, device=device))
    of = gradient_of(device, torch.float32, 5, d, n, 2, hot=False, dead=True)
    dead = of.dead._replace(encoder=of.dead.encoder.T.contiguous().T)
    given = update.Gradients(*(drawn(*shape, device=device) for shape in ((n, d), (n,), (n, d))))
    turned = given._replace(decoder=given.decoder.T.contiguous().T)
    calls: list[Callable[[], Any]] = [
        lambda: update.update(latents, turned, hyper),
        lambda: update.project(latents, turned),
        lambda: update.apply_gradients(latents, turned, hyper),
        lambda: update.update(latents, replace(of, dead=dead), hyper),
        lambda: update.gradients(replace(of, dead=dead), slice(0, n)),
        lambda: update.gradients(replace(of, error=of.error.T.contiguous().T), slice(0, n)),
    ]
    before = fresh(latents)
    for call in calls:
        with kernels(device), pytest.raises(ValueError, match="update expects contiguous"):
            call()
    with kernels(device), pytest.raises(ValueError, match=r"received \(6, 4\) float32, \(6, 3\) float32"):
        update.project(latents, given._replace(encoder=given.encoder[:, 1:].contiguous()))
    with kernels(device), pytest.raises(ValueError, match=r"latents within 0\.\.6"):
        update.gradients(of, slice(0, n + 1))
    for mine, theirs in zip(latents, before, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("device", DEVICES)
def test_topk_of_large_integers(device: str) -> None:
    x = torch.tensor([[2**24, 2**24 + 1]], device=device)
    assert topk.topk(x, 1)[1].tolist() == [[1]]


@pytest.mark.parametrize("device", DEVICES)
def test_weighted_sum(device: str) -> None:
    x, weights = drawn(70, 33, device=device), drawn(70, device=device, seed=1)
    with kernels(device):
        found = columns.weighted_sum(weights, x)
    assert_close(found, weights.double() @ x.double(), weights @ x)


@pytest.mark.gpu
def test_pre_activations_of_more_than_two_to_the_31_elements() -> None:
    rows, n = 40_000, 65_536
    x, weight = drawn(rows, 16, device="cuda", dtype=torch.bfloat16), drawn(n, 16, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(n, device="cuda")
    pre, maxima = encode.pre_activations(x, weight, bias)
    assert pre.numel() > 2**31
    found = topk.select(pre, maxima, 8, n)
    last = slice(rows - 100, rows)
    expected = encode.encode_topk(x[last], weight, bias, 8)
    assert torch.equal(found.indices[last], expected.indices)
    assert torch.equal(found.values[last], expected.values)
    assert torch.equal(topk.keep_topk(pre, maxima, 8)[last], encode.encode_dense_topk(x[last], weight, bias, 8))


@pytest.mark.gpu
def test_updates_of_more_than_two_to_the_31_elements() -> None:
    """The last latents, and the latents of the last rows, fare as they do alone."""
    d, few, rows = 1024, 5, 100
    n = 2**31 // d + few
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of memory")
    values, grads = drawn(rows, 2, device="cuda").relu(), drawn(rows, 2, device="cuda", seed=1)
    error, centred = (drawn(rows, d, device="cuda", dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    indices = torch.arange(2 * rows, device="cuda").view(rows, 2) % few

    def moved(n: int) -> list[Tensor]:
        latents = update.Latents(
            *(
                update.Parameter(*(torch.zeros(*size, device="cuda") for _ in range(3)))
                for size in ((n, d), (n,), (n, d))
            )
        )
        for part in latents:
            part.weight[-few:] = drawn(*part.weight[-few:].shape, device="cuda")
        index = order.latent_index(indices + n - few, n)
        of = update.SparseGradient(index, values, grads, error, centred, 0.3)
        squares = update.update(latents, of, update.Hyper(torch.ones(3, device="cuda")))
        return [squares[-few:], *(t[-few:].clone() for p in latents for t in p if t is not None)]

    def summed(batch: int) -> update.Gradients:
        def last(part: Tensor, others: int) -> Tensor:
            whole = torch.full((batch, part.shape[1]), others, dtype=part.dtype, device="cuda")
            whole[-rows:] = part
            return whole

        index = order.latent_index(last(indices, few), few)
        of = update.SparseGradient(index, last(values, 0), last(grads, 0), last(error, 0), last(centred, 0), 0.3)
        return update.gradients(of, slice(0, few))

    with tuning.forced("update", OPS["update"].default):
        pairs = [*zip(moved(n), moved(few), strict=True), *zip(summed(2**31 // d + rows), summed(rows), strict=True)]
    for large, alone in pairs:
        assert torch.equal(large, alone)
