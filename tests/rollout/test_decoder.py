"""Rollouts: the same tokens and log-probs whoever shares the batch, those of scoring, and answers that end properly.

On a CPU in fp32 the log-probs of a sequence have the same bits in every batch, since each kernel computes a row by
itself.
"""

import pytest
import torch

from icegrt.data.tokenization import plain_prompt_tokens
from icegrt.errors import ConfigError, DataError
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.scoring import LogprobScorer
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.engine import RolloutEngine, stop_ids
from icegrt.rollout.micro_group import MicroGroup
from icegrt.rollout.model_runner import ModelRunner
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny
from tests.helpers.data_rows import make_tokenizer

pytestmark = pytest.mark.usefixtures("cluster")

STOPS = [tiny.EOS, *range(40, 46)]  # seven of 61 tokens end an answer: lengths vary
SAMPLING = Sampling(max_new_tokens=16, seed=3)
PROMPTS = [[7], [5, 6, 7, 8, 9], [33, 12, 4], [9] * 20, [2, 3], [50, 51, 52]]


@pytest.fixture(scope="module")
def lm():
    return tiny.causal_lm(0)


@pytest.fixture(scope="module")
def actor(lm):
    return tiny.role(lm)


def draw(actor, prompts=PROMPTS, samples=3, sampling=SAMPLING, first=0, stops=STOPS, **settings):
    """Responses by sequence id."""
    decoder = Decoder(actor.model, stops, RolloutSettings(**settings))
    return {r.sequence_id: r for r in decoder.stream(prompts, samples, sampling, first)}


def results_of(responses):
    """Tokens and log-probs by sequence id."""
    return {number: (response.tokens, response.logprobs) for number, response in responses.items()}


@pytest.fixture(scope="module")
def sampled(actor):
    return draw(actor)


def watch(monkeypatch):
    """Rows of every forward pass."""
    rows = []
    forward = ModelRunner.forward

    def counted(self, group, step, chunk):
        rows.append(step.size.rows)
        return forward(self, group, step, chunk)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return rows


@pytest.mark.parametrize("max_batch", [1, 2, 4, 7, 17])
def test_a_response_does_not_depend_on_the_size_of_the_batch(max_batch, actor, sampled):
    # Batches of 2 and 4 also cut the three copies of a prompt apart, and 1 and 2 are fewer than the copies.
    repeated = draw(actor, max_batch=max_batch)
    assert results_of(repeated) == results_of(sampled)
    assert {n: (r.prompt_index, r.sample) for n, r in repeated.items()} == {n: divmod(n, 3) for n in range(18)}


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 1},
        {"block_size": 64},
        {"token_budget": 5, "max_batch": 4},  # the longest prompt takes four steps, beside sequences that decode
        {"lookahead": 1},
        {"lookahead": 1, "token_budget": 5, "max_batch": 4},
        {"order": "longest_remaining", "max_batch": 3},
        {"reuse_prefixes": False, "max_batch": 2},
    ],
)
def test_a_response_does_not_depend_on_how_steps_are_planned(settings, actor, sampled):
    repeated = draw(actor, **settings)
    assert results_of(repeated) == results_of(sampled)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_response_does_not_depend_on_preemptions_in_a_small_cache(lookahead, actor, sampled):
    decoder = Decoder(actor.model, STOPS, RolloutSettings(block_size=2, kv_memory=12_000, lookahead=lookahead))
    repeated = {r.sequence_id: r for r in decoder.stream(PROMPTS, 3, SAMPLING)}
    assert results_of(repeated) == results_of(sampled)
    assert sum(group.scheduler.stats()["preemptions"] for group in decoder.storage.groups) > 5


def test_a_response_does_not_depend_on_who_shares_the_batch(actor, sampled):
    for prompt, tokens in enumerate(PROMPTS):
        subset = draw(actor, [tokens], first=3 * prompt)
        assert results_of(subset) == results_of({n: sampled[n] for n in subset})


