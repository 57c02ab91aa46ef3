"""Shared prompts in a rehearsal: rows and attention are counted once, and nothing waits for the device."""

from collections import Counter

import pytest
import torch

from icegrt.model.attention import packed_causal_attention
from icegrt.model.shared_prompts import PromptGroups
from icegrt.packing import pack
from icegrt.rehearsal.counts import TO_DEVICE
from icegrt.rehearsal.phases import ACTOR, CRITIC, INFERENCE
from icegrt.rehearsal.workload import Workload
from tests.helpers.rehearsals import played_gpu, rehearse_rank, small_config, write_model

HEADS, DIM = 4, 16


def visible_pairs(prompt, response, window=None):
    """Pairs of query and key of one response, counted one by one."""
    limit = window or prompt + response
    return sum(min(prompt + i + 1, limit) for i in range(response))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_counts_a_shared_prompt_once(window):
    prompts, responses = [[1] * 7] * 3 + [[2] * 4], [[3] * n for n in (6, 2, 9, 8)]
    batch = pack(prompts, responses, share_prompts=True)
    with played_gpu() as counts:
        on_device = batch.to(torch.device("meta"))
        groups = PromptGroups(batch.lengths, batch.group_sizes, on_device.cu_seqlens, on_device.cu_groups)
        shapes = [(batch.n_tokens, n, DIM) for n in (HEADS, 2, 2)]
        heads = [torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes]
        packed_causal_attention(*heads, batch.lengths, window, groups=groups).sum().backward()
    pairs = visible_pairs(0, 7, window) + sum(visible_pairs(7, n, window) for n in (6, 2, 9))
    pairs += visible_pairs(0, 4 + 8, window)
    assert counts.product_flops == {"bfloat16": 14 * HEADS * DIM * pairs}
    steps = Counter(name for name, _ in counts.launches.elements() if name.startswith("attention_"))
    calls = 2 if window is None else 1
    assert steps["attention_forward"] == calls


def waits_and_copies(counts):
    found = Counter()
    for name in (INFERENCE, ACTOR, CRITIC):
        phase = counts.watcher.phases[name]
        found.update(phase.syncs)
        for copy, total in phase.copies.items():
            if copy.direction == TO_DEVICE and copy.is_blocking:
                found["copy", copy.site] += total.count
    return found


def test_an_iteration_has_every_prompt_once_and_waits_for_no_micro_batch(tmp_path):
    model = write_model(tmp_path / "model")
    keys = ("ppo.samples_per_prompt=4", "ppo.minibatch_by=prompt", "ppo.token_budget=400")
    counts = rehearse_rank(small_config(model, *keys), world_size=1)
    assert counts.tokens - counts.tail_tokens == 8 * 48 + 8 * 4 * 32
    doubled = rehearse_rank(small_config(model, *keys, "ppo.prompts_per_iteration=16"), world_size=1)
    assert doubled.micro_batches == 2 * counts.micro_batches == 8
    assert waits_and_copies(doubled) == waits_and_copies(counts)


def test_prompts_of_a_workload_differ():
    prompts = Workload([2] * 400, [], 1, 1, "fixed").prompt_tokens(100)
    assert len(set(map(tuple, prompts))) == 400
