"""Compiles Triton kernels for devices that need not be present, and reads what they would occupy there."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

EVERY_GENERATION = pytest.mark.parametrize("capability", [80, 90, 100])


@dataclass(frozen=True)
class Usage:
    """Per thread: registers, and stack bytes (what does not fit into registers); per program: shared memory bytes."""

    registers: int
    stack: int
    shared: int


def compiled_usage(kernel, signature, constants, capability, options, aligned):
    """Return what `kernel` occupies on an sm_<capability>; the arguments are those of assert_nothing_spills."""
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers} if aligned else {}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage_line = next(line for line in report.splitlines() if "STACK:" in line)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage_line)[1]) for key in ("REG", "STACK"))
    return Usage(registers, stack, compiled.metadata.shared)


def assert_nothing_spills(kernel, capability, constants, options, aligned, **types):
    """Compile `kernel` for an sm_<capability>, print what it occupies (`pytest -s` shows it), assert an empty stack.

    Args:
        constants: Values of the kernel's constexpr arguments.
        options: Triton's launch options.
        aligned: Whether pointers are known to be multiples of 16 bytes, as a launch on whole tensors finds them.
            The other specialisation is what a launch on odd views selects.
        types: Types of the arguments that are not fp32 pointers (names in _ptr) or int32 numbers (all others).
    """
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | types
    usage = compiled_usage(kernel, signature, constants, capability, options, aligned)
    print(f"sm_{capability} {kernel.__name__} {constants} {types} aligned={aligned}: {usage}")
    assert usage.stack == 0, usage