def test_a_response_does_not_depend_on_the_order_of_the_prompts(actor):
    one_each = draw(actor, samples=1)
    backwards = {}
    for last in range(len(PROMPTS), 0, -2):  # pairs of neighbours, from the end
        backwards |= draw(actor, PROMPTS[last - 2 : last], samples=1, first=last - 2)
    assert results_of(backwards) == results_of(one_each)


def test_samples_and_seeds_differ(actor, sampled):
    assert len({tuple(sampled[n].tokens) for n in (3, 4, 5)}) > 1
    reseeded = draw(actor, sampling=Sampling(max_new_tokens=16, seed=4))
    assert {n: r.tokens for n, r in reseeded.items()} != {n: r.tokens for n, r in sampled.items()}


def test_greedy_is_that_of_transformers(lm, actor):
    greedy = draw(actor, samples=1, sampling=Sampling(temperature=0.0, max_new_tokens=16))
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        hf_tokens = lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=STOPS,
            pad_token_id=tiny.PAD,
        )  # fmt: skip
        assert greedy[n].tokens == hf_tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_logprobs_are_those_of_scoring(temperature, actor):
    responses = list(draw(actor, sampling=Sampling(temperature, max_new_tokens=16, seed=3)).values())
    planned = plan_batches(responses, 64, 1)
    scored_A, _ = LogprobScorer(temperature, 16)(actor, planned.batches)
    rolled_A = torch.tensor([x for r in planned.local_responses for x in r.logprobs])
    assert (scored_A - rolled_A).abs().max() < 1e-4
    assert len(planned.batches) > 2 and rolled_A.max() < 0


