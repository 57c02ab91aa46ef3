"""sample_tokens in Triton under the interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import VocabShard, record_launches, sample_tokens, use_backend
from icegrt.kernels.sample_tokens.reference import candidate_bits, row_keys
from icegrt.kernels.sample_tokens.triton_row import candidate_hash, row_key
from tests.helpers.kernel_cases import module_constants, near_ties, virtual_rows
from tests.helpers.sampling_cases import ROWS, bitmask, by_row, drawn_ids


def draw(logits, backend="triton", seed=0, ids=None, positions=None, block=64, temperature=1.0, **options):
    rows = logits.shape[0]
    ids = torch.arange(rows) * 1_000_003 if ids is None else ids
    positions = torch.arange(rows) if positions is None else positions
    options |= {"temperature": temperature, "seed": seed, "sequence_ids": ids, "positions": positions}
    with use_backend(backend), record_launches() as launches, module_constants("sample_tokens", BLOCK=block):
        draws = sample_tokens(logits, **options)
    if backend == "triton":
        assert launches == [("sample_tokens_kernel", "triton")] * (1 if rows else 0)
    return draws


def draw_as_reference(logits, **options):
    """Assert that Triton draws the reference's tokens; return them."""
    token, logprob = draw(logits, **options)
    plain_token, plain_logprob = draw(logits, "reference", **options)
    assert torch.equal(token, plain_token), options
    torch.testing.assert_close(logprob, plain_logprob, rtol=1e-5, atol=1e-5)
    return token


