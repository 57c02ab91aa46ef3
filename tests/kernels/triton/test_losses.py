"""ppo_policy_loss and value_loss in Triton under the interpreter: against the reference.

The reference in fp64 is the truth, the reference in fp32 the budget; statistics must agree field by field.
"""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import Moments, ppo_policy_loss, record_launches, use_backend, value_loss
from tests.helpers.kernel_cases import assert_within_budget

ESTIMATORS = ("k1", "k2", "k3", "abs")


def run(op, backend, leaves, *rest, **options):
    """(result, gradients of the leaves) with an upstream factor that is not 1."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    with use_backend(backend), record_launches() as launches:
        out = op(leaves, *rest, **options)
    if backend == "triton":
        kernel = "value_loss" if op is value else "ppo_policy_loss"
        assert launches in ([(kernel, "triton"), ("fold_statistics", "triton")], [("fold_statistics", "triton")])
    (out.loss * 1.7).backward()
    return out, [None if x is None else x.grad for x in leaves]


def policy(leaves, old, advantage, **options):
    return ppo_policy_loss(leaves[0], old, advantage, entropy_A=leaves[1], **options)


def value(leaves, old, returns, **options):
    return value_loss(leaves[0], old, returns, **options)


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return x


def compare(op, leaves, *rest, atol=1e-5, **options):
    """Loss, gradients and statistics of Triton within the budget of the reference's."""
    ours, plain = (run(op, b, leaves, *rest, **options) for b in ("triton", "reference"))
    wide = {k: double(v) for k, v in options.items()}
    truth = run(op, "reference", [double(x) for x in leaves], *(double(x) for x in rest), **wide)
    scale = max(1.0, float(truth[0].stats.weight_sum.abs()))
    assert ours[0].loss.dtype == torch.float32 and all(v.dtype == torch.float64 for v in vars(ours[0].stats).values())
    assert_within_budget(ours[0].loss, plain[0].loss, truth[0].loss, atol * scale)
    for mine, theirs, right in zip(ours[1], plain[1], truth[1], strict=True):
        assert (mine is None) == (right is None)
        if mine is not None and right.numel():
            assert_within_budget(mine, theirs, right, atol * max(1.0, float(right.abs().max())))
    for f in fields(ours[0].stats):
        mine, theirs, right = (getattr(x[0].stats, f.name) for x in (ours, plain, truth))
        slack = 0.0 if f.name.endswith("count") or "clipped" in f.name else 1e-5 * max(1.0, abs(float(right)))
        if math.isfinite(float(right)):
            assert abs(float(mine) - float(right)) <= 2 * abs(float(theirs) - float(right)) + slack * scale, f.name
        else:
            assert float(mine) == float(right), f.name


