"""Attention over shared prompts on a CUDA device, against every sequence alone in fp64 on the host."""

import pytest
import torch

from icegrt.model import attention_parts
from icegrt.model.attention import packed_causal_attention
from icegrt.model.shared_prompts import PromptGroups
from tests.helpers.shared_prompt_cases import errors, oracle, rows_of_sequences, stream_of, streams_of

# Ragged groups, a whole sequence, one-token prompts and responses, spans beyond a tile of flash attention.
LENGTHS = [(300, 170), (300, 1), (300, 90), (7, 200), (1, 1), (1, 150), (64, 33), (64, 33), (64, 33)]


def on_device(dtype, kv_heads):
    batch, _ = stream_of(LENGTHS)
    streams, grad = streams_of(batch, dtype, kv_heads=kv_heads, dim=64)
    return batch, batch.to("cuda"), [x.cuda() for x in streams], grad.cuda()


def shared(moved, window):
    groups = PromptGroups(moved.lengths, moved.group_sizes, moved.cu_seqlens, moved.cu_groups)
    return lambda *heads: packed_causal_attention(
        *heads, moved.lengths, window, cu_seqlens=moved.cu_seqlens, groups=groups
    )


def alone(rows, window):
    """Every sequence by itself, with the prompt's rows repeated."""
    stream = torch.cat(rows).cuda()

    def attend(*heads):
        out = packed_causal_attention(*(x[stream] for x in heads), [len(each) for each in rows], window)
        return torch.zeros_like(heads[0]).index_put((stream,), out)

    return attend


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_within_twice_that_of_sequences_alone(dtype, kv_heads, window):
    batch, moved, streams, grad = on_device(dtype, kv_heads)
    rows = rows_of_sequences(batch, LENGTHS)
    expected = [x.cuda() for x in oracle([x.cpu() for x in streams], grad.cpu(), rows, window)]
    found = errors(shared(moved, window), streams, grad, expected)
    budget = errors(alone(rows, window), streams, grad, expected)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(found, budget, strict=True)), (found, budget)


def test_half_precision_runs_two_calls_of_flash_attention(monkeypatch):
    if attention_parts.flash_kernels() is None:
        pytest.skip("torch was built without flash attention")
    calls, forward = [], attention_parts.FLASH_KERNELS.forward
    counted = attention_parts.FLASH_KERNELS._replace(forward=lambda *args: calls.append(args) or forward(*args))
    monkeypatch.setattr(attention_parts, "FLASH_KERNELS", counted)
    _, moved, streams, _ = on_device(torch.bfloat16, 2)
    first = shared(moved, None)(*streams)
    assert len(calls) == 2
    assert torch.equal(first, shared(moved, None)(*streams))
