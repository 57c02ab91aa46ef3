"""The rollout in every kind of layout: tokens and log-probs of one process; a shared queue; failures that end all."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from icegrt.config import ParallelConfig
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.load import load_actor
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYERS
from tests.helpers.ranks import launch

SAMPLES = 3
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9, seed=5)
STOPS = list(range(40, 44))
PROMPTS = [[5 + n, 6, 7, 8 + n, *range(9, 9 + 2 * n)] for n in range(7)]
FAMILIES = {
    "biases": ("qwen2", {"tie_word_embeddings": True}),
    "norms": ("qwen3", {"tie_word_embeddings": True}),
    "window": ("mistral", {"sliding_window": 5}),
}
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_virtual": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp3": (3, {}),
    "pp2_dp2": (4, {"pipeline": 2}),
}
SETTINGS = {
    "chunks of prompts": {"token_budget": 4},
    "small batch": {"max_batch": 3, "lookahead": 1},
    # Room for the longest request and little more: sequences are preempted.
    "small cache": {"block_size": 2, "kv_memory": "CACHE", "lookahead": 1},
}


def model_of(family, keys):
    kind, changes = FAMILIES[family]
    return load_actor(tiny.causal_lm(0, kind, num_hidden_layers=LAYERS, **changes), parallel=ParallelConfig(**keys))


def engine(model, **settings):
    if settings.get("kv_memory") == "CACHE":
        settings["kv_memory"] = cache_bytes(model, blocks=20, block_size=settings["block_size"])
    return RolloutEngine(model, tiny.tokenizer(), stop_token_ids=STOPS, settings=RolloutSettings(**settings))


def cache_bytes(model, blocks, block_size):
    """Bytes of that many blocks in each micro-group."""
    config, cluster = model.config, model.cluster
    heads = config.num_query_groups // config.tensor_model_parallel_size
    return blocks * cluster.layout.pipeline * 2 * len(model.layer_indices) * heads * block_size * config.kv_channels * 4


def rollout(path, family, keys, settings):
    """Rank 0 writes what every set of settings gave; others must have the same."""
    given, model = [], model_of(family, keys)
    for each in settings:
        responses = engine(model, **each).generate(PROMPTS, SAMPLES, SAMPLING)
        given.append([(r.sequence_id, r.tokens, r.logprobs, r.finish_reason) for r in responses])
    if dist.get_rank() == 0:
        torch.save(given, path)


def run(folder, name, ranks, *args):
    path = folder / f"{name}.pt"
    launch(ranks, rollout, path, *args, seconds=120)
    return torch.load(path, weights_only=False)


def check_same(given, expected):
    assert [(i, tokens, reason) for i, tokens, _, reason in given] == [(i, t, r) for i, t, _, r in expected]
    for (_, _, logprobs, _), (_, _, others, _) in zip(given, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(others), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process samples, by family, with default settings."""
    folder = tmp_path_factory.mktemp("alone")
    return {family: run(folder, family, 1, family, {}, [{}])[0] for family in FAMILIES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=pytest.mark.long if ranks > 3 else ()) for n, (ranks, _) in LAYOUTS.items()]
)
def test_a_layout_samples_as_one_process_does_however_its_steps_are_planned(layout, tmp_path, alone):
    ranks, keys = LAYOUTS[layout]
    family = "biases" if "virtual" not in layout else "norms"
    assert len({tuple(tokens) for _, tokens, _, _ in alone[family]}) > 1
    for given in run(tmp_path, layout, ranks, family, keys, [{}, *SETTINGS.values()]):
        check_same(given, alone[family])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_virtual"])
@pytest.mark.parametrize("family", ["norms", "window"])
def test_families_sample_in_a_layout_as_in_one_process(family, layout, tmp_path, alone):
    (given,) = run(tmp_path, layout, LAYOUTS[layout][0], family, LAYOUTS[layout][1], [SETTINGS["small cache"]])
    check_same(given, alone[family])


def preemptions(keys):
    own = engine(model_of("biases", keys), **SETTINGS["small cache"])
    own.generate(PROMPTS, SAMPLES, SAMPLING)
    stats = [group.scheduler.stats() for group in own.decoder.storage.groups]
    assert all(each["preemptions"] for each in stats), stats


def test_the_small_cache_of_these_tests_preempts_sequences():
    launch(2, preemptions, {"pipeline": 2}, seconds=120)


# -- the queue of data-parallel ranks ----------------------------------------------------------------------------------


def one_rank_is_slow(path, slow):
    """The slow rank waits in every step. Each rank writes the prompts that it answered."""
    own = engine(model_of("biases", {}), max_batch=3)
    rank, step, stream, taken = dist.get_rank(), Decoder.step, Decoder.stream, []

    def slow_step(decoder):
        time.sleep(0.05 if rank == slow else 0.0)
        return step(decoder)

    def recorded(decoder, *args):
        for response in stream(decoder, *args):
            taken.append((response.prompt_index, response.sample))
            yield response

    Decoder.step, Decoder.stream = slow_step, recorded
    responses = own.generate(PROMPTS * 3, SAMPLES, SAMPLING)
    torch.save((taken, [(r.sequence_id, r.tokens) for r in responses]), f"{path}.{rank}")


@pytest.mark.timeout(300)
def test_ranks_share_a_queue_of_prompts_and_a_slow_rank_takes_fewer(tmp_path):
    texts, counts = [], []
    for slow in (0, 1):
        launch(2, one_rank_is_slow, tmp_path / f"slow{slow}", slow, seconds=120)
        (first, one), (second, other) = (torch.load(tmp_path / f"slow{slow}.{rank}") for rank in (0, 1))
        # Every sample of every prompt once, and every rank returns all of them.
        assert sorted(first + second) == [(p, s) for p in range(3 * len(PROMPTS)) for s in range(SAMPLES)]
        assert one == other
        texts.append(one)
        counts.append((len(first), len(second)))
    # Who took a prompt does not show in its text.
    assert texts[0] == texts[1]
    assert counts[0][0] < counts[0][1] and counts[1][0] > counts[1][1], counts


# -- failures ----------------------------------------------------------------------------------------------------------


def a_rank_fails(keys, how):
    own = engine(model_of("biases", keys))
    rank, step, steps = dist.get_rank(), Decoder.step, []

    def failing(decoder):
        steps.append(1)
        if rank == 1 and len(steps) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the consumer failed")
        return step(decoder)

    Decoder.step = failing
    own.generate(PROMPTS, SAMPLES, SAMPLING)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_fails_ends_the_others(how, layout):
    with pytest.raises(AssertionError) as error:
        launch(2, a_rank_fails, LAYOUTS[layout][1], how, seconds=60)
    text = str(error.value)
    assert "stuck: []" in text, "a rank waits for one that is gone"
    assert "failed: [0, 1]" in text
    assert "rank 0" in text and ("the consumer failed" in text) == (how == "raises")
