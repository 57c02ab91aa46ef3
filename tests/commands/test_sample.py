"""Answers for rankings: complete per prompt, in order, and diverse where temperatures are given."""

import pytest

from icegrt.commands.sample import answers, diverse_answers
from icegrt.data import Prompt
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

PROMPTS = [Prompt([1, 5 + n, 6], f"row {n}", {}) for n in range(5)]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=6, seed=2)


def engine(max_batch):
    return RolloutEngine(tiny.role(tiny.causal_lm()).model, tiny.tokenizer(), max_batch=max_batch)


def test_every_prompt_comes_once_with_all_its_answers_in_order():
    answered = list(answers(engine(4), PROMPTS, 3, SAMPLING))
    assert [prompt.where for prompt, _ in answered] == [p.where for p in PROMPTS]
    assert all([r.sample for r in responses] == [0, 1, 2] for _, responses in answered)
    assert all(r.prompt == prompt.tokens for prompt, responses in answered for r in responses)


def test_samples_take_turns_at_the_temperatures_whatever_the_batch():
    wide, narrow = (list(diverse_answers(engine(b), PROMPTS, 4, SAMPLING, [0.0, 2.0])) for b in (64, 2))
    for (_, from_wide), (_, from_narrow) in zip(wide, narrow, strict=True):
        assert [r.tokens for r in from_wide] == [r.tokens for r in from_narrow]
    for _, responses in wide:
        cold, hot = (responses[i].tokens for i in (0, 2)), [responses[i].tokens for i in (1, 3)]
        assert len({tuple(tokens) for tokens in cold}) == 1 and [r.sample for r in responses] == [0, 1, 2, 3]
        assert hot[0] != responses[0].tokens or hot[1] != responses[0].tokens
    assert len({tuple(r.tokens) for _, responses in wide for r in responses[1::2]}) > len(PROMPTS)