def streams(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprob, noise, advantage, ref, entropy, weight = torch.randn(6, size, generator=generator)
    return logprob - 3, logprob - 3 + 0.4 * noise, advantage, logprob - 3 + 0.5 * ref, entropy.abs(), weight.abs()


def check_policy(size=1500, estimator="k3", gradient="k2", dual=None):
    """Everything at once, over more than one program and a tail."""
    logprob, old, advantage, ref, entropy, weight = streams(size)
    compare(
        policy,
        [logprob, entropy],
        old,
        advantage,
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
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", ["k2", "raw"])
def test_policy_with_every_term(estimator, gradient):
    check_policy(300, estimator, gradient, dual=2.0)


def test_policy_over_several_programs():
    check_policy(2500, dual=1.5)


def test_policy_on_policy_with_tensors_for_numbers_and_no_mean_shift():
    logprob, _, advantage, ref, entropy, _ = streams(50)
    compare(
        policy,
        [logprob, entropy],
        None,
        advantage,
        ref_logprob_A=ref,
        normalizer=torch.tensor(7.0),
        kl_coef=torch.tensor(0.2),
        entropy_coef=torch.tensor(0.05),
        moments=Moments(*(torch.tensor(x, dtype=torch.float64) for x in (10.0, 0.5, 40.0))),
        shift_mean=False,
    )


def check_policy_extremes():
    """A ratio, a k3 and a clamp at exponents of -100, 0 and 100: finite, with the reference's gradient."""
    for estimator in ESTIMATORS:
        for gradient in ("k2", "raw"):
            logprob = torch.tensor([-100.0, 0.0, 100.0, -100.0, 0.0, 100.0])
            advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
            options = {"normalizer": 1.0, "kl_coef": 0.1, "kl_estimator": estimator, "kl_gradient": gradient}
            zeros = torch.zeros(6)
            ours, theirs = (
                run(policy, b, [logprob, None], zeros, advantage, ref_logprob_A=zeros, **options)
                for b in ("triton", "reference")
            )
            assert torch.isfinite(ours[0].loss) and torch.isfinite(ours[1][0]).all()
            torch.testing.assert_close(ours[1][0], theirs[1][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=1e-5, atol=1e-6)


def check_masked_entries_do_not_matter(op="policy"):
    """NaN wherever the mask is 0, and a last program that is mostly beyond the end."""
    size = 1030
    mask = torch.arange(size) % 3 != 0
    clean = list(streams(size))
    dirty = [torch.where(mask, x, torch.nan) for x in clean]
    found = []
    for logprob, old, advantage, ref, _, weight in (clean, dirty):
        if op == "policy":
            options = {"ref_logprob_A": ref, "kl_coef": 0.1, "weight_A": weight}
            found.append(run(policy, "triton", [logprob, None], old, advantage, mask_A=mask, normalizer=9.0, **options))
        else:
            found.append(run(value, "triton", [logprob], old, advantage, mask_A=mask, normalizer=9.0, weight_A=weight))
    (a, (ga, *_)), (b, (gb, *_)) = found
    assert torch.equal(a.loss, b.loss) and a.stats == b.stats and torch.equal(ga, gb) and torch.isfinite(a.loss)
    assert (ga[~mask] == 0).all() and a.stats.count == mask.sum()


def check_value(size=1500, clip=0.2):
    value_A, old, returns, _, _, weight = streams(size, seed=1)
    mask = (torch.arange(size) % 4 != 1).int()
    compare(value, [value_A], old, returns, clip=clip, normalizer=11.0, mask_A=mask, weight_A=weight)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value(clip):
    check_value(1500, clip)


@pytest.mark.parametrize("op", ["policy", "value"])
def test_masked_entries_do_not_matter(op):
    check_masked_entries_do_not_matter(op)


def test_policy_extremes():
    check_policy_extremes()


@given(
    size=st.sampled_from([0, 1, 2, 7, 1023, 1024, 1025, 2500]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.booleans(),
    strided=st.booleans(),
)
@settings(max_examples=12)
def test_drawn_streams(size, seed, dtype, scale, masked, strided):
    logprob, old, advantage, ref, entropy, weight = ((scale * x).to(dtype).float() for x in streams(size, seed))
    if strided:
        advantage = torch.stack([advantage, advantage], 1)[:, 0]
        weight = torch.ones(()).expand(size)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    shared = {"mask_A": mask, "weight_A": weight, "normalizer": max(1.0, float(size))}
    compare(policy, [logprob, entropy], old, advantage, ref_logprob_A=ref, kl_coef=0.1, entropy_coef=0.1, **shared)
    compare(value, [logprob], old, ref, **shared)


def test_the_same_bits_twice_and_double_backward_is_refused():
    logprob, old, advantage, *_ = streams(3000)
    a, b = (run(policy, "triton", [logprob, None], old, advantage, normalizer=3.0) for _ in range(2))
    assert torch.equal(a[0].loss, b[0].loss) and torch.equal(a[1][0], b[1][0]) and a[0].stats == b[0].stats
    leaf = logprob.requires_grad_()
    for op in ("ppo_policy_loss", "value_loss"):
        call = {"ppo_policy_loss": ppo_policy_loss, "value_loss": value_loss}[op]
        with use_backend("triton"), pytest.raises(RuntimeError, match=f"{op}: double backward"):
            torch.autograd.grad(call(leaf, old, advantage, normalizer=1.0).loss, leaf, create_graph=True)
