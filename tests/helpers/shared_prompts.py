"""The unshared pass of a plan, and what two passes of one plan must agree in."""

import dataclasses

import torch

from icegrt.distributed.pipeline import fetch
from icegrt.packing import pack, unpack
from icegrt.ppo.scoring import score_sequences, score_values
from tests.helpers.layout_cases import gradients

LOGPROB_LIMIT = 5e-6
GRADIENT_LIMIT = 1e-5


def unshared(plan):
    """Return the plan with the same sequences in the same micro-batches, each with a prompt of its own."""
    tail_multiple = plan.cluster.share.tail_multiple
    batches = [
        dataclasses.replace(pack(*unpack(b), tail_multiple=tail_multiple), action_mask_A=b.action_mask_A)
        for b in plan.batches
    ]
    assert all(not b.group_sizes for b in batches)
    return dataclasses.replace(plan, batches=batches)


def scores_of(run, plan):
    """What the four roles compute in inference, by name, on the host."""
    parts = run.components
    old_A, entropy_A = parts.scorer(parts.actor, plan.batches, entropy=True)
    ref_A, _ = parts.scorer(parts.reference, plan.batches)
    value_A, last_value_N = score_values(parts.critic, plan.batches)
    scores = {"log-probs": old_A, "entropies": entropy_A, "reference": ref_A, "values": value_A, "last": last_value_N}
    rewards = {name: score_sequences(role, plan.batches) for name, role in parts.roles.items() if "reward" in name}
    assert rewards
    return fetch(scores | rewards)


def gradients_of(run, experience, plan):
    """The gradients of actor and critic over all micro-batches of a plan, by Hugging Face name, on rank 0."""
    experience, updater = dataclasses.replace(experience, plan=plan), run.components.updater
    members = list(range(len(plan.batches)))
    return {
        "actor": gradients(run.actor, updater.policy_work(experience, members, 0.1)),
        "critic": gradients(run.critic, updater.critic_work(experience, members)),
    }


class SharedAndUnshared:
    """A callback that compares the shared pass of every iteration with the unshared pass of the same plan."""

    def __init__(self):
        self.plans = []

    def on_scores(self, run, experience):
        plan = experience.plan
        plain = unshared(plan)
        self.plans.append(plan)
        scores, expected = scores_of(run, plan), scores_of(run, plain)
        assert torch.equal(scores["log-probs"], experience.old_logprob_A.cpu()), "inference and this pass are one"
        counted = slice(None) if plan.mask_A is None else plan.mask_A
        for name, x in expected.items():
            index = counted if name in ("log-probs", "entropies", "reference") else slice(None)
            difference = (scores[name] - x)[index].abs()
            # Values and scores are of the size that their head gives them.
            size = 1.0 if "log-prob" in name or name == "reference" else max(1.0, *x.abs().tolist(), 0.0)
            assert difference.numel() == 0 or float(difference.max()) <= LOGPROB_LIMIT * size, (name, size)
        found, wanted = gradients_of(run, experience, plan), gradients_of(run, experience, plain)
        for role, tensors in wanted.items():
            total = sum(float(x.double().square().sum()) for x in tensors.values()) ** 0.5
            off = sum(float((found[role][n] - x).double().square().sum()) for n, x in tensors.items()) ** 0.5
            assert off <= GRADIENT_LIMIT * total, f"{role}: {off / max(total, 1e-30)}"
            assert total > 0 or not tensors
