"""Attention over shared prompts is that of every sequence alone, and so are the summed gradients of shared rows."""

import inspect
import sys
import types

import pytest
import torch

from icegrt.model import attention_parts, shared_prompts
from icegrt.model.attention import AttentionMetadata, PackedAttention, packed_causal_attention
from icegrt.model.shared_prompts import shared_prompt_attention
from tests.helpers.shared_prompt_cases import CASES, dense, errors, oracle, rows_of_sequences, stream_of, streams_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def check(lengths, dtype, limit, window=None, module=shared_prompts, **options):
    """Compare a module's attention with the oracle: output and gradients."""
    batch, groups = stream_of(lengths, module)
    streams, grad = streams_of(batch, dtype)
    expected = oracle(streams, grad, rows_of_sequences(batch, lengths), window)
    found = errors(lambda *x: module.shared_prompt_attention(*x, groups, window, **options), streams, grad, expected)
    assert max(found) < limit, found


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_rows_and_gradients_are_those_of_every_sequence_alone(lengths, window):
    check(lengths, torch.float64, 1e-13, window)
    check(lengths, torch.float32, 5e-6 if window == 1 else 1e-6, window)


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=8).filter(
        lambda lengths: len({prompt for prompt, _ in lengths}) < len(lengths)
    ),
    st.sampled_from([None, 2, 4]),
)
def test_any_lengths(lengths, window):
    check(lengths, torch.float64, 1e-13, window)


def test_every_head_may_have_a_key_of_its_own():
    lengths = CASES["groups and whole sequences"]
    batch, groups = stream_of(lengths)
    streams, grad = streams_of(batch, torch.float64, kv_heads=4)
    expected = oracle(streams, grad, rows_of_sequences(batch, lengths), None)
    assert max(errors(lambda *x: shared_prompt_attention(*x, groups), streams, grad, expected)) < 1e-13


def test_scores_of_any_size_merge():
    # The prompt outweighs the response by e^80 in some rows, and the reverse in others: exp of a sum would overflow.
    lengths = CASES["one group"]
    batch, groups = stream_of(lengths)
    (q, k, v), grad = streams_of(batch, torch.float32)
    k = k * torch.where(torch.arange(len(k)) % 3 == 0, 120.0, 1.0)[:, None, None]
    expected = oracle((q, k, v), grad, rows_of_sequences(batch, lengths), None)
    found = errors(lambda *x: shared_prompt_attention(*x, groups), (q, k, v), grad, expected)
    assert max(found) < 2e-5, found


def test_the_error_is_within_twice_that_of_unshared_attention():
    lengths = [(40, 30), (40, 50), (40, 1), (7, 60), (7, 60)]
    batch, groups = stream_of(lengths)
    (q, k, v), grad = streams_of(batch, torch.float32)
    rows = rows_of_sequences(batch, lengths)
    expected = oracle((q, k, v), grad, rows, None)
    found = errors(lambda *x: shared_prompt_attention(*x, groups), (q, k, v), grad, expected)

    def unshared(*heads):
        stream = torch.cat(rows)
        out = packed_causal_attention(*(x[stream] for x in heads), [len(each) for each in rows])
        return torch.zeros_like(heads[0]).index_put((stream,), out)

    budget = errors(unshared, (q, k, v), grad, expected)
    assert all(a < 2 * b + 1e-8 for a, b in zip(found, budget, strict=True)), (found, budget)


def test_bfloat16_on_a_cpu_is_computed_in_fp32():
    lengths = CASES["groups and whole sequences"]
    batch, groups = stream_of(lengths)
    streams, _ = streams_of(batch, torch.bfloat16)
    out = packed_causal_attention(*streams, batch.lengths, groups=groups)
    wide = shared_prompt_attention(*(x.float() for x in streams), groups)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.bfloat16())


# -- what other devices run --------------------------------------------------------------------------------------------


def test_without_a_log_sum_exp_the_keys_of_a_prompt_are_repeated(monkeypatch):
    monkeypatch.setattr(shared_prompts, "part_kernels", lambda q: None)
    for lengths in CASES.values():
        check(lengths, torch.float64, 1e-13)


