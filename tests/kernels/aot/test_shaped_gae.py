"""Ahead-of-time compiles of shaped_gae, with a gate on spills."""

from icegrt.kernels.shaped_gae import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
def test_shaped_gae(capability):
    constants = {name: getattr(module, name) for name in ("ROWS", "CHUNK", "LOOKBACK", "FANOUT")}
    constants |= {"LIMIT": module.EXPONENT_LIMIT, "FLOOR": module.LOGPROB_FLOOR}
    types = {"cu_ptr": "*i32", "mask_ptr": "*u8", "partial_ptr": "*fp64", "moments_ptr": "*fp64", "sync_ptr": "*i32"}
    types |= dict.fromkeys(("kl_coef", "gamma", "decay"), "fp32")
    # The kernel does not specialise on alignment.
    assert_nothing_spills(module.shaped_gae_kernel, capability, constants, module.OPTIONS, aligned=False, **types)
