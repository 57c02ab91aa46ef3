"""Run a function on several gloo ranks: forked processes with the environment variables of torchrun."""

import faulthandler
import gc
import importlib
import os
import socket
import traceback

import torch
import torch.multiprocessing as mp

from icegrt.distributed.megatron import load_megatron

# What a run imports on use. Ranks inherit these modules: each import would take every rank's time again.
USED_BY_RUNS = (
    "icegrt.kernels.linear.cpp",
    "icegrt.ppo.trainer",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


def launch(world, function, *args, seconds=600):
    """Run `function(*args)` on `world` ranks; fail with the tracebacks of all failed ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    load_megatron()
    for name in USED_BY_RUNS:
        importlib.import_module(name)
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
    # Objects of the parent are never freed here: a process group would wait for threads that a fork does not copy.
    gc.freeze()
    faulthandler.dump_traceback_later(0.9 * seconds)  # shows where a rank hangs
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()})
    try:
        function(*args)
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # without the exit handlers of the parent, which pytest and torch have registered