@triton.jit
def bits_kernel(ids_ptr, positions_ptr, out_ptr, seed, start, size, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    key = row_key(seed, tl.load(ids_ptr + n), tl.load(positions_ptr + n))
    tl.store(out_ptr + n * size + lane, candidate_hash(key, start + lane).to(tl.int32), mask=lane < size)


@pytest.mark.parametrize("seed", [0, 1, -7, (1 << 62) + 12345])
@pytest.mark.parametrize("start", [0, 151_000])
def test_the_hash_is_the_references_bit_for_bit(seed, start):
    torch.manual_seed(0)
    ids = torch.cat([torch.randint(-(1 << 62), 1 << 62, (9,)), torch.tensor([0, 1, -1])])
    positions = torch.randint(0, 1 << 20, (12,))
    out = torch.empty(12, 100, dtype=torch.int32)
    bits_kernel[(12,)](ids, positions, out, seed, start, 100, BLOCK=128)
    assert torch.equal(out, candidate_bits(row_keys(seed, ids, positions), start, 100))


def check_tokens(V=300, rows=24, **options):
    torch.manual_seed(0)
    draw_as_reference(torch.randn(rows, V) * 2, **options)


@pytest.mark.parametrize("V", [7, 64, 300, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_tokens_and_logprobs_are_the_references(V, temperature):
    check_tokens(V, temperature=temperature)


def test_a_large_draw():
    torch.manual_seed(1)
    draw_as_reference(torch.randn(1500, 128) * 3, block=128, seed=5)


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_k": 1}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_truncation(options):
    check_tokens(150, 6, temperature=0.8, **options)


@pytest.mark.parametrize("top_p", [1e-7, 1e-12, 2.4e-7, 1 - 2**-53])
def test_top_p_at_the_ends_of_its_range(top_p):
    """A tiny top_p keeps the largest logit alone, and is passed to the kernel as a number of another width."""
    torch.manual_seed(0)
    logits = torch.randn(6, 150)
    token = draw_as_reference(logits, temperature=0.8, top_p=top_p)
    assert torch.equal(token, logits.argmax(-1)) == (top_p < 0.5)


def check_truncation_among_equals():
    logits = torch.zeros(5, 6)
    for options, survivors in (({"top_k": 2}, 2), ({"top_p": 0.4}, 3), ({"top_k": 4, "top_p": 0.5}, 2)):
        token = draw_as_reference(logits, block=4, **options)
        assert token.max() < survivors
        _, logprob = draw(logits, block=4, **options)
        torch.testing.assert_close(logprob, torch.full((5,), 1 / survivors).log())


def test_truncation_keeps_the_lowest_ids_of_equals():
    check_truncation_among_equals()


def check_settings_by_row(allow=True, columns=40):
    """A batch of mixed settings draws what the reference draws, and what each row draws alone with numbers."""
    torch.manual_seed(2)
    rows = ROWS[:6]
    logits = torch.randn(len(rows), columns) * 2
    words = bitmask(drawn_ids(len(rows), columns, 0.6)) if allow else None
    ids = torch.arange(len(rows)) + 40
    keys = {"ids": ids, "positions": ids, "allowed_NW": words}
    out = (torch.full((len(rows),), -1), torch.full((len(rows),), torch.nan))
    token, logprob = draw(logits, **by_row(rows), **keys, out=out)
    assert token is out[0] and logprob is out[1]
    plain_token, plain_logprob = draw(logits, "reference", **by_row(rows), **keys)
    assert torch.equal(token, plain_token)
    torch.testing.assert_close(logprob, plain_logprob, rtol=1e-5, atol=1e-5)
    for n in (1, 5):
        row = rows[n]
        own = {"ids": ids[n : n + 1], "positions": ids[n : n + 1], "allowed_NW": words[n : n + 1] if allow else None}
        alone = draw(logits[n : n + 1], **row, **own)
        assert alone[0] == token[n] and alone[1] == logprob[n], row


def test_settings_by_row():
    check_settings_by_row()


def check_min_p():
    logits = (-torch.arange(6) * torch.tensor(2.0).log()).expand(12, 6)
    for min_p, survivors in ((1.0, 1), (0.3, 2)):
        assert draw_as_reference(logits, block=8, min_p=min_p).max() < survivors
    assert draw_as_reference(logits, block=4, min_p=torch.full((12,), 0.6), temperature=2.0).max() < 2


def test_min_p_is_relative_to_the_largest():
    check_min_p()


def check_allowed():
    """Ids of several words, in several blocks; the arg-max too."""
    allowed = torch.zeros(6, 150, dtype=torch.bool)
    allowed[:, [0, 31, 32, 63, 149]] = True
    logits = torch.arange(150.0).expand(6, 150) / 100
    token = draw_as_reference(logits, allowed_NW=bitmask(allowed))
    assert allowed[0, token].all() and token.unique().numel() > 2
    assert draw_as_reference(logits, allowed_NW=bitmask(allowed), temperature=0.0).unique().tolist() == [149]
    shard = VocabShard(None, 0, 150, 149)
    assert draw_as_reference(logits, allowed_NW=bitmask(allowed), temperature=0.0, shard=shard)[0] == 63


def test_only_allowed_ids_are_drawn():
    check_allowed()


def check_negative_infinite_and_tied_logits():
    torch.manual_seed(0)
    logits = torch.randn(6, 150) - 1e4
    logits[1] = -torch.inf
    logits[1, 130] = 3.0
    logits[2, :100] = -torch.inf
    draw_as_reference(logits)
    greedy = torch.zeros(3, 150)
    greedy[0, [70, 149]] = 5.0
    greedy[1, [3, 4, 100]] = 5.0
    greedy[2] = -torch.inf
    assert draw_as_reference(greedy[:2], temperature=0.0).tolist() == [70, 3]
    token, logprob = draw(greedy[2:])
    assert token.item() == 0 and logprob.item() == -torch.inf


def test_all_negative_infinite_and_tied_logits():
    check_negative_infinite_and_tied_logits()


def check_far_from_zero():
    """The draw and its log-prob are those of fp64, also between candidates whose quotients fp32 would round."""
    logits, ids, expected = near_ties(100, 1.7)
    token, logprob = draw(logits, ids=ids, positions=torch.zeros_like(ids), temperature=1.7)
    assert torch.equal(token, expected)
    truth = (logits.double() / 1.7).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    assert (logprob.double() - truth).abs().max() < 2e-6


def test_logits_far_from_zero_lose_no_digits():
    check_far_from_zero()


def check_padding():
    padded = torch.zeros(30, 96)
    padded[:, 70:] = 100.0
    token, logprob = draw(padded, shard=VocabShard(None, 0, 96, 70))
    assert token.max() < 70
    torch.testing.assert_close(logprob, torch.full((30,), -torch.tensor(70.0).log()))


def test_padding_is_never_drawn_and_never_counts():
    check_padding()


def check_row_offsets_beyond_int32():
    logits = virtual_rows(40)
    logits[2, 33] = 50.0
    token, logprob = draw(logits)
    assert token[2] == 33 and abs(logprob[2]) < 1e-5


def test_row_offsets_beyond_int32():
    check_row_offsets_beyond_int32()


def test_views_batch_order_dtypes_and_empty_batches():
    torch.manual_seed(0)
    logits, ids, positions = torch.randn(8, 90), torch.randint(0, 1 << 40, (8,)), torch.randint(0, 999, (8,))
    token, logprob = draw(logits, ids=ids, positions=positions, temperature=0.8)
    order = torch.randperm(8)
    shuffled = draw(logits[order], ids=ids[order], positions=positions[order].int(), temperature=0.8)
    assert torch.equal(shuffled[0], token[order]) and torch.equal(shuffled[1], logprob[order])
    strided = torch.cat([logits, logits], 1).t().contiguous().t()[:, :90]
    assert torch.equal(draw(strided, ids=ids, positions=positions, temperature=0.8)[0], token)
    for dtype in (torch.bfloat16, torch.float16):
        draw_as_reference(logits.to(dtype), temperature=0.7)
    token, logprob = draw(torch.zeros(0, 4))
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64


@given(
    rows=st.integers(0, 3),
    V=st.integers(1, 140),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 500]),
    top_p=st.sampled_from([1.0, 0.37, 0.93]),
    seed=st.integers(-(1 << 70), 1 << 70),
    spread=st.sampled_from([0.1, 3.0, 50.0]),
)
@settings(max_examples=12)
def test_drawn_shapes_and_settings(rows, V, temperature, top_k, top_p, seed, spread):
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(rows, V, generator=generator) * spread
    draw_as_reference(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
