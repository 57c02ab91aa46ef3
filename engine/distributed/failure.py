"""Report only the first of several rank failures.

A failing rank closes its connections, so its peers fail with misleading errors. The first failing rank records its
rank in torchrun's store before it closes anything. The other ranks read the record and exit without output.

A rank that is killed by SIGKILL (by the kernel when memory is exhausted, or by an operator) records nothing. torchrun
then reports the signal and terminates the other ranks of its node. A peer whose connection breaks before that is the
first to record a failure, so its error may be printed although it is only a consequence.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from icegrt.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

# How long other ranks wait for rank 0 to report an error that all ranks raise; rank 0 may still be starting.
_RANK_0_FIRST = datetime.timedelta(seconds=20)
_POLL_INTERVAL_S, _EXIT_DELAY_S = 1.0, 4.0


def several_ranks() -> bool:
    """Return whether torchrun or a similar launcher started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


@cache
def rendezvous_store() -> dist.Store:
    """Return the store at torchrun's address. All ranks share it for the life of this process."""
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://")))
    return store


def should_report(error: BaseException) -> bool:
    """Return whether this rank reports `error`: the first rank that calls this does. Repeated calls agree.

    All ranks raise the same `ConfigError`, so rank 0 reports it.
    """
    if not several_ranks():
        return True
    rank = os.environ["RANK"]
    try:
        if isinstance(error, ConfigError) and rank != "0":
            with contextlib.suppress(RuntimeError):  # time-out
                rendezvous_store().wait([_key()], _RANK_0_FIRST)
        return rendezvous_store().compare_set(_key(), "", rank).decode() == rank
    except RuntimeError:  # the store is gone: two reports are better than none
        return True


@contextlib.contextmanager
def exit_on_peer_failure() -> Iterator[None]:
    """Terminate this process soon after another rank has failed, while the block runs."""
    if not several_ranks():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(_POLL_INTERVAL_S)  # a thread that is in C++ when the interpreter exits would abort the process


def _watch(done: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone: torchrun has ended and terminates this process
        store = rendezvous_store().clone()
        while not done.wait(_POLL_INTERVAL_S):
            if store.check([_key()]):
                # Most ranks fail by themselves when a peer is gone; those exit in order within the delay.
                if not done.wait(_EXIT_DELAY_S):
                    os._exit(1)
                return


def _key() -> str:
    return f"icegrt/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
