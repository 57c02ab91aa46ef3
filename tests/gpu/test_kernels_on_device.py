"""The Triton kernels on a CUDA device: launched for real, held to the error budget, and the same bits twice."""

import pytest
import torch
from kernel_cases import assert_within_budget, plain_logprobs

from icegrt.kernels import linear_logprobs, linear_ppo_loss, record_launches, token_logprobs, use_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [7, 1000, 32003, 152064])
def test_token_logprobs_forward_and_backward(vocab, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (4 * torch.randn(65, vocab, device="cuda", generator=generator)).to(dtype)
    labels = torch.randint(vocab, (65,), device="cuda", generator=generator)
    labels[::7] = -100
    upstream = torch.randn(65, device="cuda", generator=generator)

    def run(x, call):
        x = x.clone().requires_grad_()
        logprob, entropy = call(x)
        (logprob * upstream.to(logprob.dtype)).sum().backward()
        return logprob, entropy, x.grad

    def ours(x):
        out = token_logprobs(x, labels, entropy=True)
        return out.logprob_A, out.entropy_A

    with use_backend("triton"), record_launches() as launches:
        mine, again = run(logits, ours), run(logits, ours)
    assert ("token_logprobs", "triton") in launches
    plain = run(logits.float(), lambda x: plain_logprobs(x, labels))
    truth = run(logits.double(), lambda x: plain_logprobs(x, labels))
    for part, (a, b) in enumerate(zip(mine, again, strict=True)):
        assert torch.equal(a, b)
        atol = 2e-2 if part == 2 and dtype is not torch.float32 else 2e-5
        assert_within_budget(a.float(), plain[part], truth[part], atol=atol)


def test_the_ratio_is_exactly_one_after_scoring_in_bf16():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(1000, 64, device="cuda", generator=generator).bfloat16()
    labels = torch.randint(1000, (300,), device="cuda", generator=generator)
    advantage = torch.randn(300, device="cuda", generator=generator)
    old = linear_logprobs(hidden, weight, labels, chunk_rows=128).logprob_A.detach()
    loss = linear_ppo_loss(hidden.requires_grad_(), weight, labels, old, advantage, normalizer=300.0, chunk_rows=128)
    assert loss.stats.ratio_min.item() == loss.stats.ratio_max.item() == 1.0
