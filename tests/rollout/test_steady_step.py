"""A steady decode step allocates no memory of torch, from its plan to its tokens on the host.

Steady: every sequence decodes, none joins or leaves, all have the same settings. Python and numpy objects of the host
are not counted. The claim is for one pipeline stage: a pipeline copies what it sends.
"""

import pytest
import torch

from icegrt.rollout.decoder import Decoder
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.stage import DecodeStage
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = 12  # sequences enter a new block of the cache within


def steady_decoder(family, sampling, dtype=torch.float32, **settings):
    """A decoder whose sequences all decode."""
    # A stop token beyond the vocabulary is never sampled.
    model = tiny.role(tiny.causal_lm(0, family), dtype=dtype).model
    decoder = Decoder(model, [tiny.VOCAB], RolloutSettings(block_size=4, **settings))
    decoder.submit([[5, 6, 7], [8, 9]], 3, sampling)
    for _ in range(3):
        decoder.step()
    return decoder


def allocations(run):
    """Return the sizes of the allocations that torch's CPU allocator makes during a call, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    records = (e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return [size for size in records if size > 0]


def steps_of(decoder):
    unfinished = decoder.n_unfinished
    sampled = decoder.stats.sampled_tokens
    for _ in range(STEPS):
        decoder.step()
    assert decoder.n_unfinished == unfinished, "the steps were not steady"
    assert decoder.stats.sampled_tokens == sampled + STEPS * unfinished


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        ("llama", Sampling(max_new_tokens=40, temperature=0.0)),
        ("qwen2", Sampling(max_new_tokens=40, seed=3)),
        ("qwen3", Sampling(max_new_tokens=40, seed=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)),
    ],
    ids=["greedy", "biases", "norms of queries, truncated sampling"],
)
def test_a_steady_decode_step_allocates_nothing(family, sampling, lookahead, dtype):
    decoder = steady_decoder(family, sampling, dtype, lookahead=lookahead)
    assert allocations(lambda: steps_of(decoder)) == []


def test_an_allocation_in_a_layer_is_seen(monkeypatch):
    decoder = steady_decoder("llama", Sampling(max_new_tokens=40, temperature=0.0))
    reduce = DecodeStage._reduce

    def with_copy(stage, x):
        reduce(stage, x.copy_(x.clone()))

    monkeypatch.setattr(DecodeStage, "_reduce", with_copy)
    copies = STEPS * 2 * len(decoder.model.layer_indices)
    assert allocations(lambda: steps_of(decoder)) == [6 * 32 * 4] * copies
