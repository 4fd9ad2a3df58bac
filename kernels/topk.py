"""Exact row-wise top-k with a fixed order among equal values.

Shapes: B rows, n columns, k selected, G groups of 32 neighbouring columns.

The k largest entries of a row lie in the k groups with the largest maxima: were one of them in another group, k
groups would each hold an entry that comes before it. So a row is searched through its maxima, and then only in
k groups. Groups of neighbouring columns keep this true of ties, of which the smaller column comes first.

NaN counts as -infinity: it is selected only where nothing else is left, and so shows in the values.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels import tuning
from sae.kernels._arguments import expect, expect_contiguous, expect_k, received
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.launches import Settings

GROUP = 32
"""Columns that share one maximum."""


class Selected(NamedTuple):
    """The k largest entries of each row, by ascending column: values [B, k] float32 and columns [B, k] int32."""

    values: Tensor
    indices: Tensor


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row: values [B, k], descending, and indices [B, k] int64.

    Of equal values the smaller index wins and comes first, so the result equals the first k columns
    of a stable descending sort. NaN counts as -infinity. Values are differentiable with respect to x.

    Raises ValueError when x is not a matrix or k is not between 1 and n.

    Source: the TopK activation of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3; the k-th
    value is found by radix selection, as in Alabi et al. 2012, "Fast k-selection algorithms for graphics processing
    units".
    """
    expect("topk", "x [B, n]", x)
    expect_k("topk", k, x.shape[1])
    kernel = use_triton(x) and x.is_floating_point()
    indices = (_topk_triton if kernel else _topk_torch)(x.detach(), k)
    return x.gather(1, indices), indices


def _topk_triton(x: Tensor, k: int) -> Tensor:
    x = x.contiguous()
    values, columns = select(x, group_maxima(x), k, x.shape[1])
    order = values.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return columns.to(torch.int64).gather(1, order)


def _topk_torch(x: Tensor, k: int) -> Tensor:
    if x.is_floating_point():
        x = torch.where(x.isnan(), -torch.inf, x)
    # One candidate more than asked for shows whether the k-th value is tied with a loser.
    values, indices = torch.topk(x, min(k + 1, x.shape[1]), dim=1)
    equal = values[:, 1:] == values[:, :-1]
    tied_with_loser = equal[:, k - 1 :].any(dim=1).nonzero().squeeze(1)
    tied = equal.any(dim=1).nonzero().squeeze(1)
    indices = indices[:, :k]
    if tied_with_loser.numel():
        kth = values[tied_with_loser, k - 1 : k]
        indices[tied_with_loser] = _smallest_winners(x[tied_with_loser], kth, k)
    if tied.numel():
        indices[tied] = _ordered(x, tied, indices[tied])
    return indices.contiguous()


def _smallest_winners(x: Tensor, kth: Tensor, k: int) -> Tensor:
    """Select everything above the k-th value [r, 1], then the smallest ids that equal it: [r, k]."""
    above = x > kth
    at = x == kth
    places = k - above.sum(dim=1, keepdim=True)
    winners = above | (at & (at.cumsum(dim=1) <= places))
    return winners.nonzero()[:, 1].view(-1, k)


