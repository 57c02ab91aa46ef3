"""Mutants of paged_attention."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_paged_attention import (
    check_bits_of_chunks,
    check_chunks,
    check_decode,
    check_padding,
    check_too_long,
)

MODULE = "paged_attention.triton"
KERNEL = "paged_attention_kernel"
MERGE = "merge_splits_kernel"
SMALL = {"lengths": (3, 70), "heads": 4, "width": 4}


def mutant(function, broken, old, new, check=check_decode, arguments=None):
    return Mutant(MODULE, function, broken, old, new, check, SMALL if arguments is None else arguments)


MUTANTS = (
    mutant("merge", "the earlier splits keep their weight", "tl.exp2(peak - finite)", "tl.exp2(peak - peak)"),
    mutant("merge", "the later split is not weighed", "tl.exp2(next_peak - finite)", "tl.exp2(next_peak - next_peak)"),
    mutant(
        "merge", "sums of later splits are lost", "total * keep + next_total * add", "total * keep + next_total * 0"
    ),
    mutant(
        "attend_split",
        "the running sum is not rescaled",
        "total * keep + tl.sum(probs, axis=1)",
        "total + tl.sum(probs, axis=1)",
    ),
    mutant("attend_split", "the running values are not rescaled", "acc * keep[:, None]", "acc"),
    mutant(
        "attend_split",
        "the token after the last is seen",
        "position[None, :] < ends[:, None]",
        "position[None, :] <= ends[:, None]",
        check_chunks,
        {},
    ),
    mutant(
        "attend_split",
        "the window is one token longer",
        "position[None, :] >= starts[:, None]",
        "position[None, :] >= starts[:, None] - 1",
        check_chunks,
        {"window": 9},
    ),
    mutant("attend_split", "all heads attend to the first", "group * PAGE + position % PAGE", "position % PAGE"),
    mutant("attend_split", "tokens of a block are in its first slot", "group * PAGE + position % PAGE", "group * PAGE"),
    mutant(
        "attend_split",
        "blocks lie in order",
        "(block * value_stride_b + offset) * WIDTH",
        "(position // PAGE * value_stride_b + offset) * WIDTH",
    ),
    mutant(
        KERNEL,
        "no token is in the window",
        "tl.maximum(ends - window, 0)",
        "tl.maximum(ends, 0)",
        check_decode,
        SMALL | {"window": 5},
    ),
    mutant(
        KERNEL,
        "rows of a chunk see its last token",
        "ends = length - (rows_end - 1 - pair_row)",
        "ends = length + 0 * pair_row",
        check_chunks,
        {},
    ),
    mutant(
        KERNEL,
        "a sequence has no tile beyond its whole ones",
        "(tl.load(row_starts_ptr + middle) - origin) // ROWS + middle <= tile",
        "(tl.load(row_starts_ptr + middle) - origin) // ROWS + middle < tile",
        check_chunks,
        {},
    ),
    mutant(
        KERNEL,
        "tiles overlap",
        "row = begin + (tile - (begin - origin) // ROWS - sequence) * ROWS",
        "row = begin + (tile - (begin - origin) // ROWS - sequence)",
        check_chunks,
        {},
    ),
    mutant(KERNEL, "queries of a row are those of the first group", "group * GROUP + pair % GROUP", "pair % GROUP"),
    mutant(
        KERNEL,
        "the last split is lost",
        "first_split >= last_split",
        "first_split >= last_split - 1",
    ),
    mutant(
        KERNEL,
        "splits share one place",
        "(pair_row.to(tl.int64) * tl.num_programs(1) * GROUP + pair_head) * SPLITS + tl.program_id(2)",
        "(pair_row.to(tl.int64) * tl.num_programs(1) * GROUP + pair_head) * SPLITS",
    ),
    mutant(KERNEL, "a length above the maximum passes", "ends <= max_length", "ends <= ends", check_too_long, {}),
    mutant(KERNEL, "a row without tokens is 0 / 0", "(ends > 0)[:, None]", "(ends > -9)[:, None]", check_padding, {}),
    mutant(
        MERGE,
        "splits before the window are merged",
        "tl.cdiv(end, SPLIT) - start // SPLIT",
        "tl.cdiv(end, SPLIT)",
        check_decode,
        SMALL | {"lengths": (150, 200), "window": 5},
    ),
    mutant(
        MERGE, "the last split is not merged", "tl.cdiv(end, SPLIT) - start // SPLIT", "end // SPLIT - start // SPLIT"
    ),
    mutant(MERGE, "a length above the maximum passes", "length <= max_length", "length <= length", check_too_long, {}),
    mutant(
        "attend_split",
        "places of tokens depend on the first",
        "first // TOKENS * TOKENS",
        "first",
        check_bits_of_chunks,
        {},
    ),
    mutant(MERGE, "the sum is not divided out", "acc / total[:, None]", "acc"),
)
