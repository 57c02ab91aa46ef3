"""Run the `icegrt` command as `python -m icegrt` or `torchrun ... -m icegrt`."""

import os
import sys

from icegrt.cli import main
from icegrt.distributed.failure import several_ranks

# Saving a distributed checkpoint spawns processes that import this module again: without the guard they would run it.
if __name__ == "__main__":
    status = main()
    if status and several_ranks():
        # Threads of gloo, NCCL and the store may still run in C++; the interpreter's exit would abort them (SIGABRT).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
