"""Control messages between all ranks, through the rendezvous store.

Ranks wait here for work of unknown length: files, reward functions, uneven rollouts. Collectives of the device come
after such a wait, so their time limit can be short. A store needs one connection per rank, a gloo group of W ranks
W - 1.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icegrt.errors import RunError
from icegrt.utils.text import duration

if TYPE_CHECKING:
    import torch.distributed as dist

# Rank 0 may write a large model, or wait for a slow reward function, while the others wait.
WAIT_LIMIT_S = 7200.0
# A wait polls: a blocking wait of the store would hold back Python's signal handlers.
_SHORTEST_POLL_S, _LONGEST_POLL_S = 1e-4, 0.25
_PEER_CHECK_S = 0.5


class Control:
    """Barriers and messages of all ranks. Every rank calls the same methods in the same order.

    Args:
        store: a connection of this object alone, under a prefix that no earlier opening used.
        rank: of this process.
        world_size: number of ranks.
        wait_limit_s: seconds after which a wait raises `RunError`.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, wait_limit_s: float = WAIT_LIMIT_S) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size
        self._wait_limit_s = wait_limit_s
        self._number = 0
        self._local_peers: dict[int, int] | None = None
        store.set(f"process/{rank}", f"{_process_namespace()} {os.getpid()}".encode())

    def any_rank(self, flags: Sequence[bool] = ()) -> list[bool]:
        """Wait for all ranks. Return for each flag whether any rank has set it."""
        key = self._next_key()
        for index, flag in enumerate(flags):
            if flag:
                self._store.set(f"{key}/flag/{index}", b"1")
        if self._store.add(f"{key}/arrived", 1) == self.world_size:
            flag_keys = [f"{key}/flag/{index}" for index in range(len(flags))]
            is_set = [self._store.check([flag_key]) for flag_key in flag_keys]
            self._store.set(f"{key}/go", bytes(is_set) or b"-")
            for flag_key, stored in zip(flag_keys, is_set, strict=True):
                if stored:
                    self._store.delete_key(flag_key)
            self._store.delete_key(f"{key}/arrived")
        self._wait([f"{key}/go"])
        any_flags = self._store.get(f"{key}/go")
        self._delete_after(key, ["go"], readers=self.world_size)
        return [bool(flag) for flag in any_flags[: len(flags)]]

    def gather(self, value: Any) -> list[Any]:
        """Return `value` of every rank in the order of ranks, on rank 0; an empty list elsewhere."""
        key = self._next_key()
        if self.rank != 0:
            self._store.set(f"{key}/{self.rank}", pickle.dumps(value))
            return []
        keys = [f"{key}/{rank}" for rank in range(1, self.world_size)]
        self._wait(keys)
        values = [pickle.loads(message) for message in self._store.multi_get(keys)]
        for message_key in keys:
            self._store.delete_key(message_key)
        return [value, *values]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        key = self._next_key()
        if self.rank == 0:
            self._store.set(f"{key}/value", pickle.dumps(value))
            return value
        self._wait([f"{key}/value"])
        message = self._store.get(f"{key}/value")
        self._delete_after(key, ["value"], readers=self.world_size - 1)
        return pickle.loads(message)

    # -- a shared queue --------------------------------------------------------------------------------------------

    def open_queue(self, items: int, replica: int, is_leader: bool) -> WorkQueue:
        """Return a queue of the numbers 0 to items - 1, from which replicas of ranks take. Every rank calls it."""
        return WorkQueue(self, f"{self._next_key()}/queue", items, replica, is_leader)

    # -- what ranks do ---------------------------------------------------------------------------------------------

    def post(self, text: str) -> None:
        """Publish what this rank does, for `posts` of any rank."""
        self._store.set(f"post/{self.rank}", text.encode())

    def posts(self) -> list[str]:
        """Return the last post of every rank; an empty one if a rank has not posted."""
        keys = [f"post/{rank}" for rank in range(self.world_size)]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]

    # -- keys ------------------------------------------------------------------------------------------------------

    def _next_key(self) -> str:
        self._number += 1
        return str(self._number)

    def _wait(self, keys: list[str]) -> None:
        started, checked = time.monotonic(), time.monotonic()
        while not self._store.check(keys):
            waited = time.monotonic() - started
            if time.monotonic() - checked > _PEER_CHECK_S:
                self._check_local_peers()
                checked = time.monotonic()
            if waited > self._wait_limit_s:
                raise RunError(f"other ranks did not arrive within {duration(waited)}; see the notices above")
            # A tenth of the wait so far: short waits stay short, and hundreds of ranks do not load the store.
            pause = min(max(waited / 10, _SHORTEST_POLL_S), _LONGEST_POLL_S)
            time.sleep(pause)

    def _check_local_peers(self) -> None:
        """Raise `RunError` if a rank of this machine has ended: a killed process sends no message."""
        if self._local_peers is None:
            keys = [f"process/{rank}" for rank in range(self.world_size)]
            if not self._store.check(keys):
                return  # a rank has not opened its cluster yet
            processes = [message.decode().split() for message in self._store.multi_get(keys)]
            own = _process_namespace()
            self._local_peers = {r: int(pid) for r, (namespace, pid) in enumerate(processes) if namespace == own}
        for rank, pid in self._local_peers.items():
            if not _is_alive(pid):
                raise RunError(f"rank {rank} has ended, and the other ranks cannot go on without it")

    def _delete_after(self, key: str, names: list[str], readers: int) -> None:
        # The last reader deletes: the store would grow with every message of a run of weeks.
        if self._store.add(f"{key}/read", 1) == readers:
            for name in (*names, "read"):
                self._store.delete_key(f"{key}/{name}")


class WorkQueue:
    """Numbers that replicas of ranks take from a counter in the store: none gets a number that another has.

    The ranks of a replica call `take` alike; its leader asks the counter, and the others read what it got.

    Args:
        control: the ranks' messages.
        key: of the counter; not used before.
        items: how many numbers there are.
        replica: of this rank.
        is_leader: whether this rank asks for its replica.
    """

    def __init__(self, control: Control, key: str, items: int, replica: int, is_leader: bool) -> None:
        self._control, self._store, self._key, self._items = control, control._store, key, items
        self._replica, self._is_leader = replica, is_leader
        self._takes = 0

    def take(self, most: int) -> range:
        """Return up to `most` more numbers; none at the end."""
        mailbox = f"{self._key}/{self._replica}/{self._takes}"
        self._takes += 1
        if self._is_leader:
            first = self._store.add(self._key, most) - most
            self._store.set(mailbox, str(first).encode())
        else:
            self._control._wait([mailbox])
            first = int(self._store.get(mailbox))
        return range(min(first, self._items), min(first + most, self._items))

    def close(self) -> None:
        """Delete the queue's keys. Every rank calls it."""
        self._control.any_rank()
        if self._is_leader:
            for take in range(self._takes):
                self._store.delete_key(f"{self._key}/{self._replica}/{take}")
            if self._replica == 0:
                self._store.delete_key(self._key)


def _process_namespace() -> str:
    """Return a name that processes share if they see each other's process ids: the host, and its namespace on Linux."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{namespace.stat().st_ino if namespace.exists() else 0}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie has ended: its parent has not yet asked for its status
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
