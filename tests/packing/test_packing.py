"""icegrt.packing.pack against a packer that is written the slow and obvious way."""

import threading
import time

import numpy as np
import pytest
import torch

# The extension has no public name. Here its own argument checks and its threading are under test, not `pack`'s.
from icegrt import _C
from icegrt.packing import PackedBatch, pack, unpack

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def oracle(prompts, responses, masks=None, tail_multiple=1, tail_token=0):
    out = {"tokens_T": [], "positions_T": [], "cu_seqlens": [0], "cu_actions": [0], "max_seqlen": 0, "tail_tokens": 0}
    out |= {"action_tokens_A": [], "action_rows_A": [], "last_rows_N": [], "action_mask_A": masks and []}
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        start = len(out["tokens_T"])
        for position, token in enumerate([*prompt, *response]):
            if position >= len(prompt):
                out["action_tokens_A"].append(token)
                out["action_rows_A"].append(len(out["tokens_T"]) - 1)
            out["tokens_T"].append(token)
            out["positions_T"].append(position)
        if masks:
            out["action_mask_A"] += [bool(m) for m in masks[i]]
        out["cu_seqlens"].append(len(out["tokens_T"]))
        out["cu_actions"].append(len(out["action_tokens_A"]))
        out["last_rows_N"].append(len(out["tokens_T"]) - 1)
        out["max_seqlen"] = max(out["max_seqlen"], len(out["tokens_T"]) - start)
    while not out["tokens_T"] or len(out["tokens_T"]) % tail_multiple:
        out["tokens_T"].append(tail_token)
        out["positions_T"].append(out["tail_tokens"])
        out["tail_tokens"] += 1
    if out["tail_tokens"]:
        out["cu_seqlens"].append(len(out["tokens_T"]))
        out["max_seqlen"] = max(out["max_seqlen"], out["tail_tokens"])
    return out


DTYPES = {"cu_seqlens": torch.int32, "cu_actions": torch.int32, "action_mask_A": torch.bool}


def check(batch: PackedBatch, expected: dict):
    for name, want in expected.items():
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == DTYPES.get(name, torch.int64), name
            assert value.is_contiguous() and value.ndim == 1, name
            assert value.tolist() == want, name
        else:
            assert value == want, name


tokens = st.integers(0, 2**40)
sequences = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(st.tuples(tokens, st.booleans()), max_size=6)),
    max_size=8,
)


@hypothesis.given(sequences, st.integers(1, 9), tokens, st.sampled_from(["list", "numpy", "tensor", "mixed"]))
def test_matches_oracle(rows, tail_multiple, tail_token, kind):
    prompts = [prompt for prompt, _ in rows]
    responses = [[token for token, _ in actions] for _, actions in rows]
    masks = [[flag for _, flag in actions] for _, actions in rows]
    makers = {"list": list, "numpy": lambda x: np.array(x, np.int64), "tensor": lambda x: torch.tensor(x).long()}

    def convert(values):
        kinds = list(makers) if kind == "mixed" else [kind]
        return [makers[kinds[i % len(kinds)]](x) for i, x in enumerate(values)]

    options = {"tail_multiple": tail_multiple, "tail_token": tail_token}
    batch = pack(convert(prompts), convert(responses), **options)
    check(batch, oracle(prompts, responses, **options))
    assert batch.n_counted_actions == batch.n_actions
    masked = pack(convert(prompts), convert(responses), action_masks=masks, **options)
    if rows:
        check(masked, oracle(prompts, responses, masks, **options))
    assert masked.n_counted_actions == sum(map(sum, masks))
    back_prompts, back_responses = unpack(batch)
    assert [x.tolist() for x in back_prompts] == prompts
    assert [x.tolist() for x in back_responses] == responses
    assert [x.tolist() for x in batch.split_actions(batch.action_tokens_A)] == responses


few_prompts = st.sampled_from([[3], [3, 4], [3, 4, 5], [4, 3], [3, 0]])
grouped = st.lists(st.tuples(few_prompts, st.lists(st.integers(0, 9), max_size=4)), max_size=9)


