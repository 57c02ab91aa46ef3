"""Ahead-of-time compiles with a gate on spills (run by test_kernels_compile.py)."""

import importlib

import pytest
from kernel_cases import stack_bytes

GENERATIONS = pytest.mark.parametrize("capability", [80, 90, 100])


@GENERATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("logits", "out"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")])
def test_token_logprobs(capability, direction, logits, out):
    """With every optional part, and without; the widest block, which is the one that could spill."""
    module = importlib.import_module("icegrt.kernels.token_logprobs_triton")
    kernel = getattr(module, f"token_logprobs_{direction}")
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {
        "logits_ptr": f"*{logits}",
        "grad_ptr": f"*{out}",
        "labels_ptr": "*i64",
        "live_ptr": "*i64",
        "row_stride": "i64",
        "column_stride": "i32",
        "grad_row_stride": "i64",
        "grad_column_stride": "i32",
        "columns": "i32",
        "start": "i32",
        "valid": "i32",
        "temperature": "fp32",
    }
    for everything in (True, False) if logits == out == "fp32" else (True,):
        constants = {"IGNORED": -100, "SCALED": everything, "ENTROPY": everything, "BLOCK": module.FORWARD_BLOCK}
        constants |= {"COMPACT": everything} if direction == "backward" else {}
        assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0


NUMBERS = {"clip_low": "fp32", "clip_high": "fp32", "dual_clip": "fp32", "clip": "fp32"}
SIZES = {name: "i32" for name in ("size", "old_size", "entropy_size", "ref_size", "mask_size", "weight_size")}


@GENERATIONS
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("raw", [True, False])
def test_ppo_policy_loss(capability, estimator, raw):
    """Numbers by value with fp32 streams, and numbers on the device with bf16 ones, by turns."""
    module = importlib.import_module("icegrt.kernels.ppo_policy_loss_triton")
    kernel = module.ppo_policy_loss_kernel
    pointers = raw
    number = "*fp32" if pointers else "fp32"
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | NUMBERS | SIZES
    signature |= {"mask_ptr": "*u8", "count_ptr": "*fp64", "mean_ptr": "*fp64", "m2_ptr": "*fp64"}
    signature |= {"logprob_ptr": "*bf16"} if pointers else {}
    signature |= {"has_moments": "i32", "shift_mean": "i32"}
    signature |= dict.fromkeys(("normalizer", "kl_coef", "entropy_coef"), number)
    constants = dict.fromkeys(("NORMALIZER_POINTER", "KL_POINTER", "ENTROPY_POINTER"), pointers)
    constants |= {"ESTIMATOR": estimator, "RAW": raw, "LIMIT": 60.0, "WIDTH": 32, "BLOCK": module.BLOCK}
    assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0


@GENERATIONS
@pytest.mark.parametrize("pointers", [True, False])
def test_value_loss_and_the_fold(capability, pointers):
    module = importlib.import_module("icegrt.kernels.value_loss_triton")
    policy = importlib.import_module("icegrt.kernels.ppo_policy_loss_triton")
    number = {"normalizer": "*fp32" if pointers else "fp32"}
    kernel = module.value_loss_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | NUMBERS | SIZES | number | {"mask_ptr": "*u8"}
    constants = {"NORMALIZER_POINTER": pointers, "WIDTH": 16, "BLOCK": module.BLOCK}
    assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0
    kernel = policy.fold_statistics_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | number | {"stats_ptr": "*fp64", "programs": "i32"}
    for width, sums in ((32, policy.SUMS), (16, module.SUMS)):
        constants = {
            "NORMALIZER_POINTER": pointers,
            "SUMS": sums,
            "WIDTH": width,
            "BLOCK": policy.FOLD_ROWS_PER_COLUMN * width,
        }
        assert stack_bytes(kernel, signature, constants, capability, policy.OPTIONS) == 0
