"""Ahead-of-time compiles of the scans, elementwise kernels and the sampler, with a gate on spills."""

import importlib

import pytest
from aot import compiled_usage

ESTIMATORS = ("k1", "k2", "k3", "abs")
GENERATIONS = pytest.mark.parametrize("capability", [80, 90, 100])


def check(module, kernel, capability, constants, alignments=(True, False), **types):
    """Both alignments of one configuration; types: of the arguments that are not fp32 pointers or int32 numbers."""
    module = importlib.import_module(f"icegrt.kernels.{module}")
    jitted = getattr(module, kernel)
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in jitted.arg_names} | types
    constants = {
        name: getattr(module, name) for name in jitted.arg_names if name in ("BLOCK", "ROWS", "CHUNK", "LOOKBACK", "FANOUT")
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
        "shaped_gae_triton",
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
