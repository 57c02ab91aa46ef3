"""Check what roles and reward sources say of the responses, before losses and KL receive it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.errors import RewardError, RunError
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.rewards import RewardOutputs
from icegrt.roles.role import Role, weights_are_finite

_REMEDY = {
    "actor": "Lower ppo.optimizer.lr, or set ppo.run.dtype=fp32",
    "critic": "Lower ppo.critic.optimizer.lr, or set ppo.run.dtype=fp32",
    "reference": "Set ppo.reference to a sound checkpoint, or ppo.run.dtype=fp32",
}


def check_logprobs(
    iteration: int,
    plan: BatchPlan,
    prompts: Sequence[Prompt],
    roles: Mapping[str, Role],
    cluster: Cluster,
    **streams_A: Tensor,
) -> None:
    """Raise `RunError` if a log-prob or value of a counted token is no number, before losses and KL receive it.

    Args:
        iteration: for the message.
        plan: this rank's responses.
        prompts: of the iteration.
        roles: by name.
        cluster: the ranks.
        streams_A: by what is named in the message. An infinite log-prob of the reference is valid.

    Shape:
        streams_A: (A) each, on the device.
    """
    bad = {name: x_A.isnan() if name == "reference" else ~x_A.isfinite() for name, x_A in streams_A.items()}
    if plan.mask_A is not None:
        mask_A = plan.mask_A.to(cluster.device, non_blocking=True)
        bad = {name: bad_A & mask_A for name, bad_A in bad.items()}
    # The host waits for the device once, unless there is something to report.
    has_bad = dict(zip(bad, torch.stack([bad_A.any() for bad_A in bad.values()]).tolist(), strict=True))
    for name, x_A in streams_A.items():
        if not has_bad[name]:
            continue
        bad_A = bad[name]
        action = int(bad_A.nonzero()[0])
        n = int(torch.searchsorted(plan.cu_actions, action, right=True)) - 1
        response = plan.local_responses[n]
        role = roles[name]
        what = "a value" if name == "critic" else "a log-prob"
        weights = "are finite" if weights_are_finite(role) else "are not finite"
        raise RunError(
            f"iteration {iteration}: the {name} gives {what} of {float(x_A[action])} to token "
            f"{action - int(plan.cu_actions[n]) + 1} of response {response.sequence_id} "
            f"({prompts[response.prompt_index].where}); its weights {weights}. {_REMEDY[name]}"
        )


def require_one_score(rewards: RewardOutputs) -> None:
    """Raise `RewardError` if every response of every rank was dropped."""
    if bool(rewards.dropped_N.all()):
        error = next((e for source in rewards.sources for e in source.errors if e), "")
        raise RewardError(f"every response of an iteration was dropped, so there is nothing to learn from: {error}")


@contextlib.contextmanager
def locate_reward_errors(where: str) -> Iterator[None]:
    """Prefix the message of a `RewardError` with the part of the run that it ends."""
    try:
        yield
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error
