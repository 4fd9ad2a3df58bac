"""Rows of latents at the scale of a real run, and the tables that a run of them becomes."""

import torch
from torch import Tensor

from sae.statistics import Columns, RunStatistics

CONTEXT_LENGTH = 128
PER_TOKEN = 32


def power_law_rows(n: int, n_atoms: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """About n distinct rows (atom, context_id, pos, act) in the order of their tokens; atom i fires like (i + 1)**-2/3.

    Most tokens have fewer than 32 atoms, since what is drawn twice counts once; the first atom fires on most tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(m: int) -> Tensor:
        return torch.rand(m, generator=generator, device=device)

    token = torch.arange(n, device=device) // PER_TOKEN
    atom = (uniform(n).double() ** 3 * n_atoms).long()
    key = (token * n_atoms + atom).unique()
    token, atom = key // n_atoms, key % n_atoms
    act = 8 * uniform(len(key)) ** 2 + 0.01
    return atom, (5 << 40) + token // CONTEXT_LENGTH, token % CONTEXT_LENGTH, act


def tables(run: RunStatistics) -> list[Columns]:
    """All that the step encode writes of a run."""
    return [run.rows(), run.moments(), run.histogram(0.2), run.top(50), run.samples(50, 7)]
