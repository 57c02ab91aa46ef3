"""The wheel holds what it should, works where the repository is not, and a build that cannot work says why."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ("src", "engine", "kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE")


def copy_tree(target: Path) -> Path:
    """The sources alone: building in the repository would leave folders there and race with other builds."""
    target.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=skip, symlinks=True)
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("pybind11")
    tmp = tmp_path_factory.mktemp("wheel")
    tree = copy_tree(tmp / "tree")
    # Neither listed anywhere: a new folder and a data file must travel without a list to keep.
    (tree / "engine" / "brand_new" / "deep").mkdir(parents=True)
    for folder in ("brand_new", "brand_new/deep"):
        (tree / "engine" / folder / "__init__.py").write_text("")
    (tree / "engine" / "brand_new" / "page.html").write_text("<p></p>")
    build = python(
        "-m", "pip", "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp / "out", tree
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = (tmp / "out").glob("*.whl")
    return path


def test_wheel_contents(wheel):
    tree, names = wheel.parent.parent / "tree", zipfile.ZipFile(wheel).namelist()
    for folder, package in (("engine", "icegrt"), ("kernels", "icegrt/kernels")):
        for path in (tree / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent.name}/ has no __init__.py and is left out"
            assert f"{package}/{path.relative_to(tree / folder).as_posix()}" in names
    assert {"icegrt/brand_new/deep/__init__.py", "icegrt/brand_new/page.html"} <= set(names)
    assert {"icegrt/py.typed", "icegrt/_C.pyi"} <= set(names)
    assert sum(name.startswith("icegrt/_C.") and name.endswith(".so") for name in names) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert top == {"icegrt", next(name for name in top if name.endswith(".dist-info"))}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "icegrt = icegrt.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    required = {line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("Requires-Dist")}
    base = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert base == {"torch", "numpy", "triton"}


def test_wheel_works_away_from_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import icegrt.packing as p, icegrt._C as c; print(p.__file__, c.__file__, p.pack([[1]], [[2]]).n_tokens)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = python("-c", code, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    packing, extension, n_tokens = result.stdout.split()
    assert Path(packing).is_relative_to(tmp_path / "site")
    assert Path(extension).is_relative_to(tmp_path / "site")
    assert n_tokens == "2"


def build_error(tmp_path, **environment):
    tree = copy_tree(tmp_path / "tree")
    keep = {k: v for k, v in os.environ.items() if k != "CXX"}
    result = python("setup.py", "build_ext", cwd=tree, env=keep | environment)
    assert result.returncode != 0
    return result.stdout + result.stderr


def test_no_compiler_is_said_plainly(tmp_path):
    pytest.importorskip("cmake")
    pytest.importorskip("pybind11")
    (tmp_path / "empty").mkdir()
    assert "icegrt._C needs a C++17 compiler" in build_error(tmp_path, PATH=str(tmp_path / "empty"))


def test_no_pybind11_is_said_plainly(tmp_path):
    package = tmp_path / "site" / "pybind11"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('hidden')")
    assert "icegrt._C needs pybind11" in build_error(tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_the_package_is_imported_beside_a_folder_of_its_name(tmp_path):
    """In the parent of a clone called icegrt, the folder must not shadow the installed package as a namespace."""
    (tmp_path / "icegrt").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = python("-c", "import icegrt; print(icegrt.__file__)", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == "__init__.py"
