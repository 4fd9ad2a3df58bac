"""The mesh of ranks that train one autoencoder: latents are split over tp, the rows of a batch over dp.

Rank r is number r % tp of the latents and r // tp of the rows. The ranks of one dp index hold all latents between them
and see the same rows; those of one tp index hold the same latents, of which each moves a part (its *own*).
"""

import socket
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from sae.collectives import Group

BUCKETS = 4
"""Parts in which gradients are exchanged over dp, so that one is on its way while the next is computed.

Over NVLink they come at once: there NCCL's kernels take from others on the GPU more than the time that they hide (a
step of 3.99 ms, and of 3.73 in one part, on two H200s).
"""


@dataclass(frozen=True)
class Mesh:
    """The groups of this rank; as made without arguments, a mesh of one rank.

    n_buckets: parts in which the ranks of dp exchange gradients, at most
    """

    tp: Group = field(default_factory=Group)
    dp: Group = field(default_factory=Group)
    everyone: Group = field(default_factory=Group)
    n_buckets: int = 1

    @classmethod
    def join(cls, tp: int, dp: int, timeout: timedelta) -> "Mesh":
        """The mesh of a torch.distributed job of tp * dp ranks, which is initialised already.

        `timeout` limits each of its collectives, and so how far ranks may be apart.
        """
        ranks = [[row * tp + column for column in range(tp)] for row in range(dp)]
        columns = [list(column) for column in zip(*ranks, strict=True)]
        of_tp, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
        of_dp, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)
        everyone = Group(dist.new_group(timeout=timeout))
        near = len(set(everyone.gather_objects(socket.gethostname()))) == 1
        at_once = near and dist.get_backend() == "nccl"
        return cls(Group(of_tp), Group(of_dp), everyone, 1 if at_once else BUCKETS)

    def held(self, n_latents: int) -> range:
        """The latents that this rank computes with."""
        part = self.tp.share(n_latents)
        return range(part.start, part.stop)

    def buckets(self, n_latents: int) -> list[range]:
        """The held latents in equal parts, each of which the ranks of dp can share equally."""
        held = self.held(n_latents)
        most = self.n_buckets if self.dp.size > 1 else 1
        many = next(b for b in range(most, 0, -1) if len(held) % (b * self.dp.size) == 0)
        size = len(held) // many
        return [held[start : start + size] for start in range(0, len(held), size)]

    def owned(self, n_latents: int) -> list[range]:
        """The latents that this rank moves and saves, ascending: a part of each bucket."""
        return [bucket[self.dp.share(len(bucket))] for bucket in self.buckets(n_latents)]
