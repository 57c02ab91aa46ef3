"""Ahead-of-time compiles with a gate on spills."""

import importlib
from itertools import product

import pytest

from tests.helpers.aot import assert_nothing_spills

GENERATIONS = pytest.mark.parametrize("capability", [80, 90, 100])
FLAGS = (True, False)


def check_token_logprobs(direction, capability, logits, out, scaled, entropy, compact, rows):
    """One configuration. rows: whole rows of aligned tensors, whose stride of 1 is compiled in; else any view."""
    module = importlib.import_module("icegrt.kernels.token_logprobs.triton")
    kernel = getattr(module, f"token_logprobs_{direction}")
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {
        "logits_ptr": f"*{logits}",
        "grad_ptr": f"*{out}",
        "labels_ptr": "*i64",
        "active_ptr": "*i64",
        "row_stride": "i64",
        "column_stride": "i32",
        "grad_row_stride": "i64",
        "grad_column_stride": "i32",
        "columns": "i32",
        "start": "i32",
        "valid": "i32",
        "temperature": "fp32",
    }
    constants = {"IGNORED": -100, "SCALED": scaled, "ENTROPY": entropy, "BLOCK": module.FORWARD_BLOCK}
    constants |= {"COMPACT": compact} if direction == "backward" else {}
    if rows:
        strides = ("column_stride", "grad_column_stride")
        constants |= {name: 1 for name in strides if name in kernel.arg_names}
    assert_nothing_spills(kernel, signature, constants, capability, module.OPTIONS, aligned=rows)


@GENERATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("logits", "out"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")])
def test_token_logprobs(capability, direction, logits, out):
    """With every optional part, on whole rows and on views, and without any; the widest block, which could spill."""
    check_token_logprobs(direction, capability, logits, out, True, True, True, rows=True)
    check_token_logprobs(direction, capability, logits, out, True, True, True, rows=False)
    if logits == out == "fp32":
        check_token_logprobs(direction, capability, logits, out, False, False, False, rows=True)


@pytest.mark.long
@GENERATIONS
def test_every_configuration_of_token_logprobs(capability):
    for logits, scaled, entropy, rows in product(("bf16", "fp16", "fp32"), FLAGS, FLAGS, FLAGS):
        check_token_logprobs("forward", capability, logits, logits, scaled, entropy, False, rows)
        check_token_logprobs("backward", capability, logits, logits, scaled, entropy, False, rows)
    for out, entropy, compact in product(("bf16", "fp16", "fp32"), FLAGS, FLAGS):  # what the linear operations launch
        check_token_logprobs("backward", capability, "fp32", out, False, entropy, compact, True)


NUMBERS = {"clip_low": "fp32", "clip_high": "fp32", "dual_clip": "fp32", "clip": "fp32"}
SIZES = {name: "i32" for name in ("size", "old_size", "entropy_size", "ref_size", "mask_size", "weight_size")}


def check_policy(capability, estimator, raw, pointers, aligned):
    """pointers: numbers on the device and bf16 streams; else numbers by value and fp32 streams."""
    module = importlib.import_module("icegrt.kernels.ppo_policy_loss.triton")
    kernel = module.ppo_policy_loss_kernel
    number = "*fp32" if pointers else "fp32"
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | NUMBERS | SIZES
    signature |= {"mask_ptr": "*u8", "count_ptr": "*fp64", "mean_ptr": "*fp64", "m2_ptr": "*fp64"}
    signature |= {"logprob_ptr": "*bf16"} if pointers else {}
    signature |= {"has_moments": "i32", "shift_mean": "i32"}
    signature |= dict.fromkeys(("normalizer", "kl_coef", "entropy_coef"), number)
    constants = dict.fromkeys(("NORMALIZER_POINTER", "KL_POINTER", "ENTROPY_POINTER"), pointers)
    constants |= {"ESTIMATOR": estimator, "RAW": raw, "LIMIT": 60.0, "WIDTH": 32, "BLOCK": module.BLOCK}
    assert_nothing_spills(kernel, signature, constants, capability, module.OPTIONS, aligned)


@GENERATIONS
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("raw", FLAGS)
def test_ppo_policy_loss(capability, estimator, raw):
    check_policy(capability, estimator, raw, pointers=raw, aligned=not raw)


@pytest.mark.long
@GENERATIONS
def test_every_configuration_of_ppo_policy_loss(capability):
    for estimator, raw, pointers, aligned in product(("k1", "k2", "k3", "abs"), FLAGS, FLAGS, FLAGS):
        check_policy(capability, estimator, raw, pointers, aligned)


@GENERATIONS
@pytest.mark.parametrize("pointers", [True, False])
def test_value_loss_and_the_fold(capability, pointers):
    module = importlib.import_module("icegrt.kernels.value_loss.triton")
    policy = importlib.import_module("icegrt.kernels.ppo_policy_loss.triton")
    common = importlib.import_module("icegrt.kernels.common.triton")
    number = {"normalizer": "*fp32" if pointers else "fp32"}
    kernel = module.value_loss_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | NUMBERS | SIZES | number | {"mask_ptr": "*u8"}
    constants = {"NORMALIZER_POINTER": pointers, "WIDTH": 16, "BLOCK": module.BLOCK}
    for aligned in FLAGS:
        assert_nothing_spills(kernel, signature, constants, capability, module.OPTIONS, aligned)
    kernel = common.fold_statistics_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | number | {"stats_ptr": "*fp64", "programs": "i32"}
    for width, sums in ((32, policy.SUMS), (16, module.SUMS)):
        constants = {
            "NORMALIZER_POINTER": pointers,
            "SUMS": sums,
            "WIDTH": width,
            "BLOCK": common.FOLD_ROWS_PER_COLUMN * width,
        }
        for aligned in FLAGS:
            assert_nothing_spills(kernel, signature, constants, capability, common.FOLD_OPTIONS, aligned)
