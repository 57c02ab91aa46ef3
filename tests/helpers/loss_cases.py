"""What the tests of the Triton losses over token streams share: one run of a loss, and its comparison with fp64."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from icegrt.kernels import record_launches, use_backend
from icegrt.kernels.types import PPOLoss, ValueLoss
from tests.helpers.kernel_cases import assert_within_budget, widen


@dataclass(frozen=True)
class LossRun:
    """A loss and the gradients of its differentiable streams."""

    out: PPOLoss | ValueLoss
    grad: Tensor  # of the log-probs or values
    entropy_grad: Tensor | None


def loss_streams(size, seed=0):
    """Return log-prob, old log-prob, advantage, reference log-prob, entropy and weight, [size] fp32 each."""
    generator = torch.Generator().manual_seed(seed)
    logprob, noise, advantage, ref, entropy, weight = torch.randn(6, size, generator=generator)
    return logprob - 3, logprob - 3 + 0.4 * noise, advantage, logprob - 3 + 0.5 * ref, entropy.abs(), weight.abs()


def run_loss(op, backend, stream, old, target, entropy=None, **options):
    """Return the LossRun of op(stream, old, target) under an upstream gradient that is not 1.

    Args:
        op: ppo_policy_loss (stream: log-probs, target: advantages) or value_loss (stream: values, target: returns).
        entropy: The entropy stream of ppo_policy_loss, which gets a gradient too.
    """
    leaf = stream.detach().clone().requires_grad_()
    entropy_leaf = None if entropy is None else entropy.detach().clone().requires_grad_()
    if entropy_leaf is not None:
        options["entropy_A"] = entropy_leaf
    with use_backend(backend), record_launches() as launches:
        out = op(leaf, old, target, **options)
    if backend == "triton":
        fold = ("fold_statistics", "triton")
        # The value loss adds the moments of returns and errors.
        moments = [("masked_moments_kernel", "triton")] * (2 if op.__name__ == "value_loss" else 0)
        assert launches in ([(op.__name__, "triton"), fold, *moments], [fold, *moments])
    (out.loss * 1.7).backward()
    return LossRun(out, leaf.grad, None if entropy_leaf is None else entropy_leaf.grad)


def assert_loss_within_budget(op, *streams, atol=1e-5, **options):
    """Assert that loss, gradients and statistics of Triton are within the budget of the reference's."""
    fused, plain = (run_loss(op, backend, *streams, **options) for backend in ("triton", "reference"))
    wide_options = {name: widen(option) for name, option in options.items()}
    truth = run_loss(op, "reference", *widen(streams), **wide_options)

    assert fused.out.loss.dtype == torch.float32
    assert all(stat.dtype == torch.float64 for stat in vars(fused.out.stats).values())
    scale = max(1.0, float(truth.out.stats.weight_sum.abs()))
    loss_scale = max(scale, float(truth.out.loss.detach().abs()))
    assert_within_budget(fused.out.loss, plain.out.loss, truth.out.loss, atol * loss_scale)
    for name in ("grad", "entropy_grad"):
        grads = [getattr(run, name) for run in (fused, plain, truth)]
        assert (grads[0] is None) == (grads[2] is None)
        if grads[0] is not None and grads[2].numel():
            assert_within_budget(*grads, atol * max(1.0, float(grads[2].abs().max())))
    _assert_stats_within_budget(fused.out.stats, plain.out.stats, truth.out.stats, scale)


def _assert_stats_within_budget(fused_stats, plain_stats, true_stats, scale):
    for field in fields(fused_stats):
        fused, plain, truth = (float(getattr(stats, field.name)) for stats in (fused_stats, plain_stats, true_stats))
        if math.isfinite(truth):
            exact = field.name.endswith("count") or "clipped" in field.name
            slack = 0.0 if exact else 1e-5 * max(1.0, abs(truth))
            assert abs(fused - truth) <= 2 * abs(plain - truth) + slack * scale, field.name
        else:
            assert fused == truth, field.name


def assert_masked_entries_do_not_matter(run):
    """Assert that NaN wherever the mask is 0 changes nothing; the last program is mostly beyond the end.

    Args:
        run: returns the LossRun of the tuple of `loss_streams`, under a mask.
    """
    size = 1030
    mask = torch.arange(size) % 3 != 0
    streams = loss_streams(size)
    clean, dirty = run(streams, mask), run(tuple(torch.where(mask, stream, torch.nan) for stream in streams), mask)
    assert torch.equal(clean.out.loss, dirty.out.loss) and clean.out.stats == dirty.out.stats
    assert torch.equal(clean.grad, dirty.grad) and torch.isfinite(clean.out.loss)
    assert (clean.grad[~mask] == 0).all() and clean.out.stats.count == mask.sum()
