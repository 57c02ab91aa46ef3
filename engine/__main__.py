"""Run the `icegrt` command as `python -m icegrt` or `torchrun ... -m icegrt`."""

import sys

from icegrt.cli import main

# Saving a distributed checkpoint spawns processes that import this module again: without the guard they would run it.
if __name__ == "__main__":
    sys.exit(main())