def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, causal, window_size=(-1, -1)):
    """flash_attn_varlen_func by the textbook: the last query is aligned with the last key."""
    out = []
    assert causal
    assert (longest_q, longest_k) == (cu_q.diff().max(), cu_k.diff().max())
    for i in range(len(cu_q) - 1):
        qi, ki, vi = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        padded = torch.cat([torch.zeros(len(ki) - len(qi), *q.shape[1:], dtype=q.dtype), qi])
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        out.append(dense(padded, ki, vi, window)[len(ki) - len(qi) :])
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_a_window_on_a_gpu_is_one_call_over_the_keys_that_it_sees(monkeypatch, window):
    monkeypatch.setattr(shared_prompts, "part_kernels", lambda q: None)
    for lengths in CASES.values():
        check(lengths, torch.float64, 1e-13, window, varlen=varlen)


def test_repeated_keys_are_found_once_per_window_for_all_layers():
    _, groups = stream_of(CASES["one group"])
    device = torch.device("cpu")
    assert groups.repeated_keys(3, device) is groups.repeated_keys(3, device)
    assert groups.repeated_keys(3, device).lengths == [5, 2 + 3, 2 + 4, 2 + 3, 1]
    assert groups.repeated_keys(None, device).lengths == [5, 5 + 3, 5 + 4, 5 + 3, 1]


