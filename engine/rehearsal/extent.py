"""A rehearsal of the micro-batches and steps that set the peaks of memory, in place of all of an iteration.

The batch plan is that of the whole iteration. Micro-batches of a phase differ in their sizes alone, and a peak is that
of the largest ones: of these as many run as are alive at a time. Of each role's optimizer steps two run: the first,
which allocates the optimizer's state in some optimizers, and the one with the largest micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from icegrt.distributed.cpu_backend import Patches
from icegrt.ppo.update import Updater
from icegrt.roles.role import Role, TrainableRole


@contextlib.contextmanager
def largest_work(pipeline: int) -> Iterator[None]:
    """Let roles run the largest micro-batches of a pass alone, and two of an update's optimizer steps.

    What the other micro-batches would return is allocated.

    Args:
        pipeline: pipeline-parallel size; as many micro-batches are in flight, and one more is on its way.
    """
    count = pipeline + 1
    score, train_step, steps = Role.score, TrainableRole.train_step, Updater._steps

    def scored(role: Role, batches: Sequence[Any], read: Any, sizes: Any) -> list[tuple[torch.Tensor, ...]]:
        chosen = _largest(batches, count)
        rows = iter(score(role, [batches[i] for i in chosen], read, sizes))
        return [
            next(rows) if i in chosen else tuple(torch.empty(n, device=role.device) for n in sizes(batch))
            for i, batch in enumerate(batches)
        ]

    def trained(role: TrainableRole, work: Sequence[Any], lr: float | None = None) -> Any:
        return train_step(role, [work[i] for i in _largest([item.batch for item in work], count)], lr)

    def chosen_steps(updater: Updater, experience: Any, *args: Any) -> Iterator[tuple[int, list[int], float]]:
        yield from _chosen_steps(list(steps(updater, experience, *args)), experience.plan.batches)

    with Patches() as patches:
        patches.set(Role, "score", scored)
        patches.set(TrainableRole, "train_step", trained)
        patches.set(Updater, "_steps", chosen_steps)
        yield


def _chosen_steps(steps: list[tuple[int, list[int], float]], batches: Sequence[Any]) -> list[Any]:
    """Return the first step, and of the others the one with the largest micro-batch; a role may have none."""
    first, others = steps[:1], steps[1:]
    return [*first, *sorted(others, key=lambda step: max(_size(batches[i]) for i in step[1]))[-1:]]


def _largest(batches: Sequence[Any], count: int) -> list[int]:
    """Return the indices of the largest micro-batches and of the one with most actions, ascending.

    The micro-batch before the largest one is among them: its results are alive still.
    """
    ordered = sorted(range(len(batches)), key=lambda i: _size(batches[i]), reverse=True)
    actions = max(range(len(batches)), key=lambda i: batches[i].n_actions)
    return sorted({*ordered[:count], actions, *(max(i - 1, 0) for i in (ordered[0], actions))})


def _size(batch: Any) -> tuple[int, int]:
    return batch.n_tokens, batch.n_actions
