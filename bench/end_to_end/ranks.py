"""Several ranks of one provider: a worker process each, with the environment variables of torchrun."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

from bench.end_to_end.protocol import COUNT, RUN_FOLDER, STEP, Worker


class RankWorkers:
    """The ranks of a provider, with the methods of a `Worker`.

    Args:
        name, python, module, arguments, log: as of `Worker`.
        threads: of torch in all ranks together; a rank has an equal share.
        ranks: number of processes.
    """

    def __init__(
        self, name: str, python: str, module: str, arguments: list[str], threads: int, log: Path, ranks: int
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory()
        common = {
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            RUN_FOLDER: self._folder.name,
        }
        self._ranks = []
        for rank in range(ranks):
            environment = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            label = f"{name}, rank {rank}"
            self._ranks.append(Worker(label, python, module, arguments, max(1, threads // ranks), log, environment))

    def wait_until_ready(self) -> dict[str, float]:
        """Wait for the end of all warm-ups. Raises `WorkerError` if a process ends. Ranks try no settings."""
        for rank in self._ranks:
            rank.wait_until_ready()
        return {}

    def step(self) -> dict[str, Any]:
        """Run one iteration and return the figures of all ranks. Raises `WorkerError` if a process ends."""
        return merged(self._all(STEP))

    def count(self) -> dict[str, Any]:
        """Run one iteration that counts operations. Raises `WorkerError` if a process ends."""
        return merged_counts(self._all(COUNT))

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.end_input()
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()

    def _all(self, command: str) -> list[dict[str, Any]]:
        for rank in self._ranks:
            rank.send(command)
        return [rank.receive() for rank in self._ranks]


def merged(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of an iteration on several ranks: the times of the last one, and sums of costs.

    Tokens and padding are those of all ranks already. `slowest_over_fastest` divides, for each phase, the most seconds
    of computing of a rank by the fewest.
    """
    last = max(figures, key=lambda one: one["seconds"])
    busy = {phase: [one["busy_phases"][phase] for one in figures] for phase in figures[0]["busy_phases"]}
    return last | {
        "cpu_seconds": sum(one["cpu_seconds"] for one in figures),
        "peak_bytes": sum(one["peak_bytes"] for one in figures),
        "slowest_over_fastest": {phase: max(seconds) / min(seconds) for phase, seconds in busy.items()},
    }


def merged_counts(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the operations of all ranks together."""
    first = figures[0]
    flops = {
        phase: {kind: sum(one["flops"][phase][kind] for one in figures) for kind in kinds}
        for phase, kinds in first["flops"].items()
    }
    return first | {"flops": flops}
