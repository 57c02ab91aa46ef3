"""Ahead-of-time compiles of the scans, elementwise kernels and the sampler, with a gate on spills."""

import importlib

import pytest

from tests.helpers.aot import compiled_usage

ESTIMATORS = ("k1", "k2", "k3", "abs")
GENERATIONS = pytest.mark.parametrize("capability", [80, 90, 100])


def check(module, kernel, capability, constants, alignments=(True, False), **types):
    """Both alignments of one configuration; types: of the arguments that are not fp32 pointers or int32 numbers."""
    module = importlib.import_module(f"icegrt.kernels.{module}")
    jitted = getattr(module, kernel)
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in jitted.arg_names} | types
    constants = {
        name: getattr(module, name)
        for name in jitted.arg_names
        if name in ("BLOCK", "ROWS", "CHUNK", "LOOKBACK", "FANOUT")
    } | constants
    if "LIMIT" in jitted.arg_names:
        constants["LIMIT"] = module.EXPONENT_LIMIT
    for aligned in alignments:
        usage = compiled_usage(jitted, signature, constants, capability, module.OPTIONS, aligned)
        print(f"sm_{capability} {kernel} {constants} {types} aligned={aligned}: {usage}")
        assert usage.stack == 0, usage


@GENERATIONS
def test_shaped_gae(capability):
    check(
        "shaped_gae.triton",
        "shaped_gae_kernel",
        capability,
        {},
        alignments=(False,),  # the kernel does not specialise on it
        cu_ptr="*i32",
        mask_ptr="*u8",
        partial_ptr="*fp64",
        moments_ptr="*fp64",
        sync_ptr="*i32",
        kl_coef="fp32",
        gamma="fp32",
        decay="fp32",
    )


@GENERATIONS
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("logits", ["bf16", "fp16", "fp32"])
def test_sample_tokens(capability, truncate, logits):
    check(
        "sample_tokens.triton",
        "sample_tokens_kernel",
        capability,
        {"TRUNCATE": truncate},
        alignments=(False,),  # the kernel does not specialise on it
        logits_ptr=f"*{logits}",
        ids_ptr="*i64",
        positions_ptr="*i64",
        token_ptr="*i64",
        row_stride="i64",
        seed="i64",
        top_p="i64",
        temperature="fp32",
    )


@GENERATIONS
@pytest.mark.parametrize("x", ["bf16", "fp32"])
def test_masked_moments(capability, x):
    check(
        "whitening.triton",
        "masked_moments_kernel",
        capability,
        {},
        x_ptr=f"*{x}",
        mask_ptr="*u8",
        partial_ptr="*fp64",
        moments_ptr="*fp64",
        done_ptr="*i32",
    )


@GENERATIONS
@pytest.mark.parametrize("mode", ["shift", "keep", "gradient"])
def test_whiten(capability, mode):
    statistics = dict.fromkeys(("count_ptr", "mean_ptr", "m2_ptr"), "*fp64")
    check("whitening.triton", "whiten_kernel", capability, {"MODE": mode}, eps="fp32", **statistics)


@GENERATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_divergence(capability, direction, estimator):
    check("kl_divergence.triton", f"kl_{direction}_kernel", capability, {"ESTIMATOR": estimator})
