"""kl_divergence, masked_moments and whiten in Triton, under the interpreter where there is no need of a device."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_cases("interpreted/elementwise_cases.py", interpret=True)