def _ordered(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """Sort each row's winners by descending value, equal values by id."""
    ids = indices.sort(dim=1).values
    order = x[rows.unsqueeze(1), ids].sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


def group_maxima(x: Tensor) -> Tensor:
    """Maxima of each 32 neighbouring columns of contiguous x [B, n], as [B, ceil(n / 32)] in x's type.

    Raises ValueError when x is not a contiguous matrix of floats.
    """
    expect("group_maxima", "x [B, n] float", x)
    expect_contiguous("group_maxima", "x", x)
    rows, n = x.shape
    maxima = torch.empty(rows, triton.cdiv(n, GROUP), dtype=x.dtype, device=x.device)
    if rows:
        groups = min(256, triton.next_power_of_2(maxima.shape[1]))
        grid = (rows, triton.cdiv(maxima.shape[1], groups))
        _group_maxima_kernel[grid](x, maxima, n, maxima.shape[1], GROUP, groups, num_warps=4)
    return maxima


def select(x: Tensor, maxima: Tensor, k: int, n: int) -> Selected:
    """The k largest of the first n columns of x [B, >= n], given its `group_maxima`.

    Columns from n on must hold -infinity, or not exist.

    Raises ValueError when x or its maxima are not contiguous, the maxima are not those of x, or k is not between 1 and
    n.
    """
    _check("select", x, maxima, k, n)
    return _select(x, maxima, k, _settings(x, maxima, k))


def _select(x: Tensor, maxima: Tensor, k: int, settings: Settings) -> Selected:
    (rows, width), n_groups = x.shape, maxima.shape[1]
    values = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    columns = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    if rows:
        kept = min(k, n_groups)
        # Chosen groups pass through memory, as Triton has no scatter between the threads of a program.
        chosen = torch.empty(rows, kept, dtype=torch.int32, device=x.device)
        _select_kernel[(rows,)](
            x, maxima, chosen, values, columns, width, n_groups, k, kept, GROUP,
            triton.next_power_of_2(n_groups), triton.next_power_of_2(kept), _bits(x), **settings,
        )  # fmt: skip
    return Selected(values, columns)


def keep_topk(x: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Zero x [B, n] but for the positive (or NaN) ones of each row's k largest, given its `group_maxima`; in place.

    Raises ValueError as `select` does.
    """
    _check("keep_topk", x, maxima, k, x.shape[1])
    (rows, width), n_groups = x.shape, maxima.shape[1]
    if rows:
        kept = min(k, n_groups)
        chosen = torch.empty(rows, kept, dtype=torch.int32, device=x.device)
        _keep_kernel[(rows,)](
            x, maxima, chosen, width, n_groups, k, kept, GROUP, triton.next_power_of_2(n_groups),
            triton.next_power_of_2(kept), _bits(x), 1024, **_settings(x, maxima, k),
        )  # fmt: skip
    return x


def _check(op: str, x: Tensor, maxima: Tensor, k: int, n: int) -> None:
    expect(op, "x [B, n] float, maxima [B, G] float", x, maxima)
    expect_contiguous(op, "x and maxima", x, maxima)
    if maxima.shape[1] != triton.cdiv(x.shape[1], GROUP) or maxima.dtype != x.dtype:
        raise ValueError(f"{op} expects the group maxima of x, received {received(x, maxima)}")
    expect_k(op, k, min(n, x.shape[1]))


def _bits(x: Tensor) -> int:
    return 16 if x.dtype == torch.bfloat16 else 32


def _settings(x: Tensor, maxima: Tensor, k: int) -> Settings:
    # Measured by selecting alone, which leaves x as it is.
    op = select_op(maxima.shape[1], min(k, maxima.shape[1]))
    return tuning.settings(op, x, (_bits(x),), lambda settings: _select(x, maxima, k, settings))


def select_op(n_groups: int, kept: int) -> str:
    """The class of sizes that one number of warps serves: they hold all maxima, then all entries of the groups."""
    if kept > 256:
        return "select_most"
    return "select" if n_groups > 2048 or kept > 32 else "select_few"


@triton.jit
def _group_maxima_kernel(x_ptr, max_ptr, n, n_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * n + column, mask=column < n, other=-float("inf"))
    tl.store(max_ptr + row * n_groups + group, tl.max(x.to(tl.float32), axis=1).to(x.dtype), mask=group < n_groups)


@triton.jit
def _sort_key(x, valid, BITS: tl.constexpr):
    """Integers in the order of x, of BITS bits; entries that are not valid come last, as -1."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, -float("inf"))
    x = tl.where(x == 0, 0.0, x)  # the two zeros are equal
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if BITS == 16:  # all that bfloat16 has
        return tl.where(valid, (key >> 16) + 0x8000, -1)
    else:
        return tl.where(valid, key.to(tl.int64) + 0x80000000, -1)


@triton.jit
def _places(key, k, BITS: tl.constexpr):
    """Which of the keys are the k largest, smaller positions first among equals, and the place of each among them."""
    # The k-th largest key, bit by bit: the largest one that at least k keys reach.
    kth = tl.zeros([], key.dtype)
    one = tl.full([], 1, key.dtype)
    for i in tl.static_range(BITS):
        candidate = kth + (one << (BITS - 1 - i))
        reached = tl.sum((key >= candidate).to(tl.int32), axis=0)
        kth = tl.where(reached >= k, candidate, kth)
    above = (key > kth).to(tl.int32)
    equal = (key == kth).to(tl.int32)
    room = k - tl.sum(above, axis=0)
    # One scan for both counts.
    if key.shape[0] < 65536:
        counted = tl.cumsum(above * 65536 + equal, axis=0)
        n_above = counted >> 16
        n_equal = counted & 0xFFFF
    else:
        n_above = tl.cumsum(above, axis=0)
        n_equal = tl.cumsum(equal, axis=0)
    chosen = (above == 1) | ((equal == 1) & (n_equal <= room))
    return chosen, n_above + tl.minimum(n_equal, room) - 1


@triton.jit
def _best_in_row(
    x_ptr, max_ptr, chosen_ptr, row, width, n_groups, k, kept,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Entries of the best groups, flat: value, column, whether it is chosen, and its place then."""
    group = tl.arange(0, GROUPS)
    maxima = tl.load(max_ptr + row * n_groups + group, mask=group < n_groups, other=-float("inf"))
    chosen, place = _places(_sort_key(maxima, group < n_groups, BITS), kept, BITS)
    tl.store(chosen_ptr + row * kept + place, group, mask=chosen)
    tl.debug_barrier()
    slot = tl.arange(0, KEPT)
    groups = tl.load(chosen_ptr + row * kept + slot, mask=slot < kept, other=0)
    column = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = (slot < kept)[:, None] & (column < width)
    x = tl.load(x_ptr + row * width + column, mask=valid, other=-float("inf"))
    x = tl.reshape(x, [KEPT * GROUP])
    column = tl.reshape(column, [KEPT * GROUP])
    valid = tl.reshape(valid, [KEPT * GROUP])
    chosen, place = _places(_sort_key(x, valid, BITS), k, BITS)
    return x, column, chosen, place


@triton.jit
def _select_kernel(
    x_ptr, max_ptr, chosen_ptr, values_ptr, columns_ptr, width, n_groups, k, kept,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, column, chosen, place = _best_in_row(
        x_ptr, max_ptr, chosen_ptr, row, width, n_groups, k, kept, GROUP, GROUPS, KEPT, BITS
    )
    tl.store(values_ptr + row * k + place, x.to(tl.float32), mask=chosen)
    tl.store(columns_ptr + row * k + place, column, mask=chosen)


@triton.jit
def _keep_kernel(
    x_ptr, max_ptr, chosen_ptr, width, n_groups, k, kept,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, column, chosen, _ = _best_in_row(
        x_ptr, max_ptr, chosen_ptr, row, width, n_groups, k, kept, GROUP, GROUPS, KEPT, BITS
    )
    tl.debug_barrier()  # every thread has read
    slot = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32).to(x.dtype)
    for first in range(0, width, BLOCK):
        tl.store(x_ptr + row * width + first + slot, zero, mask=first + slot < width)
    tl.debug_barrier()
    value = x.to(tl.float32)
    tl.store(x_ptr + row * width + column, x, mask=chosen & ((value > 0) | (value != value)))


def _compiled(kernel: Any, types: str, dtype: str, groups: int, kept: int, **constants: int) -> list[Compiled]:
    constants |= {"GROUP": GROUP, "GROUPS": groups, "KEPT": kept, "BITS": 16 if dtype == "bf16" else 32}
    op = select_op(groups, kept)
    # The registers of select_most spill, at any number of warps.
    spilled = 448 if op == "select_most" else 64
    return [
        Compiled(kernel, types.format(dtype), constants, **settings, capabilities=capabilities, spilled=spilled)
        for settings, capabilities in tuning.variants(op)
    ]


# The last sizes are those of exact.py, those before them of k up to 512.
COMPILED = [
    *(
        Compiled(_group_maxima_kernel, f"*{dtype}, *{dtype}, i32, i32", {"GROUP": GROUP, "GROUPS": 256})
        for dtype in ("bf16", "fp16", "fp32")
    ),
    *(
        variant
        for dtype, more in (("bf16", (1024, 64)), ("fp32", (4, 4)))
        for groups, kept in ((1024, 32), (4096, 64), (512, 256), (1024, 512), more)
        for variant in _compiled(
            _select_kernel, "*{0}, *{0}, *i32, *fp32, *i32, i32:16, i32, i32:16, i32:16", dtype, groups, kept
        )
    ),
    *(
        variant
        for dtype in ("bf16", "fp32")
        for groups, kept in ((128, 128), (512, 256), (1024, 512))
        for variant in _compiled(
            _keep_kernel, "*{0}, *{0}, *i32, i32:16, i32, i32:16, i32:16", dtype, groups, kept, BLOCK=1024
        )
    ),
]
