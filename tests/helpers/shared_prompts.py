"""The unshared pass of a plan, and what two passes of one plan must agree in."""

import dataclasses
import math
import tempfile

import torch
from transformers import AutoModelForCausalLM

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


@torch.no_grad()
def logprobs_in_fp64(run, plan):
    """The log-probs of an unshared plan's actions by transformers in fp64; of one process."""
    with tempfile.TemporaryDirectory() as folder:
        path = run.actor.save_pretrained(f"{folder}/actor", "fp32")
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double()
    logprobs = []
    for batch in plan.batches:
        sequences = [tokens for tokens in batch.tokens_T.split(list(batch.lengths)) if tokens.numel()]
        logits = torch.cat([model(tokens[None]).logits[0] for tokens in sequences])[batch.action_rows_A]
        logprobs.append(logits.log_softmax(-1).gather(1, batch.action_tokens_A[:, None].long()).squeeze(1))
    return torch.cat(logprobs)


class SharedAndUnshared:
    """A callback that compares the shared pass of every iteration with the unshared pass of the same plan.

    In one process its log-probs are also within `LOGPROB_LIMIT` of those in fp64, as those of the unshared pass are.
    """

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
            # Log-probs are of the size of those of a uniform distribution, or larger, and both passes are rounded.
            # Values and scores are of the size that their head gives them.
            usual = math.log(run.actor.model.vocab_limit) if "log-prob" in name or name == "reference" else 1.0
            size = max(1.0, *(x.abs() / usual).tolist(), 0.0)
            largest = float(difference.max()) if difference.numel() else 0.0
            assert largest <= LOGPROB_LIMIT * size, (name, size, largest)
        if run.cluster.world_size == 1:
            truth = logprobs_in_fp64(run, plain)
            for passed in (scores, expected):
                off = (passed["log-probs"].double() - truth)[counted].abs()
                assert float(off.max()) <= LOGPROB_LIMIT
        found, wanted = gradients_of(run, experience, plan), gradients_of(run, experience, plain)
        for role, tensors in wanted.items():
            total = sum(float(x.double().square().sum()) for x in tensors.values()) ** 0.5
            off = sum(float((found[role][n] - x).double().square().sum()) for n, x in tensors.items()) ** 0.5
            assert off <= GRADIENT_LIMIT * total, f"{role}: {off / max(total, 1e-30)}"
            assert total > 0 or not tensors
