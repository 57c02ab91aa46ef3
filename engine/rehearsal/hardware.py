"""Figures of the rehearsed GPU and its links, from the makers' data sheets or from a YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icegrt.errors import ConfigError

GIB = 1 << 30
# Of the memory, for the CUDA context, the buffers of NCCL and the gaps between blocks of the allocator.
RESERVED = 0.06


@dataclass(frozen=True)
class Hardware:
    """A GPU in its node. Rates are the makers' peaks: no program reaches them.

    Attributes:
        name: of the GPU.
        memory_bytes: of device memory.
        bf16_flops: dense tensor-core FLOP/s of bf16 and fp16.
        fp32_flops: FLOP/s of fp32 products (TF32 is off, as torch has it by default).
        memory_bandwidth: bytes/s of device memory.
        link_bandwidth: bytes/s between GPUs of a node, in one direction.
        network_bandwidth: bytes/s of a GPU's share of the network, in one direction.
        host_bandwidth: bytes/s between host and device, in one direction.
        launch_seconds: shortest time of a kernel launch on the host.
        source: where the figures are from.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    launch_seconds: float
    source: str

    @property
    def usable_bytes(self) -> int:
        """Memory for tensors."""
        return int(self.memory_bytes * (1 - RESERVED))

    def flops_of(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products of a dtype."""
        return self.bf16_flops if dtype in ("bfloat16", "float16") else self.fp32_flops


# Launches take 2 microseconds at best (a CUDA graph takes less; PyTorch in Python takes several times more). Networks
# are those of the maker's reference nodes, one adapter per GPU: 200 Gbit/s (A100), 400 Gbit/s (H100, H200, B200).
PRESETS = {
    "a100-80": Hardware(
        "a100-80", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9, 2e-6,
        "NVIDIA A100 80GB SXM data sheet (nvidia-a100-datasheet-nvidia-us-2188504); DGX A100 data sheet",
    ),
    "h100-80": Hardware(
        "h100-80", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 64e9, 2e-6,
        "NVIDIA H100 SXM data sheet (dense rates: half of those with sparsity); DGX H100 data sheet",
    ),
    "h200-141": Hardware(
        "h200-141", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 64e9, 2e-6,
        "NVIDIA H200 SXM data sheet (dense rates: half of those with sparsity); DGX H200 data sheet",
    ),
    "b200-192": Hardware(
        "b200-192", 192e9, 2250e12, 75e12, 8e12, 900e9, 50e9, 64e9, 2e-6,
        "NVIDIA DGX B200 and HGX B200 data sheets (dense rates: half of those with sparsity)",
    ),
}  # fmt: skip


def find_hardware(name: str) -> Hardware:
    """Return a preset, or the hardware of a YAML file.

    Args:
        name: of a preset, or a path that ends in .yaml or .yml. The file has the fields of `Hardware`; `base` names a
            preset whose figures it changes.

    Raises:
        ConfigError: the name or a field is unknown, or a figure is missing or not above 0.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--gpu: `{name}` is neither a YAML file nor one of {', '.join(PRESETS)}")
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--gpu: {name}: no such file")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--gpu: {name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: expected a mapping of figures, got {document!r}")
    return _read_figures(name, document)


def _read_figures(where: str, document: dict[str, Any]) -> Hardware:
    fields = {field.name for field in dataclasses.fields(Hardware)}
    unknown = sorted(set(document) - fields - {"base"})
    if unknown:
        raise ConfigError(f"{where}: `{unknown[0]}` is not a figure; the figures are {', '.join(sorted(fields))}")
    base = document.pop("base", None)
    if base is not None and base not in PRESETS:
        raise ConfigError(f"{where}: base `{base}` is not one of {', '.join(PRESETS)}")
    values: dict[str, Any] = dataclasses.asdict(PRESETS[base]) if base else {"name": Path(where).stem, "source": where}
    values |= document
    if base:
        values["source"] = f"{where}, based on {base}"
    missing = sorted(fields - set(values))
    if missing:
        raise ConfigError(f"{where}: `{missing[0]}` is missing; give it, or name a preset as `base`")
    for name, value in values.items():
        if name in ("name", "source"):
            continue
        try:  # YAML reads 989e12 as text
            values[name] = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: `{name}` must be a number, got {value!r}") from None
        if not values[name] > 0:
            raise ConfigError(f"{where}: `{name}` must be above 0, got {value!r}")
    return Hardware(**values)