@hypothesis.given(grouped, st.integers(1, 5))
def test_a_shared_prompt_is_stored_once_and_every_sequence_keeps_its_tokens(rows, tail_multiple):
    prompts, responses = [p for p, _ in rows], [r for _, r in rows]
    batch = pack(prompts, responses, tail_multiple=tail_multiple, share_prompts=True)
    plain = pack(prompts, responses, tail_multiple=tail_multiple)
    # 1. Sequences and the action stream are those of the batch that shares nothing.
    assert [[x.tolist() for x in side] for side in unpack(batch)] == [prompts, responses]
    for name in ("action_tokens_A", "cu_actions", "response_lengths", "n_sequences"):
        assert str(getattr(batch, name)) == str(getattr(plain, name))
    for name in ("tokens_T", "positions_T"):
        for rows_name in ("action_rows_A", "last_rows_N"):
            read = [getattr(b, name)[getattr(b, rows_name)].tolist() for b in (batch, plain)]
            assert read[0] == read[1]
    # 2. The stream: shared prompts in the order of their first sequence, their responses, whole sequences, a tail.
    shared = [list(p) for p in dict.fromkeys(map(tuple, prompts)) if prompts.count(list(p)) > 1]
    groups = [shared.index(p) if p in shared else -1 for p in prompts]
    of_group = [[r for r, g in zip(responses, groups, strict=True) if g == number] for number in range(len(shared))]
    whole = [p + r for p, r, g in zip(prompts, responses, groups, strict=True) if g < 0]
    segments = [*shared, *(r for members in of_group for r in members), *whole]
    assert batch.groups == (groups if shared else [])
    assert batch.group_sizes == list(map(len, of_group))
    expected = [*map(len, segments), *([batch.tail_tokens] if batch.tail_tokens else [])]
    assert (batch.lengths, batch.max_seqlen) == (expected, max(expected))
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *expected]).tolist()
    used = batch.n_tokens - batch.tail_tokens
    assert batch.tokens_T[:used].tolist() == [token for segment in segments for token in segment]
    # 3. Positions of responses continue their prompt's.
    starts = [0] * len(shared) + [len(shared[g]) for g, m in enumerate(of_group) for _ in m] + [0] * len(whole)
    positions = [start + i for start, s in zip(starts, segments, strict=True) for i in range(len(s))]
    assert batch.positions_T.tolist() == [*positions, *range(batch.tail_tokens)]
    ends = [0, *np.cumsum([sum(map(len, members)) for members in of_group]).tolist()]
    assert (batch.cu_groups.tolist() if shared else batch.cu_groups) == (ends if shared else None)


def test_without_equal_prompts_a_sharing_batch_is_the_plain_one():
    rows = [[1], [2, 3], [1, 2]], [[4], [], [5, 6]]
    shared, plain = pack(*rows, share_prompts=True, tail_multiple=4), pack(*rows, tail_multiple=4)
    assert str(shared) == str(plain)


def test_no_sequences_is_a_tail_of_one_token():
    batch = pack([], [], tail_token=5)
    assert batch.tokens_T.tolist() == [5]
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.cu_actions.tolist() == [0]
    assert (batch.n_sequences, batch.n_tokens, batch.n_actions, batch.tail_tokens) == (0, 1, 0, 1)
    assert (batch.max_seqlen, batch.n_counted_actions, batch.split_actions(torch.zeros(0))) == (1, 0, [])
    assert pack([], [], tail_multiple=4, action_masks=[]).tail_tokens == 4
    assert unpack(batch) == ([], [])


def test_one_token_sequence_without_actions():
    batch = pack([[7]], [[]])
    assert batch.tail_tokens == 0
    assert batch.last_rows_N.tolist() == [0]
    assert [x.shape for x in batch.split_actions(torch.zeros(0, 3))] == [(0, 3)]


def test_an_aligned_batch_has_no_tail():
    assert pack([[1, 2]], [[3, 4]], tail_multiple=4).tail_tokens == 0
    assert pack([[1, 2]], [[3, 4]], tail_multiple=4).cu_seqlens.tolist() == [0, 4]


def test_hundred_thousand_sequences():
    n = 100_000
    lengths = np.random.randint(1, 5, n)
    prompts = [[i] * k for i, k in enumerate(lengths.tolist())]
    responses = [[i] * (i % 3) for i in range(n)]
    batch = pack(prompts, responses)
    sizes = lengths + np.arange(n) % 3
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(sizes).tolist()]
    assert torch.equal(batch.tokens_T, torch.arange(n).repeat_interleave(torch.from_numpy(sizes)))
    assert torch.equal(batch.tokens_T[batch.action_rows_A], batch.action_tokens_A)
    assert torch.equal(batch.tokens_T[batch.last_rows_N], torch.arange(n))


def test_strided_views_and_narrow_dtypes():
    base = np.arange(20)
    prompts = [base[::2], torch.arange(20)[::3], base.astype(np.uint8)[5:7], torch.arange(9, dtype=torch.int32)[1:4]]
    responses = [base[::-4], torch.arange(6).view(2, 3).t()[1], base.astype(np.int16)[:0], [1, 2]]
    batch = pack(prompts, responses)
    check(batch, oracle([list(map(int, p)) for p in prompts], [list(map(int, r)) for r in responses]))
    table = torch.arange(6).view(2, 3)
    assert pack(table, table.T.reshape(2, 3)).n_tokens == 12


def test_the_batch_owns_its_memory():
    prompt, response = np.array([1, 2]), np.array([3])
    batch = pack([prompt], [response])
    prompt[:], response[:] = 9, 9
    assert batch.tokens_T.tolist() == [1, 2, 3]
    assert batch.action_tokens_A.tolist() == [3]


def test_to_moves_every_tensor():
    batch = pack([[1]], [[2]], action_masks=[[1]]).to("meta")
    assert batch.tokens_T.device.type == batch.action_mask_A.device.type == "meta"
    assert batch.max_seqlen == 2


