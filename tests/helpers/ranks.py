"""Gloo ranks for tests: processes forked from this one, with the environment that torchrun would give them."""

import faulthandler
import gc
import os
import socket
import traceback

import torch
import torch.multiprocessing as mp


def launch(world, function, *args, seconds=600):
    """Run `function(*args)` on `world` ranks; any rank's failure fails the test, with every rank's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gc.collect()
    context = mp.get_context("fork")
    failures = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(r, world, port, failures, seconds, function, args)) for r in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    stuck = [r for r, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    errors = []
    while not failures.empty():
        errors.append(failures.get())
    failed = [r for r, process in enumerate(ranks) if process.exitcode != 0 and r not in stuck]
    assert not (errors or stuck or failed), "\n".join([f"stuck: {stuck}, failed: {failed}", *errors])


def _rank(rank, world, port, failures, seconds, function, args):
    torch.set_num_threads(1)
    # What the parent still holds stays unfreed here: a process group would wait for threads that no fork takes along.
    gc.freeze()
    faulthandler.dump_traceback_later(0.9 * seconds)  # where a rank is stuck, should it be
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()})
    try:
        function(*args)
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
