"""Ahead-of-time compiles of shaped_gae, with a gate on spills."""

import pytest

from icegrt.kernels.shaped_gae import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("turns", [False, True], ids=["token", "turn"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["one lambda", "two lambdas"])
def test_shaped_gae(decoupled, turns, capability):
    constants = {name: getattr(module, name) for name in ("ROWS", "CHUNK", "LOOKBACK", "FANOUT")}
    constants |= {"DECOUPLED": decoupled, "TURNS": turns}
    constants |= {"LIMIT": module.EXPONENT_LIMIT, "FLOOR": module.LOGPROB_FLOOR}
    types = {"cu_ptr": "*i32", "mask_ptr": "*u8", "value_mask_ptr": "*u8"}
    types |= {"partial_ptr": "*fp64", "moments_ptr": "*fp64", "sync_ptr": "*i32"}
    types |= dict.fromkeys(("kl_coef", "gamma", "decay", "value_decay"), "fp32")
    # The kernel does not specialise on alignment.
    assert_nothing_spills(module.shaped_gae_kernel, capability, constants, module.OPTIONS, aligned=False, **types)
