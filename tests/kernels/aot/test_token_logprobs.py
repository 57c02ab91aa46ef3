"""Ahead-of-time compiles of token_logprobs, with a gate on spills."""

from itertools import product

import pytest

from icegrt.kernels.token_logprobs import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills

FLAGS = (True, False)


def check_token_logprobs(direction, capability, logits, out, scaled, entropy, compact, rows):
    """Compile one configuration.

    Args:
        rows: Whether the tensors are whole rows, aligned, with a stride of 1 that is compiled in; else any view.
    """
    kernel = getattr(module, f"token_logprobs_{direction}")
    types = {"logits_ptr": f"*{logits}", "labels_ptr": "*i64", "row_stride": "i64", "temperature": "fp32"}
    constants = {"IGNORED": -100, "SCALED": scaled, "ENTROPY": entropy, "BLOCK": module.FORWARD_BLOCK}
    if direction == "backward":
        types |= {"grad_ptr": f"*{out}", "active_ptr": "*i64", "grad_row_stride": "i64"}
        constants["COMPACT"] = compact
    if rows:
        strides = ("column_stride", "grad_column_stride")
        constants |= {name: 1 for name in strides if name in kernel.arg_names}
    assert_nothing_spills(kernel, capability, constants, module.OPTIONS, aligned=rows, **types)


@EVERY_GENERATION
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("logits", "out"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")])
def test_token_logprobs(capability, direction, logits, out):
    """With every optional part, on whole rows and on views, and without any; the widest block, which could spill."""
    check_token_logprobs(direction, capability, logits, out, True, True, True, rows=True)
    check_token_logprobs(direction, capability, logits, out, True, True, True, rows=False)
    if logits == out == "fp32":
        check_token_logprobs(direction, capability, logits, out, False, False, False, rows=True)


@pytest.mark.long
@EVERY_GENERATION
def test_every_configuration_of_token_logprobs(capability):
    for logits, scaled, entropy, rows in product(("bf16", "fp16", "fp32"), FLAGS, FLAGS, FLAGS):
        check_token_logprobs("forward", capability, logits, logits, scaled, entropy, False, rows)
        check_token_logprobs("backward", capability, logits, logits, scaled, entropy, False, rows)
    for out, entropy, compact in product(("bf16", "fp16", "fp32"), FLAGS, FLAGS):  # what the linear operations launch
        check_token_logprobs("backward", capability, "fp32", out, False, entropy, compact, True)
