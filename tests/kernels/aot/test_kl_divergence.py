"""Ahead-of-time compiles of kl_divergence, with a gate on spills."""

import pytest

from icegrt.kernels.kl_divergence import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_divergence(capability, direction, estimator):
    kernel = getattr(module, f"kl_{direction}_kernel")
    constants = {"ESTIMATOR": estimator, "LIMIT": module.EXPONENT_LIMIT, "BLOCK": module.BLOCK}
    for aligned in (True, False):
        assert_nothing_spills(kernel, capability, constants, module.OPTIONS, aligned)
