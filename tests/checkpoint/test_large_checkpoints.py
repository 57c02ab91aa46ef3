"""A large checkpoint goes in and out within its own size: one tensor at a time, no second copy."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "large_checkpoint.py"


def step(*arguments) -> int:
    """Run one step in a process of its own; by how many bytes its memory grew, as it prints it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert process.returncode == 0, process.stderr
    growths = [int(line.split()[1]) for line in process.stdout.splitlines() if line.startswith("growth ")]
    return growths[-1] if growths else 0


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of a checkpoint folder by file name."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors*")):
        sha256 = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                sha256.update(block)
        hashes[path.name] = sha256.hexdigest()
    return hashes


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "least"), [("fp32", 1e9), ("bf16", 0.5e9)])
def test_a_quarter_of_a_billion_parameters_pass_within_their_size(dtype, least, tmp_path):
    step("make", tmp_path / "in", dtype)
    source = digests(tmp_path / "in")
    size = sum((tmp_path / "in" / name).stat().st_size for name in source)
    assert size > least and len(source) > 3
    # The model, and two of its largest tensors.
    assert step("pass", tmp_path / "in", tmp_path / "out", tmp_path / "run", dtype) < 1.06 * size
    assert digests(tmp_path / "out") == source
    # At most three copies lie on the disk at a time.
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    tiny_models.tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
    # Without a model, memory does not grow with the checkpoint.
    assert step("export", tmp_path / "run", tmp_path / "again", dtype) < 0.2 * size
    assert digests(tmp_path / "again") == source