def test_what_the_cache_never_held_does_not_count(actor, monkeypatch, sampled):
    # Fresh memory holds anything.
    original = torch.empty

    def poisoned(*size, **options):
        tensor = original(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    repeated = draw(actor)
    assert {n: r.tokens for n, r in repeated.items()} == {n: r.tokens for n, r in sampled.items()}
    assert all(x == x for r in repeated.values() for x in r.logprobs)


def test_an_answer_ends_with_its_stop_token_or_is_truncated(sampled):
    reasons = set()
    for response in sampled.values():
        stopped = response.tokens[-1] in STOPS
        assert not set(response.tokens[:-1]) & set(STOPS)
        assert response.finish_reason == ("stop" if stopped else "length")
        assert response.truncated is not stopped
        assert stopped or len(response.tokens) == 16
        assert len(response.logprobs) == len(response.tokens)
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_token_in_the_last_place_is_not_a_truncation(actor, sampled):
    response = next(r for r in sampled.values() if r.finish_reason == "stop" and 1 < len(r.tokens) < 16)
    sampling = Sampling(max_new_tokens=len(response.tokens), seed=3)
    repeated = draw(actor, sampling=sampling)[response.sequence_id]
    assert repeated.tokens == response.tokens and repeated.finish_reason == "stop"


def test_finished_sequences_leave_the_batch_and_prompts_are_read_once(actor, sampled, monkeypatch):
    rows = watch(monkeypatch)
    draw(actor)
    assert rows[0] == sum(map(len, PROMPTS))
    longest = max(len(r.tokens) for r in sampled.values())
    alive = [sum(len(r.tokens) > step for r in sampled.values()) for step in range(1, longest)]
    assert rows[1:] == alive and alive[-1] < alive[0]


def test_more_copies_than_the_batch_holds(actor, monkeypatch):
    sizes = []
    prepare = MicroGroup.prepare
    monkeypatch.setattr(
        MicroGroup, "prepare", lambda self, plan, ids: sizes.append(len(plan.lengths_S)) or prepare(self, plan, ids)
    )
    copies = draw(actor, [[5, 6, 7]], samples=11, max_batch=4)
    assert max(sizes) == 4 and sorted(copies) == list(range(11))
    assert {n: r.tokens for n, r in copies.items()} == {n: r.tokens for n, r in draw(actor, [[5, 6, 7]], 11).items()}


def test_responses_come_as_they_are_finished_and_in_order_from_generate(lm, actor):
    engine = RolloutEngine(actor.model, tiny.tokenizer())
    engine.decoder = Decoder(actor.model, STOPS)
    streamed = list(engine.stream(PROMPTS, 3, SAMPLING))
    assert [len(r.tokens) for r in streamed] == sorted(len(r.tokens) for r in streamed)  # all have begun together
    ordered = engine.generate(PROMPTS, 3, SAMPLING)
    assert [(r.prompt_index, r.sample) for r in ordered] == [(p, s) for p in range(6) for s in range(3)]
    text = engine.generate(["red cat"], 1, SAMPLING)[0]
    assert text.prompt == engine.tokenizer("red cat")["input_ids"]


def test_every_stop_token_of_tokenizer_and_configuration_ends_an_answer():
    tokenizer = tiny.tokenizer()
    assert stop_ids(tokenizer, {"eos_token_id": [3, 1]}) == [1, 3]
    assert stop_ids(tokenizer, {"eos_token_id": None}) == stop_ids(tokenizer) == [1]
    assert stop_ids(tokenizer, {"eos_token_id": 0}) == [0, 1]


def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs(actor, monkeypatch):
    rows = watch(monkeypatch)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        draw(actor, [[5], []])
    with pytest.raises(DataError, match=r"prompt 0 has 49 tokens; with max_new_tokens 16 .* context of 64"):
        draw(actor, [[5] * 49])
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Decoder(actor.model, [])
    assert rows == []
    full = draw(actor, [[5] * 48], samples=1)[0]
    assert 1 <= len(full.tokens) <= 16
    assert draw(actor, []) == {}


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_sampling_out_of_bounds_is_refused(settings):
    with pytest.raises(ConfigError, match="expected temperature >= 0"):
        Sampling(**settings)


def test_an_eos_of_the_generation_config_of_a_model_in_memory_ends_answers(cluster):
    model = tiny.causal_lm(0)
    model.generation_config.eos_token_id = [tiny.EOS, 40]
    engine = RolloutEngine(tiny.role(model).model, tiny.tokenizer())
    assert engine.decoder.stop_ids == {tiny.EOS, 40}


def test_text_prompts_have_one_bos_and_no_closing_eos(actor):
    tokenizer = make_tokenizer(bos=True, bos_token="<bos>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert plain_prompt_tokens(tokenizer, ["ab", "<bos>ab"]) == [[bos, *letters]] * 2
    assert plain_prompt_tokens(tokenizer, ["ab<|im_end|>"]) == [[bos, *letters, eos]]


@pytest.mark.parametrize("known", [48, 61])
def test_ids_beyond_the_tokenizer_are_neither_sampled_nor_counted(known):
    model = tiny.causal_lm(0)
    with torch.no_grad():
        model.lm_head.weight[48:] *= 4  # most of the probability lies beyond the 48 tokens
    role = tiny.role(model)
    role.model.limit_vocabulary(known)
    responses = list(Decoder(role.model, STOPS).stream(PROMPTS[:2], 4, SAMPLING))
    assert any(token >= 48 for r in responses for token in r.tokens) == (known > 48)
    model.double()  # logits are large: two models in fp32 differ by the tolerance
    for response in responses:
        with torch.no_grad():
            logits = model(torch.tensor([response.prompt + response.tokens])).logits[0, len(response.prompt) - 1 : -1]
        expected = logits[:, :known].log_softmax(-1).gather(1, torch.tensor(response.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs).double(), expected, atol=2e-5, rtol=0)
    planned = plan_batches(responses, 64, 1)
    scored_A, _ = LogprobScorer(1.0, 16)(role, planned.batches)
    rolled_A = torch.tensor([x for r in planned.local_responses for x in r.logprobs])
    torch.testing.assert_close(scored_A, rolled_A, atol=1e-4, rtol=0)  # PPO trains on the distribution it sampled


@pytest.mark.parametrize("token", [-1, 61])
def test_a_prompt_with_an_id_beyond_the_vocabulary_is_refused(actor, token):
    with pytest.raises(DataError, match=f"prompt 1 names token {token}, which is not in the vocabulary of 61"):
        list(Decoder(actor.model, STOPS).stream([[5], [6, token]], 1, SAMPLING))
