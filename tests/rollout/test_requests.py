"""Single requests: own settings, aborts and resumes, new weights, and a clean engine after every failure."""

import gc
import math
import weakref

import pytest
import torch

from icegrt.errors import ConfigError, DataError, RunError
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.model_runner import ModelRunner
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

STOPS = list(range(40, 46))
SAMPLING = Sampling(max_new_tokens=16, seed=3)
PROMPTS = [[7], [5, 6, 7, 8, 9], [33, 12, 4], [9] * 20]
LOOKAHEADS = pytest.mark.parametrize("lookahead", [0, 1])


def engine_of(model=None, **settings):
    return RolloutEngine(
        tiny.role(model or tiny.causal_lm(0)).model,
        tiny.tokenizer(),
        stop_token_ids=STOPS,
        settings=RolloutSettings(**settings),
    )


@pytest.fixture(scope="module")
def engine(cluster):
    return engine_of()


@pytest.fixture(scope="module")
def alone(engine):
    """The responses of each prompt by itself."""
    return [engine.generate([prompt], 2, SAMPLING)[0:2] for prompt in PROMPTS]


def is_clean(engine):
    """Whether no sequence is left, and every block is available."""
    decoder = engine.decoder
    groups = decoder.storage.groups if decoder.storage else []
    assert not any(group.steps for group in groups)
    for group in groups:
        assert group.scheduler.blocks_available == group.scheduler.n_blocks
    return decoder.n_unfinished == 0 and not decoder._sequences and not decoder._requests


@LOOKAHEADS
def test_requests_with_settings_of_their_own_do_not_change_each_other(lookahead, engine):
    settings = [
        Sampling(temperature=0.0, max_new_tokens=9),
        Sampling(temperature=0.7, top_k=5, max_new_tokens=12, seed=1),
        Sampling(top_p=0.6, max_new_tokens=7, seed=2),
        Sampling(min_p=0.3, max_new_tokens=16, seed=3),
        Sampling(max_new_tokens=16, seed=4, logit_bias={11: 4.0, 12: -math.inf}),
        Sampling(max_new_tokens=16, seed=5, allowed_token_ids=(3, 9, 27, 41)),
    ]
    expected = [engine.generate([PROMPTS[1]], 2, sampling) for sampling in settings]
    mixed = engine_of(lookahead=lookahead, token_budget=4, max_batch=4)
    requests = [mixed.submit(PROMPTS[1], 2, sampling) for sampling in settings]
    for request, responses in zip(requests, expected, strict=True):
        together = mixed.wait(request)
        assert [r.tokens for r in together] == [r.tokens for r in responses]
        for one, other in zip(together, responses, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
    assert {t for r in expected[5] for t in r.tokens} <= {3, 9, 27, 41}
    assert not any(12 in r.tokens for r in expected[4])
    assert is_clean(mixed)


def test_no_stop_token_comes_before_the_least_length(engine):
    early = engine.generate(PROMPTS, 8, SAMPLING)
    assert any(len(r.tokens) < 6 for r in early)
    late = engine.generate(PROMPTS, 8, Sampling(max_new_tokens=16, seed=3, min_new_tokens=6))
    assert all(len(r.tokens) >= 6 for r in late) and any(r.finish_reason == "stop" for r in late)


@LOOKAHEADS
def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(lookahead, engine):
    plain = next(r for r in engine.generate(PROMPTS, 8, SAMPLING) if len(r.tokens) > 9)
    text = engine.tokenizer.decode(plain.tokens[3:5])
    own = engine_of(lookahead=lookahead)
    sampling = Sampling(max_new_tokens=16, seed=3, stop=("never in a text", text))
    responses = own.generate([plain.prompt], 1, sampling, first_sequence_id=plain.sequence_id)
    first = next(n for n in range(1, 17) if text in engine.tokenizer.decode(plain.tokens[:n]))
    assert responses[0].tokens == plain.tokens[:first] and responses[0].finish_reason == "stop"
    assert len(responses[0].logprobs) == first and is_clean(own)


def test_stop_ids_of_a_request_add_to_those_of_the_engine(engine):
    plain = engine.generate([PROMPTS[0]], 1, Sampling(max_new_tokens=16, seed=8))[0]
    stop = plain.tokens[2]
    first = plain.tokens.index(stop) + 1
    response = engine.generate([PROMPTS[0]], 1, Sampling(max_new_tokens=16, seed=8, stop_token_ids=(stop,)))[0]
    assert response.tokens == plain.tokens[:first] and response.finish_reason == "stop"


@LOOKAHEADS
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_an_aborted_request_resumes_to_the_same_tokens(steps, lookahead, alone):
    engine = engine_of(lookahead=lookahead)
    other = engine.submit(PROMPTS[3], 2, SAMPLING)
    request = engine.submit(PROMPTS[1], 2, SAMPLING)
    for _ in range(steps):
        engine.step()
    done = {r.sample: r for r in request.responses}
    partial = engine.abort(request)
    done |= {r.sample: r for r in request.responses}
    assert {r.sample for r in partial} | set(done) == {0, 1}
    for response in partial:
        whole = alone[1][response.sample]
        assert response.finish_reason == "abort" and response.truncated
        assert response.tokens == whole.tokens[: len(response.tokens)] and len(response.tokens) < len(whole.tokens)
        assert len(response.logprobs) == len(response.tokens)
    assert [r.tokens for r in engine.wait(other)] == [r.tokens for r in alone[3]]
    engine.resume(request)
    assert [r.tokens for r in engine.wait(request)] == [r.tokens for r in alone[1]]
    assert is_clean(engine)


def test_a_request_that_resumes_under_new_weights_is_computed_anew_and_names_the_policy_of_each_token():
    engine = engine_of()
    model = engine.decoder.model
    sampling = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=0.0)
    request = engine.submit(PROMPTS[1], 1, sampling)
    for _ in range(5):
        engine.step()
    before = engine.abort(request)[0]
    engine.release()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.mark_weights_changed()
    engine.resume(request)
    response = engine.wait(request)[0]
    kept = len(before.tokens)
    assert 0 < kept < 12 and response.tokens[:kept] == before.tokens
    assert response.policy_versions == [0] * kept + [1] * (12 - kept)
    # The rest is what the new weights say to prompt and old tokens: no old key or value was used.
    sampling = Sampling(max_new_tokens=12 - kept, min_new_tokens=12 - kept, temperature=0.0)
    fresh = engine.generate([PROMPTS[1] + before.tokens], 1, sampling)[0]
    assert response.tokens[kept:] == fresh.tokens
    torch.testing.assert_close(response.logprobs[kept:], fresh.logprobs, atol=1e-5, rtol=0)


