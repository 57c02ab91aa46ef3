"""The Triton kernels on a CUDA device: launched for real, held to the error budget, and the same bits twice."""

import pytest
import torch

from icegrt.kernels import (
    linear_logprobs,
    linear_ppo_loss,
    ppo_policy_loss,
    record_launches,
    token_logprobs,
    use_backend,
    value_loss,
)
from tests.helpers.kernel_cases import assert_within_budget, plain_logprobs


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

    def fused_logprobs(x):
        out = token_logprobs(x, labels, entropy=True)
        return out.logprob_A, out.entropy_A

    with use_backend("triton"), record_launches() as launches:
        results, repeated = run(logits, fused_logprobs), run(logits, fused_logprobs)
    assert ("token_logprobs_forward", "triton") in launches and ("token_logprobs_backward", "triton") in launches
    plain = run(logits.float(), lambda x: plain_logprobs(x, labels))
    truth = run(logits.double(), lambda x: plain_logprobs(x, labels))
    for part, (a, b) in enumerate(zip(results, repeated, strict=True)):
        assert torch.equal(a, b)
        atol = 2e-2 if part == 2 and dtype is not torch.float32 else 2e-5
        assert_within_budget(a.float(), plain[part], truth[part], atol=atol)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_ratio_is_exactly_one_after_scoring_in_bf16(entropy_coef):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(1000, 64, device="cuda", generator=generator).bfloat16()
    labels = torch.randint(1000, (300,), device="cuda", generator=generator)
    advantage = torch.randn(300, device="cuda", generator=generator)
    old = linear_logprobs(hidden, weight, labels, chunk_rows=128).logprob_A.detach()
    options = {"normalizer": 300.0, "chunk_rows": 128, "entropy_coef": entropy_coef}
    loss = linear_ppo_loss(hidden.requires_grad_(), weight, labels, old, advantage, **options)
    assert loss.stats.ratio_min.item() == loss.stats.ratio_max.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_linear_ppo_loss_value_gradient_and_bits(dtype, masked):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(301, 64, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(32003, 64, device="cuda", generator=generator) * 0.2).to(dtype)
    labels = torch.randint(32003, (301,), device="cuda", generator=generator)
    old = -10 + 0.3 * torch.randn(301, device="cuda", generator=generator)
    advantage = torch.randn(301, device="cuda", generator=generator)
    mask = torch.arange(301, device="cuda") % 3 != 1 if masked else None
    options = {"normalizer": 301.0, "mask_A": mask, "entropy_coef": 0.01, "chunk_rows": 128}

    def run(backend, kind):
        h, w = (x.to(kind).requires_grad_() for x in (hidden, weight))
        with use_backend(backend), record_launches() as launches:
            out = linear_ppo_loss(
                h, w, labels, old.to(kind if kind == torch.float64 else old.dtype), advantage, **options
            )
            out.loss.backward()
        return launches, (out.loss, h.grad, w.grad)

    launches, results = run("triton", dtype)
    assert {name for name, _ in launches} >= {"token_logprobs_forward", "ppo_policy_loss", "token_logprobs_backward"}
    assert all(torch.equal(a, b) for a, b in zip(results, run("triton", dtype)[1], strict=True))
    _, plain = run("reference", dtype)
    _, truth = run("reference", torch.float64)
    for a, b, truth_value in zip(results, plain, truth, strict=True):
        # Low precision: PyTorch rounds the logits' gradient there too, while the reference keeps it in fp32.
        atol = (2e-5 if dtype is torch.float32 else 2e-2) * float(truth_value.abs().max())
        assert_within_budget(a.float(), b.float(), truth_value, atol=atol)


@pytest.mark.parametrize("size", [0, 1, 1025, 1 << 20])
def test_policy_and_value_loss_without_a_host_synchronisation(size):
    generator = torch.Generator("cuda").manual_seed(0)
    new, noise, advantage = torch.randn(3, size, device="cuda", generator=generator).unbind()
    old = new + 0.3 * noise
    mask = torch.arange(size, device="cuda") % 3 != 1
    for op in (ppo_policy_loss, value_loss):
        leaf = new.clone().requires_grad_()
        with use_backend("triton"):
            op(leaf, old, advantage, normalizer=7.0, mask_A=mask).loss.backward()  # compiles
            leaf.grad = None
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = op(leaf, old, advantage, normalizer=7.0, mask_A=mask)
                out.loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        wide = new.double().requires_grad_()
        with use_backend("reference"):
            truth = op(wide, old.double(), advantage.double(), normalizer=7.0, mask_A=mask)
        truth.loss.backward()
        torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.stats.count, truth.stats.count)
