"""ppo_policy_loss and value_loss in Triton, under the interpreter."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_cases("interpreted/losses_cases.py", interpret=True)
