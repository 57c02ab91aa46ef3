"""Start a command once per rank on this machine. torchrun would print a long traceback on Ctrl-C."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence

__all__ = ["cores", "launch", "ranks"]


def ranks(limit: int) -> int:
    """Return the number of ranks to start: 1 under torchrun and on a GPU, else one per core and at most `limit`."""
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.is_available():
        return 1
    return min(cores(), limit)


def cores() -> int:
    """Return the number of cores that this process may use; a container can restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` ranks and wait for all. Ctrl-C or SIGTERM ends the ranks too.

    Returns:
        The exit status of the first rank that failed, or 0.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the ranks have ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Ranks that a torchrun process starts are not its own: with these variables they would join its store.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // count)), **inherited}
    environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes = []
    try:
        for rank in range(count):
            rank_environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a new session, a rank does not get Ctrl-C. This process ends it by SIGTERM.
            processes.append(subprocess.Popen(command, env=rank_environment, start_new_session=True))
        statuses = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return next((abs(status) for status in statuses if status), 0)
