"""Transposed sparse times dense: the weight gradient of a sparse layer.

Shapes: B rows, k latents per row, n latents in all, d features, m entries in all.

The entries are sorted by latent, so that each row of the result is a sum over one segment. A latent that fires
everywhere has a long segment: its whole aligned chunks of CHUNK entries are summed first, by a program each.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels._arguments import expect
from sae.kernels._rows import WIDTHS, add_rows, block_width, with_rows_in_memory
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.order import segment_sums

CHUNK = 128  # entries; a program of the second pass walks at most 2 * CHUNK of them, and m / CHUNK chunks
ROWS = 8  # in flight at once: most segments are short


def sparse_t_matmul(values: Tensor, indices: Tensor, dense: Tensor, n: int) -> Tensor:
    """Return out[i] = sum of values[b, j] * dense[b] over all (b, j) with indices[b, j] == i, as [n, d].

    values [B, k], indices [B, k] int64 or int32 in [0, n), dense [B, d]; any strides. The result has dense's
    dtype and is accumulated in fp32. Not differentiable. The order of addition depends on indices alone: the same
    input gives the same bits in every run, on CPU with any number of threads.

    Raises ValueError when shapes or types disagree or, on CPU, when an index is outside [0, n). On CUDA that check
    would wait for the device: such entries are left out.

    Source: weight gradients of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", without its atomics.
    """
    expect("sparse_t_matmul", "values [B, k] float, indices [B, k] int, dense [B, d] float", values, indices, dense)
    _check_range("sparse_t_matmul", "indices", indices, n)
    order, ids, starts = _by_latent(indices, n)
    entries = _Entries(ids, order // max(indices.shape[1], 1), values.detach().flatten()[order], starts)
    return _sum_segments(entries, dense.detach())


def sparse_t_matmul_coo(rows: Tensor, cols: Tensor, values: Tensor, dense: Tensor, n: int) -> Tensor:
    """Return out[i] = sum of values[e] * dense[rows[e]] over all entries e with cols[e] == i, as [n, d].

    rows [m] in [0, B), cols [m] in [0, n), int64 or int32; values [m]; dense [B, d]; any strides. The entries may
    stand in any order, and those of one place add up. Result, dtype and determinism as of sparse_t_matmul.

    Raises ValueError when shapes or types disagree or, on CPU, when an index is out of range. On CUDA that check would
    wait for the device: an entry whose column is out of range is left out, one whose row is gives NaN.

    Source: the COO form of Gao et al. 2024, "Scaling and evaluating sparse autoencoders", without its atomics.
    """
    form = "rows [m] int, cols [m] int, values [m] float, dense [B, d] float"
    expect("sparse_t_matmul_coo", form, rows, cols, values, dense)
    _check_range("sparse_t_matmul_coo", "rows", rows, dense.shape[0])
    _check_range("sparse_t_matmul_coo", "cols", cols, n)
    order, ids, starts = _by_latent(cols, n)
    return _sum_segments(_Entries(ids, rows[order], values.detach()[order], starts), dense.detach())


class _Entries(NamedTuple):
    """Nonzeros sorted by latent: those of latent i are starts[i]..starts[i + 1]."""

    ids: Tensor  # [m] int32, ascending
    rows: Tensor  # [m] int
    values: Tensor  # [m]
    starts: Tensor  # [n + 1] int64


def _check_range(op: str, name: str, indices: Tensor, n: int) -> None:
    if indices.is_cuda or not indices.numel():
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if not 0 <= low <= high < n:
        raise ValueError(f"{op} expects {name} in [0, {n}), received {low}..{high}")


def _by_latent(indices: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort entries by latent, those of one latent in the order given: order [m], ids [m], starts [n + 1]."""
    ids, order = indices.flatten().to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(n + 1, dtype=torch.int32, device=ids.device))
    return order, ids, starts