def test_changed_weights_change_the_next_response_and_cached_prompts_do_not_survive():
    engine = engine_of()
    prompt = [9] * 40
    first = engine.generate([prompt], 1, Sampling(max_new_tokens=1, temperature=0.0))[0]
    with torch.no_grad():
        engine.decoder.model.lm_weight_VH.mul_(0.5)
    engine.decoder.model.mark_weights_changed()
    second = engine.generate([prompt], 1, Sampling(max_new_tokens=1, temperature=0.0))[0]
    fresh = engine_of_same_weights(engine).generate([prompt], 1, Sampling(max_new_tokens=1, temperature=0.0))[0]
    assert second.logprobs == fresh.logprobs and second.logprobs != first.logprobs


def engine_of_same_weights(engine):
    return RolloutEngine(engine.decoder.model, engine.tokenizer, stop_token_ids=STOPS)


def test_a_later_turn_of_a_conversation_finds_the_earlier_ones_in_the_cache():
    engine = engine_of(block_size=4)
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    turns = [{"role": "user", "content": "red cat blue dog"}]
    sampling = Sampling(max_new_tokens=4, temperature=0.0)
    first = engine.chat(turns, 2, sampling)
    assert len(first) == 2 and first[0].prompt_index == 0
    before = engine.decoder.storage.groups[0].scheduler.stats()
    turns += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "dog"}]
    second = engine.chat(turns, 1, sampling)[0]
    reused = engine.decoder.storage.groups[0].scheduler.stats()["reused_tokens"] - before["reused_tokens"]
    assert reused >= len(first[0].prompt) // 4 * 4 - 4
    assert second.tokens == engine_of_same_weights(engine).generate([second.prompt], 1, sampling)[0].tokens
    engine.tokenizer.chat_template = None
    with pytest.raises(RunError, match="chat: the tokenizer has no chat template"):
        engine.chat(turns)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_fit_is_refused_with_the_key_to_change_and_others_are_served(alone):
    engine = engine_of(kv_memory=9_000, block_size=2)
    with pytest.raises(
        DataError, match=r"prompt 0 has 20 tokens; .* 35 cached tokens, .* room for 3\d\. Raise rollout"
    ):
        engine.generate([PROMPTS[3]], 1, SAMPLING)
    assert is_clean(engine)
    assert [r.tokens for r in engine.generate([PROMPTS[1]], 2, SAMPLING)] == [r.tokens for r in alone[1]]


