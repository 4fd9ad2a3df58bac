"""How many latents are dead, known to the host in time."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from sae.collectives import Group
from sae.optimise import DeadLatents


class _Count(NamedTuple):
    """A number on its way to the host, and the number of tokens up to which it is a bound."""

    latents: Tensor
    copied: torch.cuda.Event | None
    holds_until: int


class DeadBound:
    """How many latents may be dead in the coming step on any rank of tp, without waiting for a GPU to count them.

    On a GPU the count made two steps before is read, of the latents that can be dead by then.
    """

    LAG = 2
    STATE = LAG, 4

    def __init__(self, dead: DeadLatents, threshold: int, tp: Group | None = None) -> None:
        self._dead, self._threshold = dead, threshold
        self._tp = tp if tp is not None else Group()
        self._tokens = 0
        self._counts: deque[_Count] = deque()

    def next(self, rows: int) -> int:
        """A bound for the dead latents after a step on so many rows."""
        since = self._dead.tokens_since
        known = self._counts.popleft() if len(self._counts) >= self.LAG else None
        if known is None or self._tokens + rows > known.holds_until:  # the first steps, and larger ones, wait
            bound = int(self._within(rows))
        else:
            if known.copied is not None:
                known.copied.synchronize()
            bound = int(known.latents)
        if not since.is_cuda:
            return bound
        # Rounded up, by at most an eighth where there are many, so that shapes are few.
        unit = max(256, (1 << bound.bit_length()) // 16)
        return min(-(-bound // unit) * unit, len(since))

    def record(self, rows: int) -> None:
        """Count after a step on so many rows, for a later one."""
        self._tokens += rows
        if not self._dead.tokens_since.is_cuda:
            return
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_(self._within(self.LAG * rows), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._counts.append(_Count(count, copied, self._tokens + self.LAG * rows))

    def state(self) -> Tensor:
        """int64 of shape STATE, of the counts still to be read: latents, tokens left, threshold, size of tp; or -1."""
        rows = [[-1] * self.STATE[1]] * (self.LAG - len(self._counts))
        for count in self._counts:
            if count.copied is not None:
                count.copied.synchronize()
            rows.append([int(count.latents), count.holds_until - self._tokens, self._threshold, self._tp.size])
        return torch.tensor(rows[-self.LAG :])

    def load(self, state: Tensor) -> None:
        """Go on from counts made with this threshold and as many ranks; others are of no use."""
        self._tokens = 0
        self._counts = deque(
            _Count(torch.tensor(latents), None, left)
            for latents, left, *made_with in state.tolist()
            if made_with == [self._threshold, self._tp.size]
        )

    def _within(self, tokens: int) -> Tensor:
        """How many latents of a rank are dead after so many tokens more, if none of them fires."""
        return self._tp.max_((self._dead.tokens_since > self._threshold - tokens).sum())
