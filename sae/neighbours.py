"""Which atoms are like an atom: those whose decoder rows point where its row points, and those that fire with it.

Shapes: n atoms, d features, b atoms of a block, k neighbours, m nonzero latents of a sample of t tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

_BLOCK: Final = 1 << 24
"""Numbers of a block of similarities."""
_PAIRS: Final = 1 << 22

Found = tuple[Tensor, Tensor]
"""Neighbours int64 and values float32, [b, k] each, the largest first; -infinity stands for none."""


def nearest(rows: Tensor, first: int, last: int, k: int) -> Found:
    """The k largest cosines of unit rows [n, d] with those from first to last, themselves left out. Exact."""
    mine = rows[first : last + 1]
    at = torch.arange(first, last + 1, device=rows.device)
    columns = torch.zeros(len(mine), 0, dtype=torch.int64, device=rows.device)
    best = rows.new_zeros(len(mine), 0)
    start = 0
    for part in rows.split(max(k + 1, _BLOCK // len(mine))):
        cosines = mine @ part.T
        here = (at >= start) & (at < start + len(part))
        cosines[here.nonzero().squeeze(1), at[here] - start] = -torch.inf
        values, found = cosines.topk(min(k, len(part)), dim=1)
        best, order = torch.cat([best, values], dim=1).topk(min(k, best.shape[1] + values.shape[1]), dim=1)
        columns = torch.cat([columns, found + start], dim=1).gather(1, order)
        start += len(part)
    return columns, best


def block(n_atoms: int) -> int:
    """Atoms of a block whose similarities with all take a bounded memory."""
    return max(1, min(1024, _BLOCK // n_atoms))


@dataclass(frozen=True)
class Activity:
    """Activations of atoms in a sample of t tokens, by atom, and the same by token.

    atom, token, act: [m] in order of atom; atom_by_token, act_by_token: [m]; ends: where in these each token that has
    any begins, and the last one ends; mean, deviation: [n] over all tokens, zeros included, float64.
    """

    atom: Tensor
    token: Tensor
    act: Tensor
    atom_by_token: Tensor
    act_by_token: Tensor
    ends: Tensor
    mean: Tensor
    deviation: Tensor
    n_tokens: int

    @classmethod
    def of(cls, atom: Tensor, token: Tensor, act: Tensor, n_atoms: int, n_tokens: int) -> Self:
        """Of activations [m] in any order, with any numbers for their tokens, of which there are n_tokens in all."""
        order = atom.argsort(stable=True)
        atom, act = atom[order], act[order].double()
        token, n_active = token[order].unique(return_inverse=True, return_counts=True)[1:]
        by_token = token.argsort(stable=True)
        ends = torch.cat([n_active.new_zeros(1), n_active.cumsum(0)])
        sums = [torch.bincount(atom, each, minlength=n_atoms) / n_tokens for each in (act, act * act)]
        deviation = (sums[1] - sums[0].square()).clamp_min(0).sqrt()
        return cls(atom, token, act, atom[by_token], act[by_token], ends, sums[0], deviation, n_tokens)

    def correlated(self, first: int, last: int, k: int) -> Found:
        """The k atoms whose activations correlate most with those of each atom from first to last.

        Pearson's correlation over all tokens; only atoms that fire on a token together, and more than by chance.
        """
        products = self._products(first, last)
        of_mine = slice(first, last + 1)
        covariance = products / self.n_tokens - self.mean[of_mine, None] * self.mean
        correlation = covariance / (self.deviation[of_mine, None] * self.deviation)
        correlation.masked_fill_((products == 0) | ~(correlation > 0), -torch.inf)
        at = torch.arange(last + 1 - first, device=products.device)
        correlation[at, at + first] = -torch.inf
        values, columns = correlation.topk(min(k, correlation.shape[1]), dim=1)
        return columns, values.float()

    def _products(self, first: int, last: int) -> Tensor:
        """Sums over tokens of the product of two activations, [b, n] float64."""
        n_atoms = len(self.mean)
        products = self.act.new_zeros((last + 1 - first) * n_atoms)
        low, high = torch.searchsorted(self.atom, torch.tensor([first, last + 1], device=self.atom.device)).tolist()
        for rows in self._parts(low, high):
            start = self.ends[self.token[rows]]
            length = self.ends[self.token[rows] + 1] - start
            ends = length.cumsum(0)
            other = (
                (start + length - ends).repeat_interleave(length).add_(torch.arange(int(ends[-1]), device=ends.device))
            )
            key = ((self.atom[rows] - first) * n_atoms).repeat_interleave(length).add_(self.atom_by_token[other])
            product = self.act[rows].repeat_interleave(length).mul_(self.act_by_token[other])
            products.scatter_add_(0, key, product)
        return products.view(-1, n_atoms)

    def _parts(self, low: int, high: int) -> Iterator[slice]:
        """Slices of activations of which each has a bounded number of others on its token."""
        if low == high:
            return
        most = int((self.ends[1:] - self.ends[:-1]).max())
        at_once = max(1, _PAIRS // most)
        for start in range(low, high, at_once):
            yield slice(start, min(start + at_once, high))