@LOOKAHEADS
def test_a_stream_that_is_given_up_leaves_nothing_behind(lookahead, alone):
    engine = engine_of(lookahead=lookahead)
    stream = engine.stream(PROMPTS, 4, SAMPLING)
    next(stream)
    assert engine.decoder.n_unfinished
    stream.close()
    assert is_clean(engine)

    def consume():
        for _ in engine.stream(PROMPTS, 4, SAMPLING):
            raise ValueError("the consumer failed")

    with pytest.raises(ValueError, match="the consumer failed"):
        consume()
    assert is_clean(engine)
    assert [r.tokens for r in engine.generate([PROMPTS[1]], 2, SAMPLING)] == [r.tokens for r in alone[1]]


@LOOKAHEADS
def test_a_step_that_fails_empties_the_engine_and_the_next_call_is_right(lookahead, alone, monkeypatch):
    engine = engine_of(lookahead=lookahead)
    lost = engine.submit(PROMPTS[1], 2, SAMPLING)
    forward, calls = ModelRunner.forward, []

    def failing(self, group, step, chunk):
        calls.append(step)
        if len(calls) == 4:
            raise RuntimeError("the device failed")
        forward(self, group, step, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", failing)
        with pytest.raises(RuntimeError, match="the device failed"):
            engine.generate(PROMPTS, 2, SAMPLING)
    assert is_clean(engine) and engine.decoder.storage is None
    with pytest.raises(RunError, match="lost when a step failed; submit it again"):
        engine.wait(lost)
    assert [r.tokens for r in engine.generate([PROMPTS[1]], 2, SAMPLING)] == [r.tokens for r in alone[1]]


def test_a_model_is_freed_with_its_engine_without_a_collection_of_garbage():
    # Ranks do not collect at the same time: one would leave the process groups while another still uses them.
    gc.collect()
    gc.disable()
    try:
        engine = engine_of()
        engine.generate([PROMPTS[1]], 2, SAMPLING)
        next(engine.stream([PROMPTS[1]], 2, SAMPLING))
        model = weakref.ref(engine.decoder.model)
        del engine
        assert model() is None
    finally:
        gc.enable()


def test_release_frees_the_cache_and_the_next_call_allocates_it_again(alone):
    engine = engine_of()
    engine.generate([PROMPTS[1]], 2, SAMPLING)
    blocks = engine.decoder.storage.groups[0].blocks
    assert blocks.untyped_storage().nbytes() > 0
    engine.release()
    assert engine.decoder.storage is None
    assert [r.tokens for r in engine.generate([PROMPTS[1]], 2, SAMPLING)] == [r.tokens for r in alone[1]]


def test_the_cache_has_room_for_the_requests_and_no_more_and_grows_when_it_is_idle():
    engine = engine_of()
    engine.generate([PROMPTS[0]], 1, SAMPLING)
    small = engine.decoder.storage.n_blocks
    engine.generate(PROMPTS, 8, SAMPLING)
    assert engine.decoder.storage.n_blocks > small == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 1.5}, "0 <= min_p <= 1"),
        ({"min_new_tokens": 300}, "min_new_tokens <= max_new_tokens"),
        ({"stop": ""}, "sampling.stop: expected a sequence"),
        ({"stop": ("a", "")}, "sampling.stop: expected a sequence"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"logit_bias": {3: math.nan}}, "logit_bias: expected finite numbers or -inf"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "20 apples"}, "rollout.kv_memory: expected a share"),
        ({"kv_memory": 0.0}, "rollout.kv_memory"),
        ({"kv_memory": math.nan}, "rollout.kv_memory"),
        ({"block_size": 12}, "power of two"),
        ({"max_batch": 0}, "at least 1"),
        ({"lookahead": 2}, "lookahead must be 0, 1 or None"),
    ],
)
def test_sizes_out_of_bounds_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RolloutSettings(**settings)


def test_ids_that_the_vocabulary_lacks_are_refused_in_settings(engine):
    for sampling in (
        Sampling(logit_bias={61: 1.0}),
        Sampling(allowed_token_ids=(3, 61)),
        Sampling(stop_token_ids=(-1,)),
    ):
        with pytest.raises(DataError, match="not in the vocabulary"):
            engine.generate([PROMPTS[0]], 1, sampling)


def test_stop_texts_need_a_tokenizer():
    decoder = Decoder(tiny.role(tiny.causal_lm(0)).model, STOPS)
    with pytest.raises(DataError, match=r"sampling\.stop needs a tokenizer"):
        list(decoder.stream([[5]], 1, Sampling(stop=("a",))))
