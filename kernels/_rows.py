"""What the sparse kernels share: weighted sums of gathered rows, and how a matrix is cut into blocks of columns."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (512, 256, 128)

MAX_FEATURES = 16384
"""The widest row that fits in the registers of one program."""


def block_of(d: int) -> int:
    """Return the block of a program that holds a row of d features."""
    return int(triton.next_power_of_2(d))


def whole_row(d: int) -> tuple[int, int]:
    """Return block and warps of a program that holds a row of d features."""
    block = block_of(d)
    return block, max(1, min(16, block // 256))


def block_width(d: int) -> int:
    """Return the columns of a tile: the width that leaves the fewest lanes idle, the wider of equals."""
    if d < WIDTHS[-1]:
        return max(16, int(triton.next_power_of_2(d)))
    return min(WIDTHS, key=lambda width: -d % width)


def with_rows_in_memory(x: Tensor) -> Tensor:
    """Return x, copied if the entries of a row are not neighbours: the kernels take any stride between rows."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def add_rows(acc, ids_ptr, values_ptr, start, stop, dense_ptr, n_rows, stride, columns, d, J: tl.constexpr):
    """Return acc [J, BLOCK_D] plus values[e] * dense[ids[e], columns] for start <= e < stop.

    Each of the J rows of acc takes every J-th entry, so J loads are in flight; the caller adds the rows at the
    end. An id outside [0, n_rows) gives NaN, rather than a read of foreign memory or a silent zero.
    """
    for first in range(start, stop, J):
        entries = first + tl.arange(0, J)
        valid = entries < stop
        ids = tl.load(ids_ptr + entries, mask=valid, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=valid, other=0.0).to(tl.float32)
        known = (ids >= 0) & (ids < n_rows)
        values = tl.where(valid & (known == 0), float("nan"), values)
        mask = (valid & known)[:, None] & (columns < d)[None, :]
        rows = tl.load(dense_ptr + ids[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        acc += values[:, None] * rows.to(tl.float32)
    return acc
