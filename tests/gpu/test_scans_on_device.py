"""shaped_gae, the sampler and the elementwise kernels on a CUDA device: error budget, same bits, same tokens."""

import pytest
import torch

from icegrt.kernels import (
    kl_divergence,
    masked_moments,
    record_launches,
    sample_tokens,
    shaped_gae,
    use_backend,
    whiten,
)
from tests.helpers.kernel_cases import assert_within_budget

RESULTS = ("advantage_A", "return_A", "reward_A", "kl_N")


def batch(lengths, slack=0):
    generator = torch.Generator().manual_seed(0)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), torch.as_tensor(lengths).cumsum(0)]).int()
    score = torch.where(cu.diff() > 0, torch.randn(len(lengths), generator=generator), 0.0)
    return [score, *(torch.randn(int(cu[-1]) + slack, generator=generator) for _ in range(3)), cu]


def on_device(streams):
    return [x.cuda() for x in streams]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[1, 88, 1, 0, 2500, 40, 7], [100_000], [1] * 100_000, [100_000] * 10, [3, 128, 129, 1024] * 300],
    ids=["ragged", "one of 100k", "100k of one", "10 of 100k", "1,200 sequences"],
)
@pytest.mark.parametrize("variant", [{}, {"lam_value": 1.0}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_shaped_gae(lengths, masked, variant):
    streams = batch(lengths, slack=5)
    mask = None
    if masked:
        mask = torch.rand(streams[1].shape, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[streams[4][:-1][streams[4].diff() > 0].long()] = True
    options = {"kl_coef": 0.05, "gamma": 0.999, "lam": 0.97, **variant}
    device_mask = None if mask is None else mask.cuda()
    with use_backend("triton"), record_launches() as launches:
        out = shaped_gae(*on_device(streams), **options, mask_A=device_mask)
        repeated = shaped_gae(*on_device(streams), **options, mask_A=device_mask)
    assert launches == [("shaped_gae_kernel", "triton")] * 2
    with use_backend("reference"):
        plain = shaped_gae(*streams, **options, mask_A=mask)
        wide = [x.double() if x.is_floating_point() else x for x in streams]
        truth = shaped_gae(*wide, **options, mask_A=mask)
    for name in RESULTS:
        assert torch.equal(getattr(out, name), getattr(repeated, name))
        assert_within_budget(getattr(out, name).cpu(), getattr(plain, name), getattr(truth, name), 1e-4)
    assert out.moments.count == truth.moments.count and out.moments.m2 == repeated.moments.m2
    torch.testing.assert_close(out.moments.m2.cpu(), truth.moments.m2, rtol=1e-4, atol=1e-4)


def test_shaped_gae_gives_the_same_bits_alone_and_in_a_batch():
    streams = on_device(batch([700, 5000, 33]))
    with use_backend("triton"):
        batched = shaped_gae(*streams, kl_coef=0.05)
        part = slice(700, 5700)
        cu = torch.tensor([0, 5000], device="cuda")
        single = shaped_gae(streams[0][1:2], *(x[part] for x in streams[1:4]), cu, kl_coef=0.05)
    assert torch.equal(batched.advantage_A[part], single.advantage_A) and batched.kl_N[1] == single.kl_N[0]


def test_a_score_without_an_action_is_loud_on_a_device():
    none, cu = torch.zeros(2, device="cuda"), torch.tensor([0, 2, 2], device="cuda")
    with use_backend("triton"):
        out = shaped_gae(torch.tensor([1.0, 0.5], device="cuda"), none, none, none, cu, kl_coef=0.0)
    assert out.kl_N.isnan().tolist() == [False, True] and out.moments.mean.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("vocab", [1000, 32003, 152064])
def test_tokens_are_those_of_the_reference_on_the_cpu(vocab, options, dtype):
    rows = 64
    logits = (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
    random_state = {"seed": 1, "sequence_ids": torch.arange(rows) * 77, "positions": torch.arange(rows)}
    expected, logprob = sample_tokens(logits, temperature=0.8, **random_state, **options)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in random_state.items()}
    with use_backend("triton"), record_launches() as launches:
        token, device_logprob = sample_tokens(logits.cuda(), temperature=0.8, **moved, **options)
    assert launches == [("sample_tokens_kernel", "triton")]
    assert torch.equal(token.cpu(), expected)
    torch.testing.assert_close(device_logprob.cpu(), logprob, rtol=1e-4, atol=1e-4)


def test_elementwise():
    x = torch.randn(1_000_003, device="cuda") * 3 + 100
    mask = torch.rand(x.shape, device="cuda") > 0.3
    with use_backend("triton"), record_launches() as launches:
        moments = masked_moments(x, mask)
        white = whiten(x, moments)
        kl = kl_divergence(x - 100, x * 0, "k3")
    assert [name for name, _ in launches] == ["masked_moments_kernel", "whiten_kernel", "kl_forward_kernel"]
    truth = masked_moments(x.double(), mask)
    torch.testing.assert_close(moments.m2, truth.m2, rtol=1e-10, atol=0)
    torch.testing.assert_close(white.double(), whiten(x.double(), truth), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kl.double(), kl_divergence((x - 100).double(), x.double() * 0, "k3"), rtol=1e-4, atol=1e-5
    )
