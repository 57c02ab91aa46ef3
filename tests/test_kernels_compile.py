"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spills, in a process that does not interpret."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_ahead_of_time():
    report = run_cases("compiled/kernels_cases.py", interpret=False)
    print(*(line.lstrip(".") for line in report.splitlines() if " REG " in line), sep="\n")  # shown by pytest -s
