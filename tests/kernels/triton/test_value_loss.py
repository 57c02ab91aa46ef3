"""value_loss in Triton under the interpreter: against the reference.

The reference in fp64 is the truth, the reference in fp32 the budget; statistics must agree field by field.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import use_backend, value_loss
from tests.helpers.loss_cases import (
    assert_loss_within_budget,
    assert_masked_entries_do_not_matter,
    loss_streams,
    run_loss,
)


def check_value(size=1500, clip=0.2):
    value, old, returns, _, _, weight = loss_streams(size, seed=1)
    mask = (torch.arange(size) % 4 != 1).int()
    options = {"clip": clip, "normalizer": 11.0, "mask_A": mask, "weight_A": weight}
    assert_loss_within_budget(value_loss, value, old, returns, **options)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value(clip):
    check_value(1500, clip)


def check_masked_entries_do_not_matter():
    def run(streams, mask):
        value, old, returns, _, _, weight = streams
        return run_loss(value_loss, "triton", value, old, returns, mask_A=mask, normalizer=9.0, weight_A=weight)

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
)
@settings(max_examples=12)
def test_drawn_streams(size, seed, dtype, scale, masked, strided):
    streams = ((scale * stream).to(dtype).float() for stream in loss_streams(size, seed))
    value, old, _, returns, _, weight = streams
    if strided:
        returns = torch.stack([returns, returns], 1)[:, 0]
        weight = torch.ones(()).expand(size)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    options = {"mask_A": mask, "weight_A": weight, "normalizer": max(1.0, float(size))}
    assert_loss_within_budget(value_loss, value, old, returns, **options)


def test_the_same_bits_twice_and_double_backward_is_refused():
    value, old, returns, *_ = loss_streams(3000)
    first, second = (run_loss(value_loss, "triton", value, old, returns, normalizer=3.0) for _ in range(2))
    assert torch.equal(first.out.loss, second.out.loss) and torch.equal(first.grad, second.grad)
    assert first.out.stats == second.out.stats
    leaf = value.requires_grad_()
    with use_backend("triton"), pytest.raises(RuntimeError, match="value_loss: double backward"):
        torch.autograd.grad(value_loss(leaf, old, returns, normalizer=1.0).loss, leaf, create_graph=True)
