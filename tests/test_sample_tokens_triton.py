"""sample_tokens in Triton, under the interpreter where there is no need of a device."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_cases("interpreted/sample_tokens_cases.py", interpret=True)
