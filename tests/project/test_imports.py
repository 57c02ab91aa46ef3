"""Imports run one way. The tables below are the rule; the tests read the sources and compare."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest first; one name for each package or module at the top of the tree. A module may import from its own package and
# from the lines above it, not from its line's neighbours.
LAYERS = (
    ("_C", "errors"),
    ("utils", "packing", "scheduling", "kernels", "residency"),
    ("config",),
    ("distributed", "metrics", "rewards", "data", "migration"),
    ("model", "report"),
    ("roles", "rollout"),
    ("checkpoint",),
    ("training",),
    ("ppo",),
    ("rehearsal",),
    ("planning", "study"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# Names that only some of the packages above them may import.
ONLY_FROM = {
    "_C": {"packing", "scheduling", "rollout", "data", "rehearsal"},
}
# The library part: usable without the engine's dependencies.
LIGHT = ("icegrt", "icegrt.kernels", "icegrt.packing", "icegrt.scheduling")
HEAVY = ("megatron", "transformers", "datasets", "tensorboard", "matplotlib")

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path, module: str) -> set[tuple[int, str]]:
    """(line, absolute dotted name) of every import that runs; those under TYPE_CHECKING do not."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    imports = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            imports.update((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            imports.update((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return imports


def sources(folder: str, package: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def violations(module: str, imports: set[tuple[int, str]]) -> list[str]:
    owner = module.split(".")[1]
    if owner not in LEVEL:
        return [f"{module}: {owner} is in no layer; give it a place in LAYERS"]
    problems = set()
    for line, name in imports:
        parts = name.split(".")
        if parts[0] in ("tests", "bench", "engine"):
            problems.add(f"line {line}: {module} imports {name}, which is not part of the package")
        if parts[0] != "icegrt" or len(parts) == 1 or parts[1] in (owner, "__version__"):
            continue
        target = parts[1]
        if LEVEL.get(target, len(LAYERS)) >= LEVEL[owner]:
            problems.add(f"line {line}: {module} imports {target}, which is not below {owner}")
        if owner not in ONLY_FROM.get(target, {owner}):
            problems.add(f"line {line}: {module} imports {target}, which is for {sorted(ONLY_FROM[target])}")
    return sorted(problems)


def import_graph() -> dict[str, set[str]]:
    """Which modules each module of the package imports, imports inside functions included."""
    files = {
        module: path
        for pair in (("engine", "icegrt"), ("kernels", "icegrt.kernels"))
        for path, module in sources(*pair)
    }

    def resolved(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {resolved(name) for _, name in imported_modules(path, module)} - {module, "icegrt", ""}
        for module, path in files.items()
    }


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names along one circle of a graph, or an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    graph = import_graph()
    assert len(graph) > 100
    assert circle_in(graph) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def test_every_layer_exists():
    """A layer without a package would let a misspelt name through."""
    packages = {path.stem for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or path.is_dir()} | {
        "kernels"
    }
    assert set(LEVEL) - packages <= {"_C"}


def test_engine_imports_run_one_way():
    modules = [(path, module) for path, module in sources("engine", "icegrt") if module != "icegrt"]
    assert modules
    problems = [line for path, module in modules for line in violations(module, imported_modules(path, module))]
    assert not problems, "\n".join(["the order is at the top of tests/test_imports.py:", *problems])


def test_kernels_import_nothing_of_the_engine():
    problems = []
    for path, module in sources("kernels", "icegrt.kernels"):
        for line, name in sorted(imported_modules(path, module)):
            inside = (
                f"{name}.".startswith("icegrt.kernels.") or name == "icegrt._C"
            )  # the extension is beside, not above
            outside = name.split(".")[0] == "icegrt" and not inside
            if outside or name.split(".")[0] in ("engine", "bench", "tests", *HEAVY):
                problems.append(f"{path.relative_to(ROOT)}:{line}: imports {name}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "text", "refused"),
    [
        ("icegrt.model.trunk", "from ..roles import host", "roles"),
        ("icegrt.model.trunk", "from . import heads", None),
        ("icegrt.model.trunk", "import icegrt.rollout", "rollout"),
        ("icegrt.model.trunk", "def f():\n    from icegrt.ppo.trainer import run", "ppo"),
        ("icegrt.model.trunk", "if TYPE_CHECKING:\n    from icegrt.roles import host", None),
        ("icegrt.model.trunk", "from icegrt.brand_new import x", "brand_new"),
        ("icegrt.model.trunk", "from icegrt import _C", "_C"),
        ("icegrt.rollout.engine", "from icegrt import _C, kernels", None),
        ("icegrt.rollout.engine", "from bench.harness import x", "bench"),
        ("icegrt.config.docs", "from icegrt.config import x", None),
        ("icegrt.config.docs", "from icegrt.distributed import x", "distributed"),
        ("icegrt.training.sft", "from icegrt.training.trainer import x", None),
        ("icegrt.training.sft", "from icegrt.ppo.trainer import x", "ppo"),
        ("icegrt.brand_new", "import torch", "brand_new"),
        ("icegrt.cli", "from icegrt.ppo import trainer\nfrom icegrt.report import x", None),
    ],
)
def test_the_rule_finds_offenders(tmp_path, module, text, refused):
    path = tmp_path / "offender.py"
    path.write_text(text)
    problems = violations(module, imported_modules(path, module))
    assert [refused in line for line in problems] == ([True] if refused else []), problems


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter at the root of the repository, as a user would."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_the_library_is_light(module):
    if module != "icegrt" and not list((ROOT / "engine").glob(f"{module.split('.')[1]}*")) and "kernels" not in module:
        pytest.skip(f"{module} does not exist yet")
    heavy = run_python(
        f"import sys, {module}\n"
        f"print(*sorted(name for name in {HEAVY!r} if name in sys.modules))\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA was initialised by an import'"
    )
    assert heavy.strip() == ""


def test_trainers_load_megatron_when_they_open_a_cluster():
    run_python(
        "import sys, torch, warnings\n"
        "compiler, filters = torch.compile, list(warnings.filters)\n"
        "import icegrt.ppo.trainer, icegrt.training.sft, icegrt.rollout.load\n"
        "from icegrt.distributed.cluster import Cluster\n"
        "assert 'megatron' not in sys.modules and torch.compile is compiler\n"
        "assert not [f for f in warnings.filters if f not in filters and 'Apex' in str(f[1])]\n"
        "with Cluster.open():\n"
        "    assert 'megatron.core.models.gpt' in sys.modules and torch.compile is compiler\n"
        "    assert sys.modules.get('triton', sys) is not None\n"
    )


def test_transformers_survives_the_folder_named_kernels():
    """transformers looks for a package called `kernels`; from the root of the repository it finds our folder."""
    pytest.importorskip("transformers")
    run_python(
        "import kernels, os\n"
        "assert os.path.samefile(os.path.dirname(kernels.__file__), 'kernels')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM"
    )
