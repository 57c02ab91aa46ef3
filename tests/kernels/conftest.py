"""Skip kernel tests in a process of the wrong mode: Triton reads TRITON_INTERPRET once, so a process has one mode."""

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = (HERE / "triton", HERE / "mutants")
COMPILED = (HERE / "aot",)

NEEDS_INTERPRETER = "runs in Triton's interpreter: hide the device (CUDA_VISIBLE_DEVICES= pytest tests/kernels)"
NEEDS_COMPILER = "compiles kernels ahead of time: run TRITON_INTERPRET=0 pytest tests/kernels/aot"

# Triton 3.6 interprets kernels with numpy, which warns when exp(x) overflows or inf - inf becomes NaN. Kernels form
# such values on purpose in lanes that `tl.where` discards. A device does so without a warning.
IGNORE_NUMPY = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:(triton\.runtime\.interpreter|numpy)")


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING and importlib.util.find_spec("triton"):
    from tests.helpers.interpreter import patch_language_once_per_launch

    patch_language_once_per_launch()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent in INTERPRETED:
            item.add_marker(IGNORE_NUMPY if INTERPRETING else pytest.mark.skip(reason=NEEDS_INTERPRETER))
        elif item.path.parent in COMPILED and INTERPRETING:
            item.add_marker(pytest.mark.skip(reason=NEEDS_COMPILER))
