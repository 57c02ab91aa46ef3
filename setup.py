"""Finds the packages below src/ and builds `icegrt._C` with CMake. The rest is in pyproject.toml.

src/icegrt is a link to engine/ and engine/kernels one to kernels/: an editable install is then a plain path to src/,
which interpreters, type checkers and editors resolve alike.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def find_tool(name, module, attribute):
    """Path of a build tool: the pip package of this interpreter if it is there, else the one on PATH, else None."""
    try:
        found = Path(getattr(importlib.import_module(module), attribute)) / name
        if found.exists():
            return str(found)
    except (ImportError, AttributeError):
        pass
    return shutil.which(name)


def run(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise CompileError(f"building icegrt._C failed: {' '.join(command)}\n{result.stdout}")


class CMakeBuild(build_ext):
    """Configures and builds the extension into the place where setuptools expects it (wheel and editable alike)."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        run([*self.configure_command(build), f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"])
        run([self.cmake(), "--build", str(build), "--config", "Release"])
        if not target.exists():
            raise CompileError(f"CMake finished, yet {target.name} is not in {target.parent}")

    def cmake(self):
        found = find_tool("cmake", "cmake", "CMAKE_BIN_DIR")
        if found is None:
            raise CompileError("icegrt._C needs CMake: run `pip install cmake`")
        return found

    def configure_command(self, build):
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise CompileError("icegrt._C needs a C++17 compiler: install g++ or clang++, or name one in CXX")
        try:
            import pybind11
        except ImportError:
            raise CompileError("icegrt._C needs pybind11: run `pip install pybind11`") from None
        command = [
            self.cmake(),
            *("-S", str(ROOT), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = find_tool("ninja", "ninja", "BIN_DIR")
        if ninja and not (build / "CMakeCache.txt").exists():
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return command


sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))
headers = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.hpp"))
setup(
    package_dir={"": "src"},
    packages=find_packages("src"),
    ext_modules=[Extension("icegrt._C", sources, depends=["CMakeLists.txt", *headers], language="c++")],
    cmdclass={"build_ext": CMakeBuild},
)
