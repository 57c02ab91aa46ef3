"""Ahead-of-time compilation needs a process in which Triton does not interpret: `make test` starts one."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip = pytest.mark.skip(reason="compiles kernels: run TRITON_INTERPRET=0 pytest tests/kernels/aot")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
