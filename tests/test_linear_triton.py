"""linear_logprobs and linear_ppo_loss with Triton between the products, under the interpreter."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


@pytest.mark.parametrize("file", ["linear_cases", "vocab_shard_cases"])
def test_under_the_interpreter(file):
    run_cases(f"interpreted/{file}.py", interpret=True)