def test_split_actions_refuses_another_length():
    with pytest.raises(ValueError, match=r"x_A: expected a first dimension of 1 actions, got \(2,\)"):
        pack([[1]], [[2]]).split_actions(torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], []), "responses: expected one per prompt"),
        (([[1], []], [[1], [1]]), r"prompts\[1\] is empty"),
        (([[1], []], [[1], []]), r"prompts\[1\] is empty"),
        (([[1]], [[1, -1]]), r"responses\[0\]\[1\]: token ids must be >= 0, got -1"),
        (([[1], [2, -3]], [[1], [1]]), r"prompts\[1\]\[1\]: token ids must be >= 0, got -3"),
        (([[1], [2.5]], [[1], [1]]), r"prompts\[1\]: expected int64 values, got float64"),
        (([[1]], [torch.tensor([1.0])]), r"responses\[0\]: expected integers, got torch.float32"),
        (([[1]], [np.array([True])]), r"responses\[0\]: expected int64 values, got bool"),
        (([[1]], [[[1, 2]]]), r"responses\[0\]: expected one dimension, got shape \(1, 2\)"),
        (([[1]], [[[1, 2], [3]]]), r"responses\[0\]: expected a sequence of integers"),
        (([1], [[1]]), r"prompts\[0\]: expected one dimension"),
        ((7, [[1]]), "prompts: expected a sequence of token sequences, got int"),
        ((["text"], [[1]]), r"prompts\[0\]: expected one dimension"),
        (([[2**63]], [[1]]), r"prompts\[0\]"),
        (([[1], [2**70]], [[1], [1]]), r"prompts\[1\]: expected int64 values, got object"),
    ],
)
def test_refuses_bad_sequences(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_masks": [[1]]}, r"action_masks: expected one per response \(2\), got 1"),
        ({"action_masks": [[1, 0], [1, 0]]}, r"action_masks\[1\]: expected 1 entries, as responses\[1\] has, got 2"),
        ({"action_masks": [[1, 2], [1]]}, "action_masks: expected 0, 1 or bool, got 2"),
        ({"action_masks": [[1.0, 0.0], [1.0]]}, r"action_masks\[0\]: expected"),
        ({"tail_multiple": 0}, "tail_multiple: expected >= 1, got 0"),
        ({"tail_multiple": 2**40}, "do not fit cu_seqlens"),
        ({"tail_multiple": 2**64}, "tail_multiple: expected an int64"),
        ({"tail_multiple": 2.0}, "tail_multiple: expected an integer, got 2.0"),
        ({"tail_token": -1}, "tail_token: token ids must be >= 0, got -1"),
        ({"tail_token": True}, "tail_token: expected an integer, got True"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pack([[1], [2]], [[3, 4], [5]], **options)


RAW = {
    "prompt_tokens": np.array([1, 2]),
    "prompt_offsets": np.array([0, 2]),
    "response_tokens": np.array([3]),
    "response_offsets": np.array([0, 1]),
    "mask_offsets": None,
    "tail_multiple": 1,
    "tail_token": 0,
    "share_prompts": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": np.array([1.0, 2.0])}, "prompt_tokens: expected dtype int64, got float64"),
        ({"prompt_tokens": np.array([1, 2], np.int32)}, "prompt_tokens: expected dtype int64, got int32"),
        ({"prompt_tokens": np.array([[1, 2]])}, "prompt_tokens: expected one dimension, got 2"),
        ({"prompt_tokens": np.arange(4)[::2]}, "prompt_tokens: expected a contiguous array"),
        ({"prompt_offsets": np.array([], np.int64)}, r"prompts: expected N \+ 1 offsets"),
        ({"prompt_offsets": np.array([1, 2])}, "prompts: the first offset must be 0, got 1"),
        ({"prompt_offsets": np.array([0, 3])}, "prompts: the last offset must be the number of values 2, got 3"),
        ({"prompt_offsets": np.array([0, 3, 2])}, "prompts: offsets must not decrease, got 3 then 2 at index 2"),
    ],
)
def test_extension_checks_its_arrays(change, message):
    assert _C.pack(**RAW)["tokens_T"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=message):
        _C.pack(**RAW | change)


def test_packing_releases_the_gil():
    n = 3_000_000
    raw = RAW | {"prompt_tokens": np.ones(n, np.int64), "prompt_offsets": np.arange(n + 1)}
    raw |= {"response_tokens": np.zeros(0, np.int64), "response_offsets": np.zeros(n + 1, np.int64)}
    span = []

    def work():
        begin = time.perf_counter()
        _C.pack(**raw)
        span.extend([begin, time.perf_counter()])

    thread = threading.Thread(target=work)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    # Holding the GIL, the call would let this loop run before it and after it only.
    begin, end = span
    assert any(begin + (end - begin) * 0.25 < tick < begin + (end - begin) * 0.75 for tick in ticks)
