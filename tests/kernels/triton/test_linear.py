"""The linear operations in Triton under the interpreter, against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import Moments, VocabShard, linear_logprobs, linear_ppo_loss, record_launches, use_backend
from tests.helpers.kernel_cases import assert_within_budget, widen

OBJECTIVE = {"clip_low": 0.1, "dual_clip": 1.5, "kl_coef": 0.3, "kl_estimator": "k3", "entropy_coef": 0.1}


def problem(A=11, H=6, V=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(A, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (A,), generator=generator)
    old, ref, advantage = torch.randn(3, A, generator=generator)
    return hidden, weight, labels, old - 4, ref - 4, advantage


def loss_and_gradients(backend, hidden, weight, labels, old, ref, advantage, **options):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    with use_backend(backend), record_launches() as launches:
        out = linear_ppo_loss(hidden, weight, labels, old, advantage, ref_logprob_A=ref, **options)
        (out.loss * 1.7).backward()
    assert ("token_logprobs_backward" in dict(launches)) == (backend == "triton" and labels.numel() > 0)
    return out.loss, hidden.grad, weight.grad, out.stats


def logprobs_and_gradients(backend, hidden, weight, labels, upstream, **options):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    with use_backend(backend), record_launches() as launches:
        out = linear_logprobs(hidden, weight, labels, entropy=True, **options)
        torch.autograd.backward(
            [out.logprob_A, out.entropy_A], [upstream.to(out.logprob_A), upstream.to(out.logprob_A)]
        )
    kernels = {"token_logprobs_forward", "token_logprobs_backward"}
    assert {name for name, _ in launches} == (kernels if backend == "triton" else set())
    return out.logprob_A, out.entropy_A, hidden.grad, weight.grad


def check_loss(A=11, V=37, masked=True, chunk_rows=4, temperature=0.7, seed=0, **objective):
    streams = problem(A, 6, V, seed)
    moments = Moments(*(torch.tensor(x, dtype=torch.float64) for x in (4.0, 0.5, 8.0)))
    options = {"normalizer": 3.0, "moments": moments, "chunk_rows": chunk_rows, "temperature": temperature}
    options |= {"mask_A": torch.arange(A) % 3 != 1 if masked else None, **(objective or OBJECTIVE)}
    *fused_results, stats = loss_and_gradients("triton", *streams, **options)
    *plain_results, _ = loss_and_gradients("reference", *streams, **options)
    *truths, true_stats = loss_and_gradients("reference", *widen(streams), **options)
    for fused, plain, truth in zip(fused_results, plain_results, truths, strict=True):
        scale = max(1.0, float(truth.detach().abs().max())) if truth.numel() else 1.0
        assert_within_budget(fused, plain, truth, 2e-5 * scale)
    for name in ("count", "clipped_sum", "dual_clipped_sum"):
        assert getattr(stats, name) == getattr(true_stats, name), name


def check_logprobs(A=11, V=37, masked=True, chunk_rows=4):
    hidden, weight, labels, upstream, *_ = problem(A, 6, V)
    options = {"chunk_rows": chunk_rows, "temperature": 0.7, "mask_A": torch.arange(A) % 3 != 1 if masked else None}
    upstream = torch.where(torch.arange(A) % 4 == 0, 0.0, upstream)  # rows without a gradient
    fused_results = logprobs_and_gradients("triton", hidden, weight, labels, upstream, **options)
    plain_results = logprobs_and_gradients("reference", hidden, weight, labels, upstream, **options)
    truths = logprobs_and_gradients("reference", hidden.double(), weight.double(), labels, upstream, **options)
    for fused, plain, truth in zip(fused_results, plain_results, truths, strict=True):
        assert_within_budget(fused, plain, truth, 2e-5)


@pytest.mark.parametrize("V", [7, 37, 5000])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_its_gradient(V, masked):
    check_loss(V=V, masked=masked)


@pytest.mark.parametrize(
    "objective",
    [
        {"clip_low": 0.01, "clip_high": 0.01},
        {"clip_low": 0.6, "clip_high": 1.5, "surrogate": "mask"},
        {"kl_coef": 0.2, "kl_gradient": "raw"},
    ],
)
def test_rows_without_gradient_leave_and_the_rest_is_right(objective):
    check_loss(masked=False, **objective)


@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_and_their_gradient(masked):
    check_logprobs(masked=masked)


def check_ratio_is_one(masked=True):
    hidden, weight, labels, _, _, advantage = problem(23, 6, 300)
    labels[5] = -100
    options = {"mask_A": torch.arange(23) % 3 != 1 if masked else None, "chunk_rows": 8, "temperature": 0.9}
    with use_backend("triton"):
        old = linear_logprobs(hidden, weight, labels, **options).logprob_A
        stats = linear_ppo_loss(
            hidden.requires_grad_(), weight, labels, old, advantage, normalizer=1.0, entropy_coef=0.1, **options
        ).stats
    assert stats.ratio_min == 1 and stats.ratio_max == 1 and stats.kl_old_new_sum == 0


@pytest.mark.parametrize("masked", [False, True])
def test_ratio_is_exactly_one_after_scoring(masked):
    check_ratio_is_one(masked)


def test_padding_rows_of_the_weight_and_an_empty_stream():
    hidden, weight, labels, *_ = problem(V=40)
    labels = labels.clamp(max=32)
    shard = VocabShard(None, 0, 40, 33)
    padded = logprobs_and_gradients("triton", hidden, weight, labels, torch.ones(11), shard=shard)
    plain = logprobs_and_gradients("triton", hidden, weight[:33], labels, torch.ones(11))
    for a, b in zip(padded[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
    assert (padded[3][33:] == 0).all()
    check_loss(A=0, masked=False)


@given(
    A=st.sampled_from([0, 1, 5, 17]),
    V=st.sampled_from([1, 2, 31, 33, 4097]),
    masked=st.booleans(),
    chunk_rows=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=10)
def test_drawn_problems(A, V, masked, chunk_rows, seed):
    check_loss(A, V, masked, chunk_rows, 0.7, seed)
