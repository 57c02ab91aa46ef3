"""Paged continuous batching without a model: who runs, which blocks are shared, and that every sequence ends."""

import numpy as np
import pytest

from icegrt.scheduling import BlockScheduler
from icegrt.scheduling.block_scheduler import ON_DEVICE


def small(n_blocks=16, block_size=4, **options):
    limits = {"max_sequences": 8, "max_length": 40, "token_budget": 32} | options
    return BlockScheduler(n_blocks, block_size, **limits)


def run_step(scheduler, stop_token=None):
    """Plan and complete a step in which every sequence samples its position as token."""
    plan = scheduler.plan()
    if plan.n_rows == 0:
        return plan
    tokens = plan.sample_positions_N.copy()
    scheduler.complete(tokens, tokens == stop_token)
    return plan


def run_to_end(scheduler, stop_token=None, most=1000):
    for steps in range(most):
        if scheduler.n_unfinished == 0:
            return steps
        run_step(scheduler, stop_token)
    raise AssertionError("sequences wait for ever")


def test_a_sequence_is_prefilled_then_decodes_one_row_a_step():
    scheduler = small()
    scheduler.submit(7, [5, 6, 7], max_new_tokens=3)
    first = run_step(scheduler)
    assert first.tokens_T.tolist() == [5, 6, 7] and first.positions_T.tolist() == [0, 1, 2]
    assert first.lengths_S.tolist() == [3] and first.sample_rows_N.tolist() == [2]
    assert first.sample_ids_N.tolist() == [7] and first.sample_positions_N.tolist() == [3]
    block = scheduler.block_table[first.table_rows_S[0], 0]
    assert first.cache_slots_T.tolist() == [4 * block, 4 * block + 1, 4 * block + 2]
    second = run_step(scheduler)
    assert second.tokens_T.tolist() == [3] and second.n_decodes == 1 and second.lengths_S.tolist() == [4]
    run_step(scheduler)
    assert scheduler.is_finished(7) and scheduler.remove(7).tolist() == [5, 6, 7, 3, 4, 5]
    assert scheduler.blocks_available == 16, "a finished sequence holds no block"


def test_samples_of_a_prompt_compute_it_once_and_copy_the_block_that_they_write():
    scheduler = small()
    scheduler.submit([1, 2, 3], list(range(10, 16)), max_new_tokens=8)  # six tokens: a full block and half of one
    prefill = run_step(scheduler)
    assert prefill.n_rows == 6 and prefill.sample_rows_N.tolist() == [5, 5, 5]
    assert prefill.sample_ids_N.tolist() == [1, 2, 3]
    assert 16 - scheduler.blocks_available == 2, "three samples share two blocks"
    decode = run_step(scheduler)
    assert decode.n_rows == 3 and len(decode.copy_from_C) == 2, "the last user writes in place"
    assert len(set(decode.copy_from_C.tolist())) == 1
    tables = scheduler.block_table[decode.table_rows_S]
    assert len(set(tables[:, 0].tolist())) == 1 and len(set(tables[:, 1].tolist())) == 3
    assert scheduler.stats() | {"prompt_tokens": 6, "shared_tokens": 12, "copies": 2} == scheduler.stats()


def test_full_blocks_are_reused_by_content_until_the_weights_change():
    scheduler = small()
    system = list(range(100, 109))  # two full blocks and one token
    scheduler.submit(1, [*system, 1], 2)
    run_to_end(scheduler)
    scheduler.submit(2, [*system, 2], 2)
    plan = run_step(scheduler)
    assert plan.positions_T.tolist() == [8, 9] and plan.lengths_S.tolist() == [10]
    assert scheduler.stats()["reused_tokens"] == 8
    run_to_end(scheduler)
    scheduler.forget_cache()
    scheduler.submit(3, [*system, 2], 2)
    assert run_step(scheduler).n_rows == 10, "keys and values of other weights"


def test_a_prompt_that_is_cached_whole_still_computes_the_row_that_predicts():
    scheduler = small()
    scheduler.submit(1, list(range(8)), 1)
    run_to_end(scheduler)
    scheduler.submit(2, list(range(8)), 1)
    assert run_step(scheduler).positions_T.tolist() == [4, 5, 6, 7]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_sequences():
    scheduler = small(max_sequences=4, token_budget=6)
    scheduler.submit(1, [1], 10)
    run_step(scheduler)
    scheduler.submit(2, list(range(12)), 2)
    for row_starts, samples in (([0, 1, 6], 1), ([0, 1, 6], 1), ([0, 1, 3], 2)):
        plan = run_step(scheduler)
        assert plan.n_decodes == 1 and plan.row_starts.tolist() == row_starts and len(plan.sample_rows_N) == samples


def test_a_full_cache_preempts_the_last_sequence_and_computes_it_again():
    scheduler = small(n_blocks=6)
    for sequence in range(3):
        scheduler.submit(sequence, [sequence] * 4, 12)
    run_to_end(scheduler)
    stats = scheduler.stats()
    assert stats["preemptions"] > 0 and stats["recomputed_tokens"] > 0
    for sequence in range(3):
        assert scheduler.tokens(sequence).tolist() == [sequence] * 4 + list(range(4, 16))


