"""Random operations on the scheduler under the sanitizers, with a model of the cache's content beside it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path("tests/scheduling/fuzz_scheduler.cpp")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

# One line each, in which a faulty scheduler would differ.
MUTANTS = {
    "a shared block is written": ("pool_.references(table(sequence.slot)[tail]) > 1", "false"),
    "a sample forgets what its blocks contain": ("    sequence.content = leader.content;\n", ""),
    "the last token is reused too": (
        "block_of(sequence.length - 1)",
        "block_of(sequence.length)",
    ),
    "a reused block may be evicted": ("if (references_[block]++ == 0) unlink(block);", "references_[block]++;"),
    "the cache survives a change of weights": ("    pool_.forget_contents();\n", ""),
    "a sample decodes in the step that forks it": (
        "    sequence.last_plan = plan_number_;\n    sequence.computed",
        "    sequence.computed",
    ),
}


def build(root: Path, folder: Path, *options: str) -> Path:
    program = folder / "fuzz"
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", *options, str(root / SOURCE), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    return program


@pytest.mark.slow
def test_a_million_random_operations_are_clean(tmp_path):
    program = build(ROOT, tmp_path, *SANITIZERS)
    result = subprocess.run([program, "1", "1000000"], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:  # every shape has preempted and computed again
        counts = {name: int(count) for name, count in (part.split() for part in line.partition(": ")[2].split(", "))}
        assert counts["finished"] > 1000 and counts["preempted"] > 100 and counts["shared"] > 1000, line


@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS)
def test_a_faulty_scheduler_is_noticed(name, tmp_path):
    original, mutated = MUTANTS[name]
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*.hpp")}
    assert sum(text.count(original) for text in sources.values()) == 1
    (tmp_path / SOURCE.parent).mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / SOURCE, tmp_path / SOURCE)
    for path, text in sources.items():
        (tmp_path / "csrc" / path.name).write_text(text.replace(original, mutated), encoding="utf-8")
    program = build(tmp_path, tmp_path)
    result = subprocess.run([program, "1", "300000"], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "operation" in result.stderr
