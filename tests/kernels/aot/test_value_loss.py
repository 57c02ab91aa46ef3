"""Ahead-of-time compiles of value_loss and of the fold of statistics that the losses share, with a gate on spills."""

import pytest

from icegrt.kernels.common import triton as common
from icegrt.kernels.ppo_policy_loss import triton as ppo_policy_loss
from icegrt.kernels.value_loss import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills

FLAGS = (True, False)


@EVERY_GENERATION
@pytest.mark.parametrize("pointers", FLAGS)
def test_value_loss_and_the_fold(capability, pointers):
    """pointers: whether the normalizer lies on the device; else it comes by value."""
    normalizer = {"normalizer": "*fp32" if pointers else "fp32"}
    constants = {"NORMALIZER_POINTER": pointers, "WIDTH": 16, "BLOCK": module.BLOCK}
    types = {"mask_ptr": "*u8", "clip": "fp32"} | normalizer
    for aligned in FLAGS:
        assert_nothing_spills(module.value_loss_kernel, capability, constants, module.OPTIONS, aligned, **types)

    types = {"stats_ptr": "*fp64"} | normalizer
    for width, sums in ((32, ppo_policy_loss.SUMS), (16, module.SUMS)):
        block = common.FOLD_ROWS_PER_COLUMN * width
        constants = {"NORMALIZER_POINTER": pointers, "SUMS": sums, "WIDTH": width, "BLOCK": block}
        for aligned in FLAGS:
            assert_nothing_spills(
                common.fold_statistics_kernel, capability, constants, common.FOLD_OPTIONS, aligned, **types
            )
