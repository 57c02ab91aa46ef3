"""ppo_policy_loss: the formulas of the recipe, token by token, and what overflow and masks must not do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icegrt.kernels import Moments, PolicyStats, linear_ppo_loss, ppo_policy_loss


def loss_by_hand(logprob, old, advantage, low, high, dual):
    ratio = math.exp(logprob - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -advantage * dual) if dual and advantage < 0 else loss


@pytest.mark.parametrize("dual", [None, 2.0])
def test_surrogate_is_the_recipes(dual):
    logprob, old, advantage = torch.randn(3, 50, dtype=torch.float64)
    out = ppo_policy_loss(logprob, old, advantage, normalizer=50, clip_low=0.1, clip_high=0.3, dual_clip=dual)
    expected = [
        loss_by_hand(*x, 0.1, 0.3, dual) for x in zip(*(v.tolist() for v in (logprob, old, advantage)), strict=True)
    ]
    assert out.loss.item() == pytest.approx(sum(expected) / 50, rel=1e-12)
    ratio = (logprob - old).exp()
    low, high = (ratio < 0.9) & (advantage < 0), (ratio > 1.3) & (advantage > 0)
    assert out.stats.clipped_low == low.sum() and out.stats.clipped_high == high.sum()
    assert out.stats.clipped_sum == (low | high).sum()


def test_clipped_tokens_have_no_gradient_and_the_rest_minus_a_rho():
    old = torch.zeros(4)
    logprob = torch.tensor([0.5, -0.5, 0.5, 0.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 2.0])
    ppo_policy_loss(logprob, old, advantage, normalizer=1.0).loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, 0.0, math.exp(0.5), -2.0]))


@given(
    tokens=st.lists(
        st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-3, 3), st.floats(0, 2), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    low=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
    high=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_the_masked_surrogate_is_minus_a_r_inside_its_region_and_nothing_outside(tokens, low, high):
    """Loss, gradient r * A * grad log p, and statistics against a loop; r = p / p_rollout."""
    loss, gradient, masked = 0.0, [], 0
    for logprob, rollout, advantage, weight, counts in tokens:
        r = math.exp(logprob - rollout)
        inside = 1 - low <= r <= 1 + high
        loss += -weight * r * advantage if counts and inside else 0.0
        gradient.append(-weight * r * advantage if counts and inside else 0.0)
        masked += counts and not inside
    *streams, counted = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    leaf = streams[0].requires_grad_()
    options = {"mask_A": counted, "weight_A": streams[3], "clip_low": low, "clip_high": high, "surrogate": "mask"}
    out = ppo_policy_loss(leaf, *streams[1:3], normalizer=5.0, **options)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss / 5, abs=1e-12)
    assert leaf.grad.tolist() == pytest.approx([g / 5 for g in gradient], abs=1e-12)
    assert out.stats.clipped_sum == masked and out.stats.count == counted.sum()


@given(
    tokens=st.lists(
        st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-3, 3), st.floats(0, 2), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    low=st.sampled_from([0.1, 0.2]),
    high=st.sampled_from([0.2, 3.0]),
    dual=st.sampled_from([None, 1.5]),
)
def test_the_clipped_surrogate_is_that_of_a_loop(tokens, low, high, dual):
    """Loss, gradient and statistics: max(-A r, -A clip(r)), at most -dual A where the advantage A is negative."""
    loss, gradient, clipped, dual_clipped, ratios = 0.0, [], 0, 0, []
    for logprob, old, advantage, weight, counts in tokens:
        r = math.exp(logprob - old)
        free, bounded = -advantage * r, -advantage * min(max(r, 1 - low), 1 + high)
        ceiling = -dual * advantage if dual is not None and advantage < 0 else math.inf
        loss += weight * min(max(free, bounded), ceiling) if counts else 0.0
        gradient.append(weight * free if counts and bounded <= free <= ceiling else 0.0)
        clipped += counts and bounded > free
        dual_clipped += counts and free > ceiling
        ratios += [r] if counts else []
    *streams, counted = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    leaf = streams[0].requires_grad_()
    options = {"mask_A": counted, "weight_A": streams[3], "clip_low": low, "clip_high": high, "dual_clip": dual}
    out = ppo_policy_loss(leaf, *streams[1:3], normalizer=5.0, **options)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss / 5, abs=1e-12)
    assert leaf.grad.tolist() == pytest.approx([g / 5 for g in gradient], abs=1e-12)
    assert out.stats.count == len(ratios) and float(out.stats.ratio_sum) == pytest.approx(sum(ratios), rel=1e-12)
    assert (out.stats.clipped_sum, out.stats.dual_clipped_sum) == (clipped, dual_clipped)


def test_a_dual_clip_of_the_masked_surrogate_is_refused():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="dual_clip must be None with surrogate 'mask'"):
        ppo_policy_loss(zeros, zeros, zeros, normalizer=1.0, surrogate="mask", dual_clip=2.0)
    with pytest.raises(ValueError, match="surrogate"):
        ppo_policy_loss(zeros, zeros, zeros, normalizer=1.0, surrogate="zero")


@pytest.mark.parametrize(("estimator", "d"), [(e, d) for e in ("k1", "k2", "k3", "abs") for d in (-100.0, 0.0, 100.0)])
def test_kl_and_ratio_extremes_stay_finite(estimator, d):
    for gradient in ("k2", "raw"):
        logprob = torch.tensor([d, 0.0], requires_grad=True)
        out = ppo_policy_loss(
            logprob,
            torch.zeros(2),
            torch.tensor([1.0, -1.0]),
            ref_logprob_A=torch.zeros(2),
            normalizer=1.0,
            kl_coef=0.1,
            kl_estimator=estimator,
            kl_gradient=gradient,
        )
        out.loss.backward()
        assert torch.isfinite(out.loss) and torch.isfinite(logprob.grad).all()


@pytest.mark.parametrize("estimator", ["k1", "k3", "abs"])
def test_kl_has_the_value_of_its_estimator_and_the_gradient_of_k2(estimator):
    ref = torch.randn(6, dtype=torch.float64)
    results = []
    for gradient in ("k2", "raw"):
        logprob = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        out = ppo_policy_loss(
            logprob,
            None,
            torch.zeros(6),
            ref_logprob_A=ref,
            normalizer=1.0,
            kl_coef=1.0,
            kl_estimator=estimator,
            kl_gradient=gradient,
        )
        out.loss.backward()
        results.append((out.loss.item(), logprob.grad))
    (loss, grad), (raw_loss, raw_grad) = results
    assert loss == raw_loss
    torch.testing.assert_close(grad, -ref)
    d = -ref
    expected = {"k1": torch.ones_like(d), "k3": 1 - (-d).exp(), "abs": d.sign()}[estimator]
    torch.testing.assert_close(raw_grad, expected)


def test_moments_whiten_the_advantage_on_the_fly():
    advantage = torch.randn(10) * 3 + 2
    moments = Moments(*(torch.tensor(x, dtype=torch.float64) for x in (10.0, advantage.mean().item(), 40.0)))
    for shift in (True, False):
        white = (advantage - advantage.mean()) / math.sqrt(4.0) + (0 if shift else advantage.mean())
        fused = ppo_policy_loss(torch.zeros(10), None, advantage, normalizer=10, moments=moments, shift_mean=shift)
        plain = ppo_policy_loss(torch.zeros(10), None, white, normalizer=10)
        torch.testing.assert_close(fused.loss, plain.loss)
        assert fused.loss.dtype == torch.float32


def test_masked_entries_have_no_effect_whatever_they_hold():
    streams = [torch.randn(6) for _ in range(5)]
    mask = torch.tensor([1, 1, 0, 1, 0, 1])

    def run(logprob, old, advantage, ref, entropy):
        leaf = logprob.detach().requires_grad_()
        out = ppo_policy_loss(
            leaf,
            old,
            advantage,
            ref_logprob_A=ref,
            entropy_A=entropy,
            mask_A=mask,
            normalizer=4.0,
            kl_coef=0.1,
            entropy_coef=0.1,
            weight_A=torch.where(mask != 0, 1.0, torch.nan),
        )
        out.loss.backward()
        return out, leaf.grad

    clean, clean_grad = run(*streams)
    dirty, dirty_grad = run(*(torch.where(mask != 0, x, torch.nan) for x in streams))
    assert clean.loss == dirty.loss and clean.stats == dirty.stats
    assert torch.equal(clean_grad, dirty_grad) and (clean_grad[mask == 0] == 0).all()
    assert clean.stats.count == 4


def test_empty_stream_has_neutral_statistics():
    empty = torch.zeros(0, requires_grad=True)
    out = ppo_policy_loss(empty, None, torch.zeros(0), normalizer=torch.tensor(7.0))
    out.loss.backward()
    assert out.loss == 0 and out.stats.count == 0 and out.stats.ratio_min == math.inf
    stats = ppo_policy_loss(torch.zeros(3), None, torch.ones(3), normalizer=1.0).stats
    assert stats.merge(out.stats) == stats
    assert isinstance(stats, PolicyStats) and all(getattr(stats, f).dim() == 0 for f in stats.__dataclass_fields__)


ELSEWHERE = torch.ones((), device="meta")


@pytest.mark.parametrize("op", [ppo_policy_loss, linear_ppo_loss], ids=["ppo_policy_loss", "linear_ppo_loss"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("normalizer", {"normalizer": ELSEWHERE}),
        ("kl_coef", {"kl_coef": ELSEWHERE, "ref_logprob_A": torch.zeros(3)}),
        ("entropy_coef", {"entropy_coef": ELSEWHERE}),
        ("moments", {"moments": Moments(ELSEWHERE, ELSEWHERE, ELSEWHERE)}),
    ],
)
def test_numbers_on_another_device_are_refused_by_name(op, name, change):
    """A kernel would read them through a pointer of another device."""
    zeros, options = torch.zeros(3), {"normalizer": 1.0} | change
    streams = (zeros,) if op is ppo_policy_loss else (torch.zeros(3, 2), torch.zeros(4, 2), torch.arange(3))
    options |= {"entropy_A": zeros} if op is ppo_policy_loss else {}
    with pytest.raises(ValueError, match=rf"{op.__name__}: {name} must be .*on cpu .* got meta"):
        op(*streams, None, zeros, **options)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("advantage_A must have shape", {"advantage_A": torch.zeros(4)}),
        ("normalizer must be finite and > 0", {"normalizer": 0.0}),
        ("ref_logprob_A must be given", {"kl_coef": 0.1}),
        ("entropy_A must be given", {"entropy_coef": 0.1}),
        ("kl_estimator must be one of", {"kl_estimator": "k4"}),
        ("dual_clip must be finite and > 1", {"dual_clip": 1.0}),
        ("clip_low must be finite", {"clip_low": -0.1}),
    ],
)
def test_errors_name_the_argument(match, change):
    arguments = {"logprob_A": torch.zeros(3), "old_logprob_A": None, "advantage_A": torch.zeros(3), "normalizer": 1.0}
    with pytest.raises(ValueError, match=match):
        ppo_policy_loss(**(arguments | change))
