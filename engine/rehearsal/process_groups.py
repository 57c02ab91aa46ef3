"""The process groups of a rank: their ranks, which of them communicate, and the sockets that they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from icegrt.rehearsal.watcher import Watcher

# NCCL opens a communicator at its first collective. Its bootstrap connects a rank to the root and to both neighbours of
# a ring. Channels between nodes are queue pairs of the network card, not sockets, if it has RDMA.
SOCKETS_PER_COMMUNICATOR = 3
# The rendezvous store: one connection of torch, one each for control messages and the monitor.
STORE_CONNECTIONS = 3


@dataclass(frozen=True)
class GroupUse:
    """A process group that a rank belongs to.

    Attributes:
        name: what it is for.
        ranks: its members.
        is_used: a collective or message of the rehearsed iteration goes through it.
    """

    name: str
    ranks: tuple[int, ...]
    is_used: bool

    @property
    def sockets(self) -> int:
        """Sockets that this rank opens for it: none for a group that never communicates."""
        return min(SOCKETS_PER_COMMUNICATOR, len(self.ranks) - 1) if self.is_used else 0


def groups_of(watcher: Watcher) -> list[GroupUse]:
    """Return the groups of this rank, in the order of their creation."""
    from torch.distributed import distributed_c10d

    used = {(t.group, t.ranks) for counts in watcher.phases.values() for t in counts.transfers}
    uses = []
    for group in distributed_c10d._world.pg_map:
        ranks = tuple(dist.get_process_group_ranks(group))
        name = str(group.group_desc or "undefined")
        uses.append(GroupUse(name, ranks, (name, ranks) in used))
    return uses


def sockets_of(groups: list[GroupUse]) -> int:
    """Return the sockets of one rank, with those to the store."""
    return sum(group.sockets for group in groups) + STORE_CONNECTIONS
