"""ppo_policy_loss in Triton under the interpreter: against the reference.

The reference in fp64 is the truth, the reference in fp32 the budget; statistics must agree field by field.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import Moments, ppo_policy_loss, use_backend
from tests.helpers.loss_cases import (
    assert_loss_within_budget,
    assert_masked_entries_do_not_matter,
    loss_streams,
    run_loss,
)

ESTIMATORS = ("k1", "k2", "k3", "abs")


def check_policy(size=1500, estimator="k3", gradient="k2", dual=None, surrogate="clip"):
    """Everything at once, over more than one program and a tail."""
    logprob, old, advantage, ref, entropy, weight = loss_streams(size)
    assert_loss_within_budget(
        ppo_policy_loss,
        logprob,
        old,
        advantage,
        entropy,
        ref_logprob_A=ref,
        weight_A=weight,
        mask_A=torch.arange(size) % 5 != 1,
        normalizer=37.0,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=dual,
        kl_coef=0.3,
        kl_estimator=estimator,
        kl_gradient=gradient,
        entropy_coef=0.1,
        moments=Moments(*(torch.tensor(x, dtype=torch.float64) for x in (10.0, 0.5, 40.0))),
        surrogate=surrogate,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", ["k2", "raw"])
def test_policy_with_every_term(estimator, gradient):
    check_policy(300, estimator, gradient, dual=2.0)


def test_policy_over_several_programs():
    check_policy(2500, dual=1.5)
    check_policy(2500, surrogate="mask")


def test_policy_on_policy_with_tensors_for_numbers_and_no_mean_shift():
    logprob, _, advantage, ref, entropy, _ = loss_streams(50)
    assert_loss_within_budget(
        ppo_policy_loss,
        logprob,
        None,
        advantage,
        entropy,
        ref_logprob_A=ref,
        normalizer=torch.tensor(7.0),
        kl_coef=torch.tensor(0.2),
        entropy_coef=torch.tensor(0.05),
        moments=Moments(*(torch.tensor(x, dtype=torch.float64) for x in (10.0, 0.5, 40.0))),
        shift_mean=False,
    )


def check_policy_extremes():
    """A ratio, a k3 and a clamp at exponents of -100, 0 and 100: finite, with the reference's gradient."""
    logprob = torch.tensor([-100.0, 0.0, 100.0, -100.0, 0.0, 100.0])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    zeros = torch.zeros(6)
    for estimator in ESTIMATORS:
        for gradient in ("k2", "raw"):
            for surrogate in ("clip", "mask"):
                options = {"normalizer": 1.0, "kl_coef": 0.1, "kl_estimator": estimator, "kl_gradient": gradient}
                options |= {"ref_logprob_A": zeros, "surrogate": surrogate}
                fused, plain = (
                    run_loss(ppo_policy_loss, backend, logprob, zeros, advantage, **options)
                    for backend in ("triton", "reference")
                )
                assert torch.isfinite(fused.out.loss) and torch.isfinite(fused.grad).all()
                torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(fused.out.loss, plain.out.loss, rtol=1e-5, atol=1e-6)


def test_policy_extremes():
    check_policy_extremes()


def check_masked_entries_do_not_matter():
    def run(streams, mask):
        logprob, old, advantage, ref, _, weight = streams
        options = {"normalizer": 9.0, "kl_coef": 0.1, "mask_A": mask, "weight_A": weight, "ref_logprob_A": ref}
        return run_loss(ppo_policy_loss, "triton", logprob, old, advantage, **options)

    assert_masked_entries_do_not_matter(run)


def test_masked_entries_do_not_matter():
    check_masked_entries_do_not_matter()


@given(
    size=st.sampled_from([0, 1, 2, 7, 1023, 1024, 1025, 2500]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.booleans(),
    strided=st.booleans(),
    surrogate=st.sampled_from(["clip", "mask"]),
)
@settings(max_examples=12)
def test_drawn_streams(size, seed, dtype, scale, masked, strided, surrogate):
    streams = ((scale * stream).to(dtype).float() for stream in loss_streams(size, seed))
    logprob, old, advantage, ref, entropy, weight = streams
    if strided:
        advantage = torch.stack([advantage, advantage], 1)[:, 0]
        weight = torch.ones(()).expand(size)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    options = {"mask_A": mask, "weight_A": weight, "normalizer": max(1.0, float(size))}
    options |= {"ref_logprob_A": ref, "kl_coef": 0.1, "entropy_coef": 0.1, "surrogate": surrogate}
    assert_loss_within_budget(ppo_policy_loss, logprob, old, advantage, entropy, **options)


def test_the_same_bits_twice_and_double_backward_is_refused():
    logprob, old, advantage, *_ = loss_streams(3000)
    first, second = (run_loss(ppo_policy_loss, "triton", logprob, old, advantage, normalizer=3.0) for _ in range(2))
    assert torch.equal(first.out.loss, second.out.loss) and torch.equal(first.grad, second.grad)
    assert first.out.stats == second.out.stats
    leaf = logprob.requires_grad_()
    with use_backend("triton"), pytest.raises(RuntimeError, match="ppo_policy_loss: double backward"):
        torch.autograd.grad(ppo_policy_loss(leaf, old, advantage, normalizer=1.0).loss, leaf, create_graph=True)
