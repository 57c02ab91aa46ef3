"""A script that trains models of 7.6 million parameters with PPO, in a limited amount of private memory.

`python limited_memory.py make FOLDER` writes the models; `run FOLDER OFFLOAD LIMIT` trains an iteration and prints the
peak of private memory beyond that of a run of tiny models. OFFLOAD is `none`, `all` or `host`: all, and the state of
the optimizers on the host. LIMIT is what the operating system grants beyond it, in
bytes; 0: no limit. Shared mappings, which hold what is offloaded, are not counted and not limited.
"""

import resource
import sys
import threading
import time
from pathlib import Path

import torch

from icegrt.errors import RunError
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny

WIDE = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def make(folder: str) -> None:
    """Write the actor and the reward model."""
    for name, model in (("actor", tiny.causal_lm(0, **WIDE)), ("reward", tiny.scorer(1, **WIDE))):
        model.save_pretrained(Path(folder) / name)
        tiny.tokenizer().save_pretrained(Path(folder) / name)


def run(folder: str, offload: str, limit: str) -> None:
    """Train, and print the peak."""
    torch.set_num_threads(1)
    train(
        Path(folder) / f"tiny_{offload}_{limit}", tiny.causal_lm(0), tiny.scorer(1), offload
    )  # loads everything that a run imports
    baseline = private_bytes()
    if int(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (baseline + int(limit),) * 2)
    peak = Peak()
    try:
        train(Path(folder) / f"wide_{offload}_{limit}", f"{folder}/actor", f"{folder}/reward", offload)
        print("completed")
    except (RuntimeError, RunError) as error:
        print("failed:", str(error).splitlines()[0])
    print("peak", peak.stop() - baseline, flush=True)


def train(folder: Path, actor, reward, offload: str) -> None:
    optimizer = tiny.OptimizerConfig(lr=1e-2, on_host=offload == "host")
    config = tiny.ppo_config(
        folder,
        iterations=1,
        offload={"roles": "none" if offload == "none" else "all"},
        optimizer=optimizer,
        critic=tiny.CriticConfig(optimizer=optimizer),
    )
    with PPOTrainer(config, actor, tiny.tokenizer(), [reward, tiny.count_letters], tiny.PROMPTS) as trainer:
        trainer.train()


class Peak:
    """The largest private memory of this process from now on, sampled every two milliseconds."""

    def __init__(self) -> None:
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.done.is_set():
            self.bytes = max(self.bytes, private_bytes())
            time.sleep(0.002)

    def stop(self) -> int:
        """Return the peak."""
        self.done.set()
        self.thread.join()
        return self.bytes


def private_bytes() -> int:
    """Return what RLIMIT_DATA limits: writable private memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](*sys.argv[2:])
