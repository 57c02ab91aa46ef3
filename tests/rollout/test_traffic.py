"""What a rollout reads and computes: prompts once, keys and values that are held, and few blocks that are not full."""

import numpy as np
import pytest

from icegrt.ppo.trainer import PPOTrainer
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

SAMPLES = 8


def test_the_rollout_of_an_iteration_computes_each_prompt_once_and_reads_what_is_held(tmp_path, monkeypatch):
    decoders, drawn, totals = [], [], []
    build, release = Decoder.__init__, Decoder.release

    def built(decoder, *args, **kwargs):
        build(decoder, *args, **kwargs)
        decoders.append(decoder)

    def released(decoder):
        if decoder.storage is not None:
            totals.append(decoder.storage.groups[0].scheduler.stats())
        release(decoder)

    monkeypatch.setattr(Decoder, "__init__", built)
    monkeypatch.setattr(Decoder, "release", released)
    recorder = type("Recorder", (), {"on_rollout": lambda self, run, responses: drawn.extend(responses)})()
    config = tiny.ppo_config(
        tmp_path, minibatch_by="prompt", samples_per_prompt=SAMPLES, token_budget=400, iterations=1
    )
    run = PPOTrainer(config, tiny.causal_lm(), tiny.tokenizer(), [tiny.scorer(1)], tiny.PROMPTS, callbacks=[recorder])
    run.step()
    run.close()
    (decoder,) = (d for d in decoders if d.stats.steps)
    prompts = {r.prompt_index: r.prompt for r in drawn}
    assert len(drawn) == SAMPLES * len(prompts) == SAMPLES * 4
    (stats,) = totals
    # 1. Every prompt is computed once, and shared with the other samples.
    once = sum(map(len, prompts.values()))
    assert stats["prompt_tokens"] - stats["shared_tokens"] - stats["reused_tokens"] <= once
    sampled = sum(len(r.tokens) for r in drawn)
    # The first token of a sample comes from the prompt's last row, every other one from a row of its own.
    assert decoder.stats.rows == once - stats["reused_tokens"] + sampled - len(drawn)
    # 2. Token t of a response reads the keys and values of the prompt and of the tokens before it.
    held = sum(len(r.prompt) + t for r in drawn for t in range(1, len(r.tokens)))
    assert decoder.stats.kv_tokens_read == held


def test_less_than_a_twenty_fifth_of_the_blocks_memory_is_wasted_at_the_fullest_step():
    rng = np.random.default_rng(0)
    model = tiny.role(tiny.causal_lm(0, max_position_embeddings=1024)).model
    decoder = Decoder(model, [tiny.VOCAB], RolloutSettings(block_size=16, token_budget=8192))
    lengths = rng.integers(200, 600, 24).tolist()
    for number, length in enumerate(lengths):
        prompt = rng.integers(2, tiny.VOCAB, length).tolist()
        decoder.submit([prompt], 1, Sampling(max_new_tokens=24, seed=1), first_sequence_id=number)
    fullest = (0, 0)
    while decoder.n_unfinished:
        decoder.step()
        scheduler = decoder.storage.groups[0].scheduler
        tokens = sum(len(s.prompt) + max(0, s.n_sampled - 1) for s in decoder._sequences.values())
        fullest = max(fullest, ((scheduler.n_blocks - scheduler.blocks_available) * scheduler.block_size, tokens))
    capacity, tokens = fullest
    assert capacity >= tokens > sum(lengths)
    assert (capacity - tokens) / tokens < 0.04
