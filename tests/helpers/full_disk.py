"""Run `icegrt ppo` on a disk that is full for some iterations: FIRST LAST ppo.key=VALUE ... (python -m).

From the rollout of FIRST to the end of LAST no file grows beyond a few bytes, which the system enforces
(RLIMIT_FSIZE). It is a process of its own: the limit holds for every file that the process writes. Pipes are exempt.
"""

import resource
import sys

from icegrt.config import PPOConfig
from icegrt.errors import UserError, note_of
from icegrt.ppo.trainer import PPOTrainer

BYTES = 16


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class FullDisk:
    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_rollout(self, run, responses):
        if run.done_steps + 1 == self.first:
            limit_file_size(BYTES)

    def on_update(self, run, row):
        if run.done_steps == self.last:
            limit_file_size(resource.RLIM_INFINITY)


if __name__ == "__main__":
    first, last, *keys = sys.argv[1:]
    try:
        with PPOTrainer(PPOConfig.load(None, keys), callbacks=[FullDisk(int(first), int(last))]) as trainer:
            trainer.train()
    except UserError as error:
        sys.exit(f"error: {error}\n{note_of(error)}")
