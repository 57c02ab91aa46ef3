"""A script: `python planned_run.py FOLDER KEYS...` runs PPO after a run of tiny models.

The tiny run loads everything that a run imports, so that it is no memory of the run that follows.
"""

import sys
from pathlib import Path

from icegrt import cli
from tests.helpers import tiny_models as tiny
from tests.helpers.limited_memory import train


def main() -> int:
    """Run both. Returns the exit status."""
    folder, *keys = sys.argv[1:]
    train(Path(folder), tiny.causal_lm(0), tiny.scorer(1), "none")
    return cli.main(["ppo", *keys])


if __name__ == "__main__":
    sys.exit(main())
