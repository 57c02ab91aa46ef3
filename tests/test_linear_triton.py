"""linear_logprobs and linear_ppo_loss with Triton between the products, under the interpreter."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_cases("interpreted/linear_cases.py", interpret=True)
