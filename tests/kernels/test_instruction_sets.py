"""C++ with vectors of its own is compiled for several instruction sets: each computes what the reference computes."""

import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from icegrt.kernels import decode_linear, linear_logprobs, linear_ppo_loss, packed_attention, use_backend

torch.manual_seed(0)
torch.set_num_threads(1)
hidden, weight, labels = torch.randn(70, 33), torch.randn(1100, 33), torch.randint(0, 1100, (70,))
advantage = torch.randn(70)
lengths = [5, 41, 24]
q, k, v = (torch.randn(70, heads, 24) for heads in (4, 2, 2))


def results(backend):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, q, k, v)]
    with use_backend(backend):
        scored = linear_logprobs(*leaves[:2], labels, temperature=0.7, entropy=True)
        loss = linear_ppo_loss(*leaves[:2], labels, None, advantage, normalizer=9.0, entropy_coef=0.1).loss
        attended = packed_attention(*leaves[2:], lengths)
        total = scored.logprob_A.sum() + scored.entropy_A.square().sum() + loss + attended.square().sum()
        decoded = decode_linear(hidden[:7], weight)
        halves = decode_linear(hidden[:7].bfloat16(), weight.bfloat16()).float()
    return [scored.logprob_A, scored.entropy_A, loss, attended, decoded, halves, *torch.autograd.grad(total, leaves)]


for number, (ours, theirs) in enumerate(zip(results("cpp"), results("reference"), strict=True)):
    assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max() + (0.05 if number == 5 else 0), number
print("compared", ours.double().sum().item())
"""


def run(instruction_set, code=COMPARE):
    environment = os.environ | {"ICEGRT_INSTRUCTION_SET": instruction_set, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("instruction_set", ["plain", "avx2", "avx512"])
def test_each_set_computes_what_the_reference_computes(instruction_set):
    process = run(instruction_set)
    if "ICEGRT_INSTRUCTION_SET: expected" in process.stderr and instruction_set != "plain":
        pytest.skip(f"this processor, or the compiler, has no {instruction_set}")
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.startswith("compared")


def test_an_unknown_set_is_an_error_that_lists_those_of_the_processor():
    process = run("sse9")
    assert process.returncode == 1
    assert "ICEGRT_INSTRUCTION_SET: expected" in process.stderr and "plain, got sse9" in process.stderr
