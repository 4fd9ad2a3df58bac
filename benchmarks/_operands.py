"""What the kernels benchmark runs: each op on the tensors of a training step, and as torch alone would do it.

Sizes: B rows, k selected latents per row, n latents, d features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._problem import Problem
from benchmarks._timing import Work
from sae.kernels.addmul import add_mul
from sae.kernels.columns import column_sum
from sae.kernels.decode import decode
from sae.kernels.encode import encode_topk
from sae.kernels.mse import mse
from sae.kernels.order import LatentIndex, latent_index
from sae.kernels.reconstruct import reconstruct
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul, sparse_t_matmul_coo
from sae.kernels.topk import topk
from sae.kernels.update import Hyper, Latents, Parameter, SparseGradient, update

SETS = 2


@dataclass(frozen=True)
class Weights:
    """Encoder and decoder [n, d] in the type of products, bias [n] and pre_bias [d] in float32."""

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    pre_bias: Tensor


@dataclass(frozen=True)
class Batch:
    """x and error [B, d]; the selected latents: values and their gradients [B, k], indices [B, k] int64, sorted index.

    rows [B*k]: the row of each entry, for the COO form.
    """

    x: Tensor
    error: Tensor
    values: Tensor
    grads: Tensor
    indices: Tensor
    rows: Tensor
    index: LatentIndex


Op = Callable[[Batch], object]


@dataclass(frozen=True)
class Case:
    """An op, what torch has for it, if anything, and whether kernel and twin must give the same."""

    ours: Op
    plain: Op | None = None
    same: bool = True


def prepare(problem: Problem) -> tuple[Weights, list[Batch]]:
    model, dtype = problem.start(), problem.sample.dtype
    encoder, decoder = model.encoder.weight.detach(), model.decoder_rows.detach()
    bias = torch.addmv(model.latent_bias.detach(), encoder, model.pre_bias.detach(), alpha=-1)
    weights = Weights(encoder.to(dtype), decoder.to(dtype).contiguous(), bias, model.pre_bias.detach())
    return weights, [_batch(x, weights, problem.shape.k) for x in problem.batches[:SETS]]


def _batch(x: Tensor, weights: Weights, k: int) -> Batch:
    values, indices = F.linear(x, weights.encoder, weights.bias.to(x.dtype)).topk(k, dim=1)
    values = values.relu()
    error = decode(values, indices, weights.decoder) - x
    grads = sampled_matmul(error, weights.decoder, indices)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(k)
    index = latent_index(indices, len(weights.encoder))
    return Batch(x, error, values.float(), grads.float(), indices, rows, index)


def in_turns(op: Op, batches: list[Batch]) -> Work:
    turns = cycle(batches)
    return lambda: op(next(turns))


def cases(weights: Weights, k: int) -> dict[str, Case]:
    """By name; reads only, but for the optimiser's own state."""
    n, encoder, decoder = len(weights.encoder), weights.encoder, weights.decoder
    bias = weights.bias.to(encoder.dtype)
    return {
        "encode_topk": Case(
            lambda b: encode_topk(b.x, encoder, weights.bias, k),
            lambda b: F.linear(b.x, encoder, bias).topk(k, dim=1),
            # Products rounded otherwise select others among near ties: benchmarks.encode checks it against float64.
            same=False,
        ),
        "decode": Case(lambda b: decode(b.values, b.indices, decoder), lambda b: _bags(b.values, b.indices, decoder)),
        "decode, with gradients": Case(
            lambda b: _with_gradients(decode, b, decoder), lambda b: _with_gradients(_bags, b, decoder)
        ),
        "sampled_matmul": Case(
            lambda b: sampled_matmul(b.error, decoder, b.indices),
            lambda b: torch.bmm(decoder[b.indices], b.error.unsqueeze(2)).squeeze(2),
        ),
        "sparse_t_matmul": Case(lambda b: sparse_t_matmul(b.values, b.indices, b.error, n), lambda b: _index_add(b, n)),
        "sparse_t_matmul_coo": Case(
            lambda b: sparse_t_matmul_coo(b.rows, b.indices.flatten(), b.values.flatten(), b.error, n),
            lambda b: _index_add(b, n),
        ),
        "reconstruct": Case(lambda b: reconstruct(b.values, b.indices, decoder, b.x)),
        "update": Case(_updates(weights)),
        "add_mul": Case(
            lambda b: add_mul(encoder, bias[:, None], decoder), lambda b: torch.addcmul(encoder, bias[:, None], decoder)
        ),
        "column_sum": Case(lambda b: column_sum(b.error), lambda b: b.error.sum(dim=0, dtype=torch.float32)),
        "mse, with gradient": Case(
            lambda b: _mse_gradient(mse, b), lambda b: _mse_gradient(lambda r, x: F.mse_loss(r.float(), x.float()), b)
        ),
    }


def topk_case(batches: list[Batch], weights: Weights, k: int) -> tuple[Case, list[Batch]]:
    """Top-k alone, on pre-activations [B, n] in the place of x: they are large, so they are made when needed."""
    bias = weights.bias.to(weights.encoder.dtype)
    held = [Batch(**{**vars(b), "x": F.linear(b.x, weights.encoder, bias)}) for b in batches]
    return Case(lambda b: topk(b.x, k), lambda b: b.x.topk(k, dim=1)), held


def _bags(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    dtype = weight.dtype
    # In float32 where gradients are wanted: on a GPU torch has none of a bag's weights in bfloat16.
    weight = weight.float() if values.requires_grad else weight
    return F.embedding_bag(indices, weight, per_sample_weights=values.to(weight.dtype), mode="sum").to(dtype)


def _with_gradients(op: Callable[[Tensor, Tensor, Tensor], Tensor], b: Batch, weight: Tensor) -> tuple[Tensor, ...]:
    values, weight = b.values.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        recons = op(values, b.indices, weight)
    return recons.detach(), *torch.autograd.grad(recons, (values, weight), b.error)


def _index_add(b: Batch, n: int) -> Tensor:
    products = b.values.to(b.error.dtype).unsqueeze(2) * b.error.unsqueeze(1)
    return b.error.new_zeros(n, b.error.shape[1]).index_add_(0, b.indices.flatten(), products.flatten(0, 1))


def _mse_gradient(op: Callable[[Tensor, Tensor], Tensor], b: Batch) -> tuple[Tensor, ...]:
    recons = b.error.detach().requires_grad_()
    with torch.enable_grad():
        loss = op(recons, b.x)
    return loss.detach(), *torch.autograd.grad(loss, recons)


def _updates(weights: Weights) -> Op:
    latents = Latents(*(_parameter(weight) for weight in (weights.encoder, weights.bias, weights.decoder)))
    # A learning rate of zero: every call does the same work on the same weights.
    scalars = torch.tensor([0.0, 1.0, 1.0], device=weights.bias.device)

    def run(b: Batch) -> object:
        scale = 2 / b.x.numel()
        return update(latents, SparseGradient(b.index, b.values, b.grads, b.error, b.x, scale), Hyper(scalars, 1e-3))

    return run


def _parameter(weight: Tensor) -> Parameter:
    master = weight.float().clone()
    moments = torch.zeros_like(master), torch.zeros_like(master)
    # A bias is not multiplied by anything, so it has no copy.
    return Parameter(master, *moments, torch.zeros_like(master), weight.clone() if weight.ndim == 2 else None)
