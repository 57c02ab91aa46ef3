"""Ahead-of-time compiles of paged attention, with a gate on spills."""

import pytest
import torch
import triton

from icegrt.kernels.paged_attention import triton as module
from icegrt.kernels.paged_attention.inputs import SPLIT
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = ("tables", "lengths", "table_rows", "row_starts")


def types(kernel, dtype):
    names = kernel.arg_names
    pointers = {f"{name}_ptr": "*i32" for name in INTEGERS} | dict.fromkeys(("parts_ptr", "sums_ptr"), "*fp32")
    pointers |= {name: f"*{dtype}" for name in names if name.endswith("_ptr") and name not in pointers}
    strides = {"key_stride_b": "i64", "value_stride_b": "i64", "scale": "fp32"}
    return {name: kind for name, kind in (pointers | strides).items() if name in names}


@EVERY_GENERATION
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("width", "heads", "groups"), [(64, 9, 3), (100, 12, 2), (128, 32, 8), (256, 8, 1)])
@pytest.mark.parametrize(("chunks", "splits"), [(True, 0), (False, 0), (False, 8)])
def test_paged_attention(capability, dtype, width, heads, groups, chunks, splits):
    chosen = module.constants(heads, groups, width, DTYPES[dtype], chunks)
    constants = {"CHUNKS": chunks, "TABLE_ROWS": True, "SPLITS": splits, "SPLIT": SPLIT} | chosen
    constants |= {"WIDTH": width, "PAGE": 16}
    kernel = module.paged_attention_kernel
    assert_nothing_spills(kernel, capability, constants, module.options(chosen), True, **types(kernel, dtype))


@EVERY_GENERATION
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("width", "group"), [(64, 9), (128, 16), (256, 8)])
def test_merge_splits(capability, dtype, width, group):
    constants = {"SPLITS": 8, "GROUP": group, "HEADS": triton.next_power_of_2(group), "SPLIT": SPLIT} | {
        "WIDTH": width,
        "BLOCK": width,
    }
    kernel = module.merge_splits_kernel
    for aligned in (True, False):
        assert_nothing_spills(kernel, capability, constants, module.MERGE_OPTIONS, aligned, **types(kernel, dtype))
