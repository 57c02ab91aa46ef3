"""`python -m icegrt` and `torchrun ... -m icegrt`: the same as the `icegrt` command."""

import sys

from icegrt.cli import main

# The guard matters: writing a distributed checkpoint spawns processes, which import this module again.
if __name__ == "__main__":
    sys.exit(main())
