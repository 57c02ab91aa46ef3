"""Compile Triton kernels ahead of time, for devices that need not be present, and read their resource usage."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Registers and stack bytes (spilled registers) per thread, shared memory bytes per program."""

    registers: int
    stack: int
    shared: int


def compiled_usage(kernel, signature, constants, capability, options, aligned=True):
    """Return the `Usage` of `kernel` on an sm_<capability>.

    aligned: pointers are multiples of 16 bytes, as for whole tensors; a launch on odd views selects the other variant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers} if aligned else {}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    line = next(line for line in report.stdout.splitlines() if "STACK:" in line)
    registers, stack = (int(re.search(rf"{key}:(\d+)", line)[1]) for key in ("REG", "STACK"))
    return Usage(registers, stack, compiled.metadata.shared)


def assert_nothing_spills(kernel, signature, constants, capability, options, aligned=True):
    """Compile `kernel`, print its usage in a line that `pytest -s` shows, and assert that its stack is empty."""
    usage = compiled_usage(kernel, signature, constants, capability, options, aligned)
    dtypes = " ".join(f"{name}={signature[name]}" for name in ("logits_ptr", "grad_ptr") if name in signature)
    flags = " ".join(f"{name}={value}" for name, value in constants.items())
    alignment = "aligned" if aligned else "unaligned"
    print(
        f"sm_{capability} {kernel.__name__:24s} REG {usage.registers:3d} SHARED {usage.shared} STACK {usage.stack} "
        f"{alignment} {dtypes} {flags}"
    )
    assert usage.stack == 0, usage
