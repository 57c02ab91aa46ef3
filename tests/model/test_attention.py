"""Packed attention: sequences never see each other, whichever implementation attends."""

import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from icegrt.model import attention

LENGTHS = [3, 1, 7, 3]


def streams(heads=4, kv_heads=2, dim=8, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return [torch.randn(total, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]


def one_by_one(q, k, v, lengths=LENGTHS):
    rows = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in parts)
        rows.append(scaled_dot_product_attention(qi, ki, vi, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [1], [2, 0, 3]])
def test_packed_attention_is_each_sequence_alone(lengths):
    q, k, v = streams(lengths=lengths)
    expected = one_by_one(q, k, v, lengths)
    torch.testing.assert_close(attention.packed_causal_attention(q, k, v, lengths), expected)


def test_flash_attention_is_called_with_the_boundaries_of_the_stream():
    arguments = {}

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, causal):
        arguments.update(cu=cu_q.tolist(), same=torch.equal(cu_q, cu_k), longest=(longest_q, longest_k), causal=causal)
        return one_by_one(q, k, v)

    q, k, v = streams()
    out = attention.flash_varlen_attention(varlen, q, k, v, LENGTHS)
    assert arguments == {"cu": [0, 3, 4, 11, 14], "same": True, "longest": (7, 7), "causal": True}
    torch.testing.assert_close(out, attention.packed_causal_attention(q, k, v, LENGTHS))


def test_flash_attention_reads_the_offsets_of_the_batch_in_every_layer(monkeypatch):
    received = []

    def varlen(q, k, v, cu_q, cu_k, *args, **kwargs):
        received.extend([cu_q, cu_k])
        return q

    def attend(*args, groups, **kwargs):
        assert groups is None
        return attention.flash_varlen_attention(varlen, *args, **kwargs)

    monkeypatch.setattr(attention, "packed_causal_attention", attend)
    cu_seqlens = torch.tensor([0, 3, 4, 11, 14], dtype=torch.int32)
    metadata = attention.AttentionMetadata(lengths=LENGTHS, cu_seqlens=cu_seqlens)
    config = types.SimpleNamespace(window_size=None)
    for layer in (1, 2):
        attention.PackedAttention(config, layer)(*(x[:, None] for x in streams()), packed_seq_params=metadata)
    assert len(received) == 4 and all(offsets is cu_seqlens for offsets in received)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6], [11, 1]])
def test_a_window_shows_the_last_tokens_and_the_current_one(window, lengths):
    q, k, v = streams(lengths=lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = position[:, None] - position
    visible = (sequence[:, None] == sequence) & (distance >= 0) & (distance < window)
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = scaled_dot_product_attention(*batched, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(attention.packed_causal_attention(q, k, v, lengths, window), expected)


def test_flash_attention_is_told_how_many_tokens_lie_before_the_current_one():
    arguments = {}

    def varlen(q, *args, window_size, **kwargs):
        arguments["window"] = window_size
        return q

    attention.flash_varlen_attention(varlen, *streams(), LENGTHS, window=3)
    assert arguments["window"] == (2, 0)


def test_flash_attention_is_found_when_installed_and_missed_quietly_when_not(monkeypatch):
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = lambda *args, **kwargs: None
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    attention.flash_attention.cache_clear()
    assert attention.flash_attention() is fake.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention.flash_attention.cache_clear()
    assert attention.flash_attention() is None
    attention.flash_attention.cache_clear()