def test_a_step_can_be_planned_before_the_last_one_is_complete():
    scheduler = small()
    scheduler.submit(1, [9, 9], 3)
    scheduler.plan()
    early = scheduler.plan()
    assert early.tokens_T.tolist() == [ON_DEVICE] and early.positions_T.tolist() == [2]
    assert scheduler.n_incomplete_steps == 2
    # The first token ends the sequence; the second step's token is dropped.
    assert scheduler.complete(np.array([4], np.int32), np.array([True])) == 1
    assert scheduler.complete(np.array([5], np.int32), np.array([False])) == 0
    assert scheduler.tokens(1).tolist() == [9, 9, 4]


def test_an_aborted_sequence_keeps_its_tokens_and_goes_on_later():
    scheduler = small()
    scheduler.submit([1, 2], [3, 4, 5], 6)
    run_step(scheduler)
    run_step(scheduler)
    assert scheduler.abort(1).tolist() == [3, 4, 5, 3, 4]
    plan = run_step(scheduler)
    assert plan.sample_ids_N.tolist() == [2]
    scheduler.resume(1)
    run_to_end(scheduler)
    assert scheduler.tokens(1).tolist() == scheduler.tokens(2).tolist() == [3, 4, 5, 3, 4, 5, 6, 7, 8]


def test_the_next_sample_computes_the_prompt_if_the_first_is_aborted():
    scheduler = small()
    scheduler.submit([1, 2, 3], [3, 4, 5], 2)
    scheduler.abort(1)
    plan = run_step(scheduler)
    assert plan.n_rows == 3 and plan.sample_ids_N.tolist() == [2, 3]
    run_to_end(scheduler)
    assert scheduler.remove(1).tolist() == [3, 4, 5]


@pytest.mark.parametrize(("order", "first"), [("first_come", 1), ("longest_remaining", 2)])
def test_the_order_decides_who_starts_first(order, first):
    scheduler = small(max_sequences=1, order=order)
    scheduler.submit(1, [1], 2)
    scheduler.submit(2, [2], 9)
    assert run_step(scheduler).sample_ids_N.tolist() == [first]


def test_more_samples_than_rows_of_the_table_all_end():
    scheduler = small(n_blocks=32, max_sequences=3)
    scheduler.submit(list(range(10)), [1, 2, 3, 4, 5], 4)
    run_to_end(scheduler)
    assert {tuple(scheduler.tokens(s)) for s in range(10)} == {(1, 2, 3, 4, 5, 5, 6, 7, 8)}
    assert scheduler.stats()["shared_tokens"] == 10, "two samples fork"
    assert scheduler.stats()["reused_tokens"] == 28, "seven find the full block"


def test_a_cache_just_large_enough_for_one_sequence_runs_many_in_turn():
    scheduler = small(n_blocks=4, max_length=17)
    for sequence in range(5):
        scheduler.submit(sequence, [sequence + 50] * 9, 8)
    run_to_end(scheduler)
    assert all(len(scheduler.tokens(s)) == 17 for s in range(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.submit(9, [1] * 30, 9), r"sequence 9: 38 cached tokens need 10 blocks of 4, and the cache has 8"),
        (lambda s: s.submit(9, [1] * 30, 90), r"sequence 9: 30 prompt tokens and 90 new ones exceed max_length, 40"),
        (lambda s: s.submit(9, [], 4), "sequence 9: the prompt is empty"),
        (lambda s: s.submit(9, [1], 0), "sequence 9: max_new_tokens must be at least 1"),
        (lambda s: s.submit(1, [1], 1), "sequence 1 exists already"),
        (lambda s: s.submit([4, 4], [1], 1), "sequence 4 exists already"),
        (lambda s: s.abort(5), "there is no sequence 5"),
        (lambda s: s.resume(1), "sequence 1 is not aborted"),
        (lambda s: s.remove(1), "sequence 1 still runs"),
        (lambda s: s.complete(np.zeros(1, np.int32), np.zeros(1, bool)), "no planned step is incomplete"),
        (lambda s: (s.plan(), s.complete(np.zeros(3, np.int32), np.zeros(3, bool))), "the step has 1 samples, got 3"),
        (lambda s: (s.plan(), s.forget_cache()), "a planned step is incomplete"),
    ],
)
def test_a_wrong_call_is_refused_by_name_and_changes_nothing(call, message):
    scheduler = small(n_blocks=8)
    scheduler.submit(1, [1, 2], 2)
    with pytest.raises(ValueError, match=message):
        call(scheduler)
    while scheduler.n_incomplete_steps:
        scheduler.complete(np.array([2], np.int32), np.array([False]))
    run_to_end(scheduler)
    assert len(scheduler.tokens(1)) == 4


def test_a_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match="token_budget must be at least max_sequences"):
        BlockScheduler(8, max_sequences=64, token_budget=32)