class Flash:
    """torch's flash attention over packed sequences, by the textbook; `calls` records what it received."""

    def __init__(self):
        self.calls = []

    def scores(self, q, k, cu_q, cu_k, is_causal):
        """Scores of all heads, [H, Tq, Tk], with -inf outside the spans."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        span_q, span_k = (torch.arange(len(cu) - 1).repeat_interleave(cu.diff().long()) for cu in (cu_q, cu_k))
        hidden = span_q[:, None] != span_k
        if is_causal:
            hidden |= torch.arange(len(span_q))[:, None] < torch.arange(len(span_k))
        return (torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5).masked_fill(hidden, -torch.inf)

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (dropout, debug) == (0.0, False)
        self.calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, is_causal))
        lse = torch.logsumexp(self.scores(q, k, cu_q, cu_k, is_causal), -1)
        p = (self.scores(q, k, cu_q, cu_k, is_causal) - lse[..., None]).exp()
        out = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out, lse, torch.tensor([7 + is_causal]), torch.tensor([0]), torch.empty(0)

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, rng_state, unused
    ):
        assert lse.shape == (q.shape[1], len(q))
        assert lse.is_contiguous()
        assert rng_state == 7 + is_causal
        group = q.shape[1] // k.shape[1]
        p = (self.scores(q, k, cu_q, cu_k, is_causal) - lse[..., None]).exp()
        dv = torch.einsum("hij,ihd->jhd", p, grad)
        dp = torch.einsum("ihd,jhd->hij", grad, v.repeat_interleave(group, 1))
        ds = p * (dp - (grad * out).sum(-1).t()[..., None]) / q.shape[2] ** 0.5
        dq = torch.einsum("hij,jhd->ihd", ds, k.repeat_interleave(group, 1))
        dk = torch.einsum("hij,ihd->jhd", ds, q)
        return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def test_on_a_gpu_two_calls_of_flash_attention_are_merged(monkeypatch):
    flash = Flash()
    monkeypatch.setattr(attention_parts, "aten", flash)
    monkeypatch.setattr(shared_prompts, "part_kernels", lambda q: attention_parts.FLASH_KERNELS)
    for lengths in CASES.values():
        check(lengths, torch.float64, 1e-13)
    flash.calls.clear()
    check(CASES["groups and whole sequences"], torch.float64, 1e-13)
    own = [0, 6, 9, 11, 18, 23, 28, 29, 37, 40]  # prompts of 6 and 3, their responses, a whole sequence, the tail
    assert flash.calls == [(own, own, 8, 8, True), ([0, 9, 20], [0, 6, 9], 11, 6, False)]


def test_only_half_precision_on_a_gpu_has_a_log_sum_exp_for_packed_streams(monkeypatch):
    monkeypatch.setattr(attention_parts, "flash_kernels", lambda: "flash")

    def kernels(device, dtype, head_dim):
        return attention_parts.part_kernels(
            types.SimpleNamespace(
                device=torch.device(device), is_cuda=device == "cuda", dtype=dtype, shape=(3, 2, head_dim)
            )
        )

    assert kernels("cpu", torch.float32, 5) is attention_parts.CPU_KERNELS
    assert kernels("cuda", torch.bfloat16, 64) == "flash"
    assert kernels("cuda", torch.float32, 64) is None
    assert kernels("cuda", torch.bfloat16, 68) is None
    assert kernels("cuda", torch.bfloat16, 264) is None


def test_layers_attend_to_the_groups_of_the_batch():
    lengths = CASES["groups and whole sequences"]
    batch, groups = stream_of(lengths)
    streams, _ = streams_of(batch, torch.float32)
    config = types.SimpleNamespace(window_size=(2, 0), window_attn_skip_freq=[0, 1])
    for layer, window in ((1, None), (2, 3)):
        metadata = AttentionMetadata(lengths=batch.lengths, cu_seqlens=batch.cu_seqlens, groups=groups)
        out = PackedAttention(config, layer)(*(x.unsqueeze(1) for x in streams), packed_seq_params=metadata)
        expected = oracle(streams, torch.zeros_like(streams[0]), rows_of_sequences(batch, lengths), window)[0]
        torch.testing.assert_close(out.squeeze(1), expected.flatten(1).float(), rtol=1e-5, atol=1e-5)


# -- mutants -----------------------------------------------------------------------------------------------------------

MUTANTS = {
    "the weight of the prompt and of the response are swapped": (
        shared_prompts,
        "torch.sigmoid(seen_lse - own_lse)",
        "torch.sigmoid(own_lse - seen_lse)",
    ),
    "both parts weigh the same": (shared_prompts, "torch.sigmoid(seen_lse - own_lse)", "torch.sigmoid(seen_lse * 0)"),
    "the backward sees the log-sum-exp of the response alone": (
        shared_prompts,
        "own_lse.copy_(torch.logaddexp(own_lse, seen_lse))",
        "None",
    ),
    "the backward sees the output of the response alone": (
        shared_prompts,
        "ctx.save_for_backward(q, k, v, out, lse_TH)",
        "ctx.save_for_backward(q, k, v, kernels.forward(q, k, v, groups.own_spans)[0], lse_TH)",
    ),
    "the prompt's gradient is that of its last response": (
        shared_prompts,
        "total[rows] += part",
        "total[rows] = part",
    ),
    "responses do not reach the prompt": (shared_prompts, "(responses, prompts, prompts), strict=True", "(responses,)"),
    "responses of all groups see the first prompt": (
        shared_prompts,
        "Spans(self._group_lengths, self.prompt_lengths,",
        "Spans([sum(self._group_lengths), *[0] * (len(self.sizes) - 1)], self.prompt_lengths,",
    ),
    "a window counts rows of the response only": (shared_prompts, "min(self.lengths[prompt], window - 1)", "0"),
    "a window begins one token late": (shared_prompts, "window - 1)\n", "window - 2)\n"),
    "a window that just reaches the end is none": (
        shared_prompts,
        "window < groups.longest",
        "window < groups.longest - 1",
    ),
    "the prompt part is causal": (shared_prompts, "cu_prompts, is_causal=False", "cu_prompts, is_causal=True"),
    "rows of equal spans are not adjacent": (attention_parts, "return [slice(start, start", "return [slice(0, 0"),
    "spans of equal lengths have the first one's rows": (
        attention_parts,
        "members.setdefault(shape, []).append(start)",
        "members.setdefault(shape, []).append(members[shape][0] if shape in members else start)",
    ),
}


def mutated(module, old, new):
    source = inspect.getsource(module)
    assert source.count(old) == 1, old
    copy = types.ModuleType(module.__name__)
    sys.modules[copy.__name__], original = copy, sys.modules[copy.__name__]
    try:
        exec(compile(source.replace(old, new), module.__file__, "exec"), copy.__dict__)
    finally:
        sys.modules[copy.__name__] = original
    return copy


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch):
    module, old, new = MUTANTS[name]
    mutant = mutated(module, old, new)
    attention = shared_prompts
    if module is attention_parts:
        monkeypatch.setattr(shared_prompts, "part_kernels", lambda q: mutant.CPU_KERNELS)
    else:
        attention = mutant
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        for lengths in CASES.values():
            for window in (None, 3, 6, 12):
                check(lengths, torch.float64, 1e-13, window, attention)
