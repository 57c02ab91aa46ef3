"""Kernels run in Triton's interpreter here: on a machine with a device, hide it (CUDA_VISIBLE_DEVICES=)."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="needs the interpreter: run CUDA_VISIBLE_DEVICES= pytest tests/kernels/triton")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
