"""Broken kernels must fail their tests: the mutants listed in mutants.py, under the interpreter."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_every_mutant_is_noticed():
    run_cases("interpreted/mutants_cases.py", interpret=True)
