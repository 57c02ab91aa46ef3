"""The ways to run an iteration that the bench compares, and the processes that run them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.end_to_end.protocol import ROOT, Worker
from bench.end_to_end.ranks import RankWorkers
from bench.end_to_end.workloads import Workload

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
# Modes of icegrt: overrides of the configuration.
MODES = {
    "icegrt": (),
    "icegrt, prompts shared": ("ppo.minibatch_by=prompt",),
    "icegrt, lora": ("ppo.sharing=lora", "ppo.critic.init=actor"),
    "icegrt, reused log-probs": ("ppo.reuse_update_logprob=true", "ppo.kl_logprobs=rollout"),
    "icegrt, reused log-probs and values": (
        "ppo.reuse_update_logprob=true",
        "ppo.kl_logprobs=rollout",
        "ppo.reuse_update_values=true",
    ),
}
RANKS = 2
# Episodes of a padded batch; a workload is tried with the four largest that it can fill.
BATCHES, TRIED = (2, 4, 8, 16, 32, 64), 4
# Tokens of a batch of transformers' continuous batching.
BATCH_TOKENS = (64, 128, 256, 512)
REFERENCE, TRL, CONTINUOUS = "reference", "TRL", "transformers continuous batching"
PEERS = {"reference": REFERENCE, "TRL": TRL, "continuous": CONTINUOUS}


@dataclass(frozen=True)
class Provider:
    """A way to run an iteration.

    Attributes:
        name: of its rows; the setting that it chose is added to it.
        family: providers of one family are modes of one library.
        python: interpreter.
        module, arguments: of the worker.
        ranks: processes that share the threads.
        is_rollout_only: it samples and trains nothing.
    """

    name: str
    family: str
    python: str
    module: str
    arguments: tuple[str, ...]
    ranks: int = 1
    is_rollout_only: bool = False

    def at(self, settings: dict[str, float]) -> Provider:
        """Return the provider named with the fastest of the settings, {setting: seconds}, if it tried any."""
        if not settings:
            return self
        return replace(self, name=f"{self.name}, {min(settings, key=settings.__getitem__)}")

    def start(self, options: argparse.Namespace) -> Worker | RankWorkers:
        """Start its process or processes; they are not waited for."""
        process = self.name, self.python, self.module, [*self.arguments], options.threads, options.log
        return Worker(*process) if self.ranks == 1 else RankWorkers(*process, self.ranks)


def providers(workload: Workload, dtype: str, peers: Sequence[str], threads: int = 1) -> list[Provider]:
    """Return all providers of a workload.

    Args:
        workload: what they run.
        dtype: "fp32" or "bf16".
        peers: keys of PEERS.
        threads: with at least RANKS of them, icegrt also runs on as many ranks.
    """
    work = (workload.name, dtype)
    rows = tuple(str(rows) for rows in BATCHES if rows <= workload.episodes)[-TRIED:]
    ours, made = "bench.end_to_end.icegrt_worker", []
    for name, keys in MODES.items():
        if name == "icegrt, prompts shared" and workload.samples == 1:
            continue
        made.append(Provider(name, "icegrt", sys.executable, ours, (*work, *keys)))
    if threads >= RANKS:
        name = f"icegrt, {RANKS} ranks"
        made.append(Provider(name, "icegrt ranks", sys.executable, ours, work, RANKS))
    if "reference" in peers:
        module = "bench.end_to_end.reference_worker"
        made.append(Provider(REFERENCE, REFERENCE, sys.executable, module, (*work, *rows)))
        if workload.stop_tokens:  # answers of many lengths
            name = f"{REFERENCE} by length"
            made.append(Provider(name, name, sys.executable, module, (*work, *rows, "--by-length")))
    if "TRL" in peers:
        made.append(Provider(TRL, TRL, str(PEERS_PYTHON), "bench.peers.trl_worker", (*work, *rows)))
    if "continuous" in peers:
        arguments = (*work, *map(str, BATCH_TOKENS))
        module = "bench.peers.continuous_worker"
        made.append(Provider(CONTINUOUS, CONTINUOUS, sys.executable, module, arguments, is_rollout_only=True))
    return made
