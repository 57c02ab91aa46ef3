"""Ahead-of-time compiles of ppo_policy_loss, with a gate on spills."""

from itertools import product

import pytest

from icegrt.kernels.ppo_policy_loss import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills

ESTIMATORS = ("k1", "k2", "k3", "abs")
FLAGS = (True, False)


def check_policy(capability, estimator, raw, masked, pointers, aligned):
    """Compile one configuration.

    Args:
        pointers: Whether numbers lie on the device and log-probs are bf16; else numbers come by value, streams in fp32.
    """
    types = {"mask_ptr": "*u8", "count_ptr": "*fp64", "mean_ptr": "*fp64", "m2_ptr": "*fp64"}
    types |= dict.fromkeys(("clip_low", "clip_high", "dual_clip"), "fp32")
    types |= dict.fromkeys(("normalizer", "kl_coef", "entropy_coef"), "*fp32" if pointers else "fp32")
    types |= {"logprob_ptr": "*bf16"} if pointers else {}
    constants = dict.fromkeys(("NORMALIZER_POINTER", "KL_POINTER", "ENTROPY_POINTER"), pointers)
    constants |= {
        "ESTIMATOR": estimator,
        "RAW": raw,
        "MASKED": masked,
        "LIMIT": 60.0,
        "WIDTH": 32,
        "BLOCK": module.BLOCK,
    }
    assert_nothing_spills(module.ppo_policy_loss_kernel, capability, constants, module.OPTIONS, aligned, **types)


@EVERY_GENERATION
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("raw", FLAGS)
def test_ppo_policy_loss(capability, estimator, raw):
    check_policy(capability, estimator, raw, masked=raw == (estimator in ("k1", "k3")), pointers=raw, aligned=not raw)


@pytest.mark.long
@EVERY_GENERATION
def test_every_configuration_of_ppo_policy_loss(capability):
    for estimator, raw, masked, pointers, aligned in product(ESTIMATORS, FLAGS, FLAGS, FLAGS, FLAGS):
        check_policy(capability, estimator, raw, masked, pointers, aligned)
