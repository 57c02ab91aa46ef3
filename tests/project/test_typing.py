"""Type checkers see the public API as it is, from outside the repository and without its configuration."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).with_name("typing_examples.py")


@pytest.mark.slow
def test_user_code_is_checked_against_the_installed_package(tmp_path):
    pytest.importorskip("mypy")
    shutil.copy(EXAMPLES, tmp_path / "user_code.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--cache-dir=cache", "user_code.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
