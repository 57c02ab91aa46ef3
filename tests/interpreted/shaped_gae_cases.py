"""shaped_gae in Triton under the interpreter (run by test_shaped_gae_triton.py)."""

import pytest
import torch
from kernel_cases import assert_within_budget, naive_gae, worst

from icegrt.kernels import record_launches, shaped_gae, use_backend


def batch(lengths, slack=0, seed=0):
    torch.manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    size = int(cu[-1]) + slack
    score = torch.where(cu.diff() > 0, torch.randn(len(lengths)), 0.0)
    return score, torch.randn(size), torch.randn(size), torch.randn(size), cu


def triton_gae(*streams, **options):
    with use_backend("triton"), record_launches() as launches:
        out = shaped_gae(*streams, **options)
    assert launches == [("shaped_gae_kernel", "triton")]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 700, 256, 257], [512], [1]])
def test_error_budget_over_several_blocks(lengths, masked):
    streams = batch(lengths, slack=5)
    size, cu = streams[1].shape[0], streams[4]
    mask = torch.rand(size) > 0.3 if masked else None
    if masked:
        mask[cu[:-1][cu.diff() > 0].long()] = True
    extra, bootstrap = torch.randn(size), torch.randn(len(lengths))
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.9}
    wide = [x.double() if x.is_floating_point() else x for x in streams]
    truth = naive_gae(*wide, **options, bootstrap=bootstrap, mask=mask, token_reward=extra)
    options |= {"bootstrap_N": bootstrap, "mask_A": mask, "token_reward_A": extra}
    ours, plain = triton_gae(*streams, **options), shaped_gae(*streams, **options)
    for name, exact in zip(("advantage_A", "return_A", "reward_A", "kl_N"), truth, strict=True):
        assert_within_budget(getattr(ours, name), getattr(plain, name), exact, 1e-5)
    assert ours.moments.count == plain.moments.count
    assert worst(ours.moments.mean, plain.moments.mean) < 1e-6
    torch.testing.assert_close(ours.moments.m2, plain.moments.m2, rtol=1e-5, atol=1e-5)
    assert (ours.advantage_A[int(cu[-1]) :] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimators_extreme_and_tiny_differences(estimator):
    score, value, _, _, cu = batch([8])
    value, score = torch.zeros(8), torch.zeros(1)
    d = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51, 3.0])
    options = {"kl_coef": 1.0, "kl_estimator": estimator, "lam": 0.0, "gamma": 0.0}
    ours = triton_gae(score, value, d, torch.zeros(8), cu, **options)
    plain = shaped_gae(score, value, d, torch.zeros(8), cu, **options)
    truth = shaped_gae(score, value, d.double(), torch.zeros(8), cu, **options)
    assert torch.isfinite(ours.reward_A).all()
    torch.testing.assert_close(ours.reward_A.double(), truth.reward_A, rtol=3e-5, atol=0)
    torch.testing.assert_close(plain.reward_A.double(), truth.reward_A, rtol=3e-5, atol=1e-9)


def test_nan_in_masked_positions_does_not_leak():
    streams = batch([6, 6])
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    clean = triton_gae(*streams, kl_coef=0.1, mask_A=mask)
    for x in streams[1:4]:
        x[~mask] = torch.nan
    dirty = triton_gae(*streams, kl_coef=0.1, mask_A=mask)
    for name in ("advantage_A", "return_A", "reward_A", "kl_N"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name))


def test_device_coefficient_bits_alone_and_in_a_batch_and_empty():
    streams = batch([40, 300, 7])
    whole = triton_gae(*streams, kl_coef=torch.tensor(0.1))
    again = triton_gae(*streams, kl_coef=torch.tensor(0.1))
    assert torch.equal(whole.advantage_A, again.advantage_A)
    part = slice(40, 340)
    alone = triton_gae(
        streams[0][1:2], *[x[part] for x in streams[1:4]], torch.tensor([0, 300]), kl_coef=torch.tensor(0.1)
    )
    assert torch.equal(whole.advantage_A[part], alone.advantage_A)
    with use_backend("triton"):
        none = torch.zeros(0)
        empty = shaped_gae(none, none, none, none, torch.zeros(1, dtype=torch.int32), kl_coef=0.1)
    assert empty.moments.count == 0 and empty.kl_N.shape == (0,)
