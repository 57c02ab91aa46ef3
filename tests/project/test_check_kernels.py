"""The gate of `make check`: a kernel without its reference, test, bench or proofs is named."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from icegrt.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "tools" / "check_kernels.py")
check_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_kernels)


@pytest.fixture
def tree(tmp_path):
    for folder in ("kernels", "tests/kernels", "bench/kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    return tmp_path


def missing(tree):
    return check_kernels.missing(tree, dispatch.IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("tests/kernels/test_shaped_gae.py", "shaped_gae: no test: create tests/kernels/test_shaped_gae.py"),
        ("bench/kernels/bench_shaped_gae.py", "shaped_gae: no bench: create bench/kernels/bench_shaped_gae.py"),
        ("tests/kernels/triton/test_linear.py", "kernels/linear/triton.py: create tests/kernels/triton/test_linear.py"),
        ("tests/kernels/aot/test_whitening.py", "create tests/kernels/aot/test_whitening.py, which compiles"),
        ("tests/kernels/mutants/value_loss.py", "create tests/kernels/mutants/value_loss.py, which lists its mutants"),
    ],
)
def test_a_missing_proof_is_named(tree, gone, message):
    assert missing(tree) == []
    (tree / gone).unlink()
    assert any(message in line for line in missing(tree)), missing(tree)


def test_a_test_or_bench_that_does_not_mention_its_operation_is_named(tree):
    (tree / "tests/kernels/test_whitening.py").write_text("from icegrt.kernels import masked_moments")
    (tree / "tests/kernels/test_shaped_gae.py").write_text("from icegrt.kernels import shaped_gae")
    assert missing(tree) == [
        "whiten: no test: tests/kernels/test_whitening.py does not mention it",
        'kernels/shaped_gae/cpp.py: tests/kernels/test_shaped_gae.py does not run the backend "cpp"',
    ]


def test_a_folder_that_only_launches_kernels_needs_no_compile(tree):
    assert not (tree / "tests/kernels/aot/test_linear.py").exists() and missing(tree) == []
    with (tree / "kernels/linear/triton.py").open("a") as file:
        file.write("@triton.jit\ndef kernel(): pass\n")
    assert [line.split(",")[0] for line in missing(tree)] == [
        "kernels/linear/triton.py: create tests/kernels/aot/test_linear.py"
    ]


def test_a_missing_reference_and_a_stray_kernel_are_named(tree):
    (tree / "kernels" / "stray").mkdir()
    (tree / "kernels" / "stray" / "triton.py").write_text("")
    lines = check_kernels.missing(tree, {"shaped_gae": {"triton": "shaped_gae.triton:shaped_gae"}})
    assert "shaped_gae: no reference in kernels/dispatch.py" in lines
    assert "kernels/stray/triton.py: no operation in kernels/dispatch.py runs it" in lines
