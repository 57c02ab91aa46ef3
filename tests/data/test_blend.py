"""Order of the data: weights, determinism, and resuming at every position."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.data import BlendedDataset, PromptSampler
from icegrt.data.blend import shuffled
from icegrt.errors import DataError


def blend(seed=0, scale=1):
    return BlendedDataset([(list("abcdefg"), 1.0), (list("vwxyz"), 0.5 * scale), (list("123"), 2.25)], seed)


def stream(order, batch_size, count):
    batches = order.batches(batch_size)
    return [next(batches) for _ in range(count)]


def test_shuffle_is_a_permutation_with_fixed_bits():
    assert sorted(shuffled(100, 3, 0, 1)) == list(range(100))
    assert shuffled(8, 0, 0, 0).tolist() != shuffled(8, 0, 0, 1).tolist()
    assert shuffled(8, 1, 2, 3).tolist() == [0, 5, 1, 4, 7, 3, 2, 6]  # a checkpoint's order must outlive this build


def test_weights_are_exact_over_epochs():
    order = blend()
    counts = Counter(pair for e in range(4) for pair in order.epoch(e))
    assert {counts[0, i] for i in range(7)} == {4}
    assert {counts[1, i] for i in range(5)} == {2}
    assert {counts[2, i] for i in range(3)} == {9}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.floats(0.01, 4), st.integers(1, 12), st.integers(0, 5))
def test_no_item_is_ahead_of_another_by_more_than_one(n, weight, epochs, seed):
    order = BlendedDataset([(range(n), weight)], seed)
    counts = Counter(i for e in range(epochs) for _, i in order.epoch(e))
    item_counts = [counts[i] for i in range(n)]
    assert max(item_counts) - min(item_counts) <= 1
    assert abs(sum(item_counts) - n * weight * epochs) < 1.001
    assert sum(item_counts) == order.count(epochs) == sum(len(order.epoch(e)) for e in range(epochs))


def test_epochs_differ_and_repeat():
    assert blend().epoch(3) == blend().epoch(3)
    assert blend().epoch(0) != blend().epoch(4)
    assert blend(1).epoch(0) != blend(2).epoch(0)
    assert blend().item((1, 2)) == "x"


def test_batches_are_the_epochs_end_to_end():
    order = blend()
    flat = [pair for batch in stream(order, 5, 20) for pair in batch]
    expected = [pair for e in range(8) for pair in order.epoch(e)]
    assert flat == expected[:100]
    assert order.consumed == 100


@pytest.mark.parametrize("batch_size", [1, 4, 17, 100])
def test_resume_at_every_position(batch_size):
    all_batches = stream(blend(), batch_size, 24)
    for position in range(24):
        first = blend()
        stream(first, batch_size, position)
        second = blend()
        second.load_state(json.loads(json.dumps(first.state())))
        assert stream(second, batch_size, 24 - position) == all_batches[position:]


def test_a_number_of_epochs_ends_the_batches():
    order = blend()
    assert sum(map(len, order.batches(4, epochs=2.5))) == order.count(2.5) == order.consumed
    assert list(order.batches(4, epochs=2.5)) == []
    resumed = blend()
    half = resumed.batches(4, epochs=1)
    next(half)
    assert sum(map(len, half)) == order.count(1) - 4


def test_loading_moves_a_running_iterator():
    order = blend()
    start = order.state()
    batches = order.batches(3)
    first = next(batches)
    order.load_state(start)
    assert next(batches) == first


def test_a_tiny_weight_leaves_epochs_empty_but_ends():
    order = BlendedDataset([(["only"], 0.25)], 0)
    assert [len(order.epoch(e)) for e in range(5)] == [1, 0, 0, 0, 1]
    assert stream(order, 1, 3) == [[(0, 0)]] * 3


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([], "at least one source"),
        ([([1], 1.0), ([], 1.0)], "source 1 of the blend has no items"),
        ([([1], 0.0)], "expected a weight above 0"),
        ([([1], float("nan"))], "expected a weight above 0"),
        ([([1], 1e-9)], "below 1e-6"),
    ],
)
def test_bad_sources(sources, says):
    with pytest.raises(DataError, match=says):
        BlendedDataset(sources, 0)


@pytest.mark.parametrize("other_blend", [blend(seed=1), blend(scale=2), BlendedDataset([([1], 1.0)], 0)])
def test_other_data_is_refused_on_resume(other_blend):
    with pytest.raises(DataError, match="changed since the checkpoint"):
        other_blend.load_state(blend().state())


def test_batch_size_and_draw_size():
    with pytest.raises(ValueError, match="batch_size"):
        next(blend().batches(0))
    with pytest.raises(ValueError, match="at least 1 prompt"):
        PromptSampler(3, 0).draw(0)
    with pytest.raises(DataError, match="at least 1 prompt"):
        PromptSampler(0, 0)


DRAWS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 20), st.integers(0, 2**63), DRAWS)
def test_prompts_come_once_per_epoch_and_once_per_draw(n, seed, sizes):
    order, flat = PromptSampler(n, seed), []
    for k in sizes:
        prompts = order.draw(k)
        assert len(prompts) == k
        if k <= n:
            assert len(set(prompts)) == k
        flat += prompts
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n]) == list(range(n))
    assert len(set(flat[len(flat) // n * n :])) == len(flat) % n


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.integers(0, 9), DRAWS)
def test_prompt_order_resumes_anywhere(n, seed, sizes):
    order = PromptSampler(n, seed)
    states, draws = [], []
    for k in sizes:
        states.append(json.dumps(order.state()))
        draws.append(order.draw(k))
    for i, state in enumerate(states):
        resumed = PromptSampler(n, seed)
        resumed.load_state(json.loads(state))
        assert [resumed.draw(k) for k in sizes[i:]] == draws[i:]


def test_prompt_order_refuses_other_prompts():
    with pytest.raises(DataError, match="n was 5, now 6"):
        PromptSampler(6, 0).load_state(PromptSampler(5, 0).state())
    with pytest.raises(DataError, match="seed was 0, now 1"):
        PromptSampler(5, 1).load_state(PromptSampler(5, 0).state())


def test_seeds_and_epochs_differ():
    order = PromptSampler(50, 0)
    first, second = order.draw(50), order.draw(50)
    assert first != second
    assert PromptSampler(50, 0).draw(50) == first != PromptSampler(50, 1).draw(50)
