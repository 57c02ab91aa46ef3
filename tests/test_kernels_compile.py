"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spills, in a process that does not interpret."""

import ast
from pathlib import Path

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_nothing_is_autotuned():
    """A trial run of a kernel that writes over its input corrupts it; a tuned block changes bits between runs."""
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*/triton.py")):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not names & {"autotune", "heuristics"}, path


@pytest.mark.long
def test_every_configuration_ahead_of_time():
    run_cases("compiled/kernels_cases.py", interpret=False, marked="long")


def test_ahead_of_time():
    report = run_cases("compiled/kernels_cases.py", interpret=False)
    print(*(line.lstrip(".") for line in report.splitlines() if " REG " in line), sep="\n")  # shown by pytest -s
