"""The gate of `make check`: a kernel without its reference, test, bench or proofs is named."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from icegrt.kernels import dispatch

ROOT = Path(__file__).resolve().parents[1]
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
    ("gone", "said"),
    [
        ("tests/test_shaped_gae.py", "shaped_gae: no test"),
        ("bench/bench_shaped_gae.py", "shaped_gae: no bench"),
        ("tests/interpreted/shaped_gae_cases.py", "nothing in tests/interpreted mentions shaped_gae"),
        ("tests/compiled/scans_cases.py", "nothing in tests/compiled mentions shaped_gae_triton"),
        ("tests/mutants.py", "no mutant"),
    ],
)
def test_a_missing_proof_is_named(tree, gone, said):
    def about_gae():
        return [line for line in gate.lacks(tree, OP) if "shaped_gae" in line]

    assert not about_gae()
    if gone.endswith("shaped_gae_cases.py"):  # other files may mention it in passing
        for file in tree.glob("tests/interpreted/*.py"):
            file.write_text(file.read_text().replace("shaped_gae", ""))
    else:
        (tree / gone).unlink()
    assert any(said in line for line in about_gae()), about_gae()


def test_a_missing_reference_and_a_stray_kernel_are_named(tree):
    (tree / "kernels" / "stray_triton.py").write_text("")
    found = gate.lacks(tree, {"shaped_gae": {"triton": "shaped_gae_triton:shaped_gae"}})
    assert "shaped_gae: no reference in kernels/dispatch.py" in found
    assert "kernels/stray_triton.py: no operation in kernels/dispatch.py runs it" in found
