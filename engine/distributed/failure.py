"""Of several ranks that fail together one speaks: the one whose failure came first. The others leave in silence.

A rank that fails tears its connections down, and every rank that waited on them fails too, with an error that explains
nothing. The first therefore leaves its number in the store that torchrun's ranks share, before it closes anything.
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

# What all ranks read alike is left to rank 0 for this long, which may still be starting up.
_RANK_0_FIRST = datetime.timedelta(seconds=20)
_LOOK_EVERY_S, _LEAVE_AFTER_S = 1.0, 4.0


def several_ranks() -> bool:
    """Whether torchrun (or its like) started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


@cache
def rendezvous_store() -> dist.Store:
    """The store that torchrun's variables lead to, which all ranks share for as long as this process lives."""
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://")))
    return store


def should_report(error: BaseException) -> bool:
    """Whether this rank is the one that tells people about `error`. The first to ask is; asking again changes nothing.

    A `ConfigError` is every rank's alike, and rank 0's to tell.
    """
    if not several_ranks():
        return True
    rank = os.environ["RANK"]
    try:
        if isinstance(error, ConfigError) and rank != "0":
            with contextlib.suppress(RuntimeError):  # the wait is over
                rendezvous_store().wait([_key()], _RANK_0_FIRST)
        return rendezvous_store().compare_set(_key(), "", rank).decode() == rank
    except RuntimeError:  # nobody is left to agree with: better told twice than never
        return True


@contextlib.contextmanager
def exit_on_peer_failure() -> Iterator[None]:
    """While the block runs, this process ends soon after another rank has failed, wherever it may be waiting."""
    if not several_ranks():
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it torchrun, who ends us
        store = rendezvous_store().clone()
        while not done.wait(_LOOK_EVERY_S):
            if store.check([_key()]):
                # An orderly way out comes first: most ranks notice by themselves that one is missing.
                if not done.wait(_LEAVE_AFTER_S):
                    os._exit(1)
                return


def _key() -> str:
    return f"icegrt/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
