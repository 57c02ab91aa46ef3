"""The rollout with an adapter: tokens of `transformers` with `peft`, from the present weights, without allocations."""

import pytest
import torch

from icegrt.config import OptimizerConfig
from icegrt.packing import pack
from icegrt.ppo.scoring import LogprobScorer
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from tests.helpers import lora_cases as lora
from tests.helpers import tiny_models as tiny
from tests.rollout.test_steady_step import allocations, steps_of

pytestmark = pytest.mark.usefixtures("cluster")
PROMPTS = [[5, 6, 7], [8, 9], [11, 12, 13, 14]]
SPECS = {"all": lora.SPEC, "some": lora.AdapterSpec(3, 9.0, ("k_proj", "o_proj", "gate_proj"))}


def decoder(role, **settings):
    # A stop token beyond the vocabulary is never sampled.
    return Decoder(role.model, [tiny.VOCAB], RolloutSettings(block_size=4, **settings))


def generate(role, sampling=None, existing=None):
    sampling = sampling or Sampling(max_new_tokens=12, temperature=0.0)
    responses = (existing or decoder(role)).stream(PROMPTS, 1, sampling)
    return [response.tokens for response in sorted(responses, key=lambda r: r.prompt_index)]


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_peft(family, case, tmp_path):
    base = tiny.causal_lm(0, family)
    adapted = lora.peft_folder(tmp_path, tiny.causal_lm(0, family), SPECS[case])
    trunk = lora.trunk(base)
    tokens = generate(lora.adapted_role(trunk, tmp_path))
    for prompt, ours in zip(PROMPTS, tokens, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(adapted(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == ours
    # The trunk beside it is not changed.
    assert generate(lora.Role("reference", trunk)) != tokens


def test_sampled_logprobs_are_those_of_the_training_pass(tmp_path):
    lora.peft_folder(tmp_path, tiny.causal_lm(0))
    role = lora.adapted_role(lora.trunk(tiny.causal_lm(0)), tmp_path)
    responses = list(decoder(role).stream(PROMPTS, 2, Sampling(max_new_tokens=12, seed=3)))
    batch = pack([r.prompt for r in responses], [r.tokens for r in responses])
    scored, _ = LogprobScorer(1.0, 64)(role, [batch])
    sampled = torch.tensor([x for response in responses for x in response.logprobs])
    assert float((scored - sampled).abs().max()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_reads_the_weights_after_a_step(dtype, tmp_path):
    lora.peft_folder(tmp_path, tiny.causal_lm(0))
    role = lora.adapted_role(lora.trunk(tiny.causal_lm(0), dtype=dtype), tmp_path, learns=OptimizerConfig())
    kept = decoder(role)
    before = generate(role, existing=kept)
    with torch.no_grad():
        for parameter in role.model.parameters():
            parameter.mul_(-1.5)
    role.model.mark_weights_changed()
    after = generate(role, existing=kept)
    assert after == generate(role) != before


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_steady_decode_step_allocates_nothing(lookahead, tmp_path):
    lora.peft_folder(tmp_path, tiny.causal_lm(0, "qwen2"))
    role = lora.adapted_role(lora.trunk(tiny.causal_lm(0, "qwen2")), tmp_path)
    steady = decoder(role, lookahead=lookahead)
    steady.submit([[5, 6, 7], [8, 9]], 3, Sampling(max_new_tokens=40, seed=3))
    for _ in range(3):
        steady.step()
    assert allocations(lambda: steps_of(steady)) == []
