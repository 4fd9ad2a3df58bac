"""The mesh of ranks that train one autoencoder: latents are split over tp, the rows of a batch over dp.

Rank r is number r % tp of the latents and r // tp of the rows. The ranks of one dp index hold all latents between them
and see the same rows; those of one tp index hold the same latents, of which each moves a part (its *own*).
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from sae.collectives import Group

BUCKETS = 4
"""Parts in which gradients are exchanged over dp, so that one is on its way while the next is computed."""


@dataclass(frozen=True)
class Mesh:
    """The groups of this rank; as made without arguments, a mesh of one rank."""

    tp: Group = field(default_factory=Group)
    dp: Group = field(default_factory=Group)
    everyone: Group = field(default_factory=Group)

    @classmethod
    def join(cls, tp: int, dp: int, timeout: timedelta) -> "Mesh":
        """The mesh of a torch.distributed job of tp * dp ranks, which is initialised already.

        `timeout` limits each of its collectives, and so how far ranks may be apart.
        """
        ranks = [[row * tp + column for column in range(tp)] for row in range(dp)]
        columns = [list(column) for column in zip(*ranks, strict=True)]
        of_tp, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
        of_dp, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)
        return cls(Group(of_tp), Group(of_dp), Group(dist.new_group(timeout=timeout)))

    def held(self, n_latents: int) -> range:
        """The latents that this rank computes with."""
        part = self.tp.share(n_latents)
        return range(part.start, part.stop)

    def buckets(self, n_latents: int) -> list[range]:
        """The held latents in equal parts, each of which the ranks of dp can share equally."""
        held = self.held(n_latents)
        many = next(b for b in range(BUCKETS if self.dp.size > 1 else 1, 0, -1) if len(held) % (b * self.dp.size) == 0)
        size = len(held) // many
        return [held[start : start + size] for start in range(0, len(held), size)]

    def owned(self, n_latents: int) -> list[range]:
        """The latents that this rank moves and saves, ascending: a part of each bucket."""
        return [bucket[self.dp.share(len(bucket))] for bucket in self.buckets(n_latents)]