def _sum_segments(entries: _Entries, dense: Tensor) -> Tensor:
    if use_triton(*entries, dense):
        return _sum_segments_triton(entries, dense)
    return segment_sums(entries.rows.long(), entries.values, entries.starts, dense)


def _sum_segments_triton(entries: _Entries, dense: Tensor) -> Tensor:
    ids, rows, values, starts = entries
    dense = with_rows_in_memory(dense)
    (batch, d), n, chunks = dense.shape, starts.numel() - 1, ids.numel() // CHUNK
    width, stride = block_width(d), dense.stride(0)
    blocks = triton.cdiv(d, width)
    out = torch.empty(n, d, dtype=dense.dtype, device=dense.device)
    partial = torch.empty(chunks, d, dtype=torch.float32, device=dense.device)
    constants = {"BLOCK_D": width, "CHUNK": CHUNK, "J": ROWS, "num_warps": 4}
    if partial.numel():
        _chunk_kernel[(chunks * blocks,)](ids, rows, values, dense, partial, batch, d, stride, **constants)
    if out.numel():
        _segment_kernel[(n * blocks,)](starts, rows, values, dense, partial, out, batch, d, stride, **constants)
    return out


@triton.jit
def _chunk_kernel(
    ids_ptr,
    rows_ptr,
    values_ptr,
    dense_ptr,
    partial_ptr,
    n_rows,
    d,
    stride,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    J: tl.constexpr,
):
    """Sum a chunk if it belongs to one latent; the second pass reads the other chunks' entries itself."""
    blocks = tl.cdiv(d, BLOCK_D)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    start = chunk * CHUNK
    if tl.load(ids_ptr + start) == tl.load(ids_ptr + start + CHUNK - 1):
        columns = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([J, BLOCK_D], tl.float32)
        acc = add_rows(acc, rows_ptr, values_ptr, start, start + CHUNK, dense_ptr, n_rows, stride, columns, d, J)
        tl.store(partial_ptr + chunk * d + columns, tl.sum(acc, axis=0), mask=columns < d)


@triton.jit
def _segment_kernel(
    starts_ptr,
    rows_ptr,
    values_ptr,
    dense_ptr,
    partial_ptr,
    out_ptr,
    n_rows,
    d,
    stride,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    J: tl.constexpr,
):
    """One block of columns of one latent: entries up to a chunk's edge, whole chunks, the entries that remain."""
    blocks = tl.cdiv(d, BLOCK_D)
    latent = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    first_chunk, last_chunk = (start + CHUNK - 1) // CHUNK, stop // CHUNK
    head_stop = tl.minimum(stop, first_chunk * CHUNK)
    tail_start = tl.maximum(last_chunk * CHUNK, head_stop)
    acc = tl.zeros([J, BLOCK_D], tl.float32)
    acc = add_rows(acc, rows_ptr, values_ptr, start, head_stop, dense_ptr, n_rows, stride, columns, d, J)
    for first in range(first_chunk, last_chunk, J):
        chunks = first + tl.arange(0, J)
        mask = (chunks < last_chunk)[:, None] & (columns < d)[None, :]
        acc += tl.load(partial_ptr + chunks[:, None] * d + columns[None, :], mask=mask, other=0.0)
    acc = add_rows(acc, rows_ptr, values_ptr, tail_start, stop, dense_ptr, n_rows, stride, columns, d, J)
    tl.store(out_ptr + latent * d + columns, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=columns < d)


COMPILED = [
    Compiled(kernel, types.replace("T", dtype), {"BLOCK_D": width, "CHUNK": CHUNK, "J": ROWS})
    for kernel, types in (
        (_chunk_kernel, "*i32, *i64, *T, *T, *fp32, i32, i32:16, i32:16"),
        (_segment_kernel, "*i64, *i64, *T, *T, *fp32, *T, i32, i32:16, i32:16"),
    )
    for dtype in ("bf16", "fp32")
    for width in WIDTHS
]
