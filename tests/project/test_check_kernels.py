"""The gate of `make check`: a kernel without its reference, test, bench or proofs is named."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from icegrt.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "tools" / "check_kernels.py")
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)


@pytest.fixture
def tree(tmp_path):
    for folder in ("kernels", "tests", "bench"):
        ignore = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    return tmp_path


OP = {"shaped_gae": dict(dispatch.IMPLEMENTATIONS["shaped_gae"])}


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("tests/kernels/test_shaped_gae.py", "shaped_gae: no test"),
        ("bench/kernels/bench_shaped_gae.py", "shaped_gae: no bench"),
        ("tests/kernels/triton", "nothing in tests/kernels/triton mentions shaped_gae"),
        ("tests/kernels/aot", "nothing in tests/kernels/aot mentions shaped_gae.triton"),
        ("tests/kernels/mutants", "no mutant"),
    ],
)
def test_a_missing_proof_is_named(tree, removed, message):
    def about_gae():
        return [line for line in gate.missing(tree, OP) if "shaped_gae" in line]

    assert not about_gae()
    if (tree / removed).is_dir():
        shutil.rmtree(tree / removed)
    else:
        (tree / removed).unlink()
    assert any(message in line for line in about_gae()), about_gae()


def test_a_missing_reference_and_a_stray_kernel_are_named(tree):
    (tree / "kernels" / "stray").mkdir()
    (tree / "kernels" / "stray" / "triton.py").write_text("")
    problems = gate.missing(tree, {"shaped_gae": {"triton": "shaped_gae.triton:shaped_gae"}})
    assert "shaped_gae: no reference in kernels/dispatch.py" in problems
    assert "kernels/stray/triton.py: no operation in kernels/dispatch.py runs it" in problems
