"""CUDA graphs of decode steps: a step of a known size is one launch of the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

# Sizes that decode steps are padded to: at most a third of a step's rows is padding.
_FIRST_BUCKETS = (1, 2, 4, 8)


def batch_buckets(max_sequences: int) -> list[int]:
    """Return the sizes of decode steps that get a graph: 1, 2, 4, 8, 12, 16, 24, 32, 48 and so on."""
    buckets = [*_FIRST_BUCKETS]
    while buckets[-1] < max_sequences:
        last = buckets[-1]
        buckets.append(last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3)
    return [b for b in buckets if b < max_sequences] + [max_sequences]


class StepGraphs:
    """Captures a step the first time that its key is seen, and replays it afterwards.

    A graph reads and writes the static buffers that the step uses: the caller fills them before, and keeps them. All
    graphs share a memory pool.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        """Return the number of captured graphs."""
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step: eagerly and captured for a new key, else by replay.

        Args:
            key: sizes and numbers that the step's launches depend on.
            step: launches kernels on the current stream; it neither waits for the device nor allocates what it returns.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        step()  # compiles kernels and creates handles, which a capture may not
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._graphs[key] = graph
