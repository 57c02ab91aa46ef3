"""shaped_gae, sampling and the elementwise kernels compile for sm_80, sm_90 and sm_100 without spills."""

import pytest
from kernel_cases import run_cases

pytest.importorskip("triton")


def test_ahead_of_time():
    run_cases("compiled/scans_cases.py", interpret=False)
