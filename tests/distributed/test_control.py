"""Waits of all ranks through the store, and the notice that names a rank that hangs."""

import os
import threading
import time

import pytest
import torch.distributed as dist

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.control import Control
from icegrt.distributed.layout import Layout
from icegrt.distributed.monitor import HangMonitor, Position, describe_positions, rank_ranges
from icegrt.errors import RunError
from tests.helpers.ranks import launch


def run_ranks(world, function, **options):
    """Run `function(control)` in a thread per rank; return the results in the order of ranks, and the store."""
    store, results, errors = dist.HashStore(), [None] * world, []

    def run(rank):
        try:
            results[rank] = function(Control(store, rank, world, **options))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results, store


@pytest.mark.parametrize("world", [2, 5])
def test_every_rank_receives_what_all_ranks_sent(world):
    def exchange(control):
        flags = [control.any_rank([control.rank == 1, False, control.rank == 0]) for _ in range(3)]
        gathered = control.gather({"rank": control.rank})
        return flags, gathered, control.broadcast(f"from {control.rank}")

    results, _ = run_ranks(world, exchange)
    for rank, (flags, gathered, message) in enumerate(results):
        assert flags == [[True, False, True]] * 3
        assert gathered == ([{"rank": r} for r in range(world)] if rank == 0 else [])
        assert message == "from 0"


def test_the_store_does_not_grow_with_messages():
    def exchange(control):
        for _ in range(20):
            control.any_rank([True])
            control.gather(b"x" * 100)
            control.broadcast(b"y" * 100)
        control.any_rank()  # every rank has read the broadcast
        time.sleep(0.2)
        return control._store.num_keys()

    results, store = run_ranks(3, exchange)
    assert store.num_keys() == 3, results  # which process each rank is


def test_no_rank_leaves_a_barrier_before_the_last_has_arrived():
    arrived, left_early = [], []

    def enter(control):
        time.sleep(0.05 * control.rank)
        arrived.append(control.rank)
        control.any_rank()
        if len(arrived) < control.world_size:
            left_early.append(control.rank)

    run_ranks(4, enter)
    assert not left_early


def test_a_wait_ends_with_an_error_at_its_limit():
    def enter(control):
        if control.rank == 0:
            control.any_rank()

    with pytest.raises(RunError, match="did not arrive within"):
        run_ranks(2, enter, wait_limit_s=0.2)


def wait_for_a_killed_rank():
    with Cluster.open(Layout()) as opened:
        opened.barrier()
        if opened.rank == 1:
            os._exit(0)  # as a kill: without a word to the other rank
        with pytest.raises(RunError, match="rank 1 has ended"):
            opened.barrier()
        os._exit(0)


def test_a_rank_does_not_wait_for_one_that_was_killed():
    launch(2, wait_for_a_killed_rank, seconds=60)


def test_a_hanging_rank_is_named_with_what_the_others_wait_for():
    notices, released = [], threading.Event()

    def run(control):
        monitor = HangMonitor(control, notices.append, poll_s=0.02, notice_s=0.2)
        monitor.phase = "update of iteration 3"
        waiter = Control(control._store, control.rank, control.world_size)
        if control.rank == 2:
            monitor.phase = "score of iteration 3"
            while not notices:  # a reward function that does not return
                time.sleep(0.01)
            released.set()
        waiter.any_rank()
        monitor.stop()

    run_ranks(4, run)
    assert released.is_set()
    assert notices[0].startswith("no rank has gone on for")
    first, second = notices[0].split("; ")[1:3]
    assert first.startswith("rank 2: running") and "in the phase score of iteration 3" in first
    assert second.startswith("ranks 0-1, 3: waiting in any_rank") and "update of iteration 3" in second
    assert len(notices) == 1, "one rank prints"


def test_positions_name_the_rank_that_computes_first():
    waits = Position("update", "icegrt.ppo.update.run (line 9)", "all_reduce", 130.0)
    runs = Position("update", "icegrt.rewards.function.call (line 5)", "", 130.0)
    text = describe_positions({0: waits, 1: waits, 2: runs, 3: waits, 4: None})
    assert text.split("; ") == [
        "rank 2: running, icegrt.rewards.function.call (line 5) in the phase update",
        "rank 4: no sign since the start",
        "ranks 0-1, 3: waiting in all_reduce, icegrt.ppo.update.run (line 9) in the phase update",
    ]


def test_ranks_read_as_ranges():
    assert rank_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
