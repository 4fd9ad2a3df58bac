"""Exact row-wise top-k with a fixed order among equal values.

Shapes: B rows, n latents, k selected.
"""

import torch
from torch import Tensor


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row: values [B, k], descending, and indices [B, k] int64.

    Of equal values the smaller index wins and comes first, so the result equals the first k columns
    of a stable descending sort. Values are differentiable with respect to x. x must hold no NaN.

    Raises ValueError when x is not a matrix or k is not between 1 and n.
    """
    if x.ndim != 2:
        raise ValueError(f"topk expects x of shape [B, n], received {tuple(x.shape)}")
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"topk expects 1 <= k <= n, received k={k} with n={x.shape[1]}")
    indices = _topk_torch(x.detach(), k)
    return x.gather(1, indices), indices


def _topk_torch(x: Tensor, k: int) -> Tensor:
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
