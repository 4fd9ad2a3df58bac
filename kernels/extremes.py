"""The largest or smallest numbers of long rows, by few passes over them.

Shapes: m rows, V columns, n chosen.
"""

from typing import Final

import torch
from torch import Tensor

_GROUP: Final = 32


def extremes(scores: Tensor, n: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Columns [m, n] int64 and values [m, n] of the n largest, or smallest, of each row of [m, V], in order.

    Were one of them in none of the n groups with the most extreme members, each of these would have one that comes
    before it: so only those groups are searched.
    """
    rows, width = scores.shape
    n_groups = width // _GROUP
    if n_groups <= n:
        found = scores.topk(n, largest=largest)
        return found.indices, found.values
    # Neighbours are in different groups, so that maxima of many groups are taken by the same instructions.
    groups = scores[:, : n_groups * _GROUP].unflatten(1, (_GROUP, n_groups))
    best = groups.amax(dim=1) if largest else groups.amin(dim=1)
    chosen = best.topk(n, largest=largest, sorted=False).indices
    steps = n_groups * torch.arange(_GROUP, device=scores.device)
    rest = torch.arange(n_groups * _GROUP, width, device=scores.device).expand(rows, -1)
    columns = torch.cat([(chosen[:, None] + steps[:, None]).flatten(1), rest], dim=1)
    found = scores.gather(1, columns).topk(n, largest=largest)
    return columns.gather(1, found.indices), found.values
