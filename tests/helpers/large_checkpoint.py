"""A script that imports, exports and saves a large checkpoint, and prints by how many bytes its memory grew at most.

`python large_checkpoint.py make FOLDER DTYPE` writes a random model; `pass IN OUT RUN DTYPE` imports it, exports it and
saves it as the checkpoint of a run; `export RUN OUT DTYPE` is `icegrt export`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from icegrt import cli
from icegrt.checkpoint import directory as checkpoint_folder
from icegrt.data import load_tokenizer
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.megatron import load_megatron
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.build import build_model
from icegrt.model.hf import exporter
from icegrt.model.hf import mapping as weights
from icegrt.model.hf.writer import save_pretrained

# Half the widths of Llama 3.2 1B, untied: 0.27 billion parameters. The largest tensor is 5% of them.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 12001,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHARD_BYTES = 250_000_000


def make(folder: str, dtype: str) -> None:
    """Write a model with random weights, one tensor in memory at a time."""
    architecture = Architecture.from_config(CONFIG)
    draw = torch.Generator().manual_seed(0)
    shapes = weights.source_shapes(architecture, "lm")
    tensors = ((n, torch.randn(s, generator=draw, dtype=torch.float32).to(DTYPES[dtype])) for n, s in shapes.items())
    save_pretrained(tensors, architecture, folder, classifier=False, dtype=dtype, shard_bytes=SHARD_BYTES)


def import_and_export(origin: str, out: str, run: str, dtype: str) -> None:
    """Import and export the model, print the growth, then write the weights as a checkpoint of a run."""
    with Cluster.open() as cluster:
        before = memory("VmRSS")
        model = build_model(origin, "lm", cluster, dtype=DTYPES[dtype]).requires_grad_(False)
        tensors = exporter.export_tensors(model, DTYPES[dtype])
        save_pretrained(tensors, model.architecture, out, classifier=False, dtype=dtype, shard_bytes=SHARD_BYTES)
        print_growth(before)
        from megatron.core import dist_checkpointing

        step = Path(run) / "checkpoints" / "step_000001"
        (step / "actor").mkdir(parents=True)
        dist_checkpointing.save({"model": model.chunks[-1].sharded_state_dict()}, str(step / "actor"))
        roles = {"actor": {"head": "lm", "hf_config": model.architecture.hf_config}}
        (step / "state.json").write_text(json.dumps({"step": 1, "roles": roles}))
        checkpoint_folder.write_manifest(step, {})


def export(run: str, out: str, dtype: str) -> None:
    """Run `icegrt export`, then print by how much its buffers grew."""
    keys = [f"export.run={run}", f"export.out={out}", f"export.dtype={dtype}"]
    # What the command imports is no part of the growth.
    load_megatron()
    importlib.import_module(cli.STAGE_MODULES["export"])
    load_tokenizer(str(Path(run) / "tokenizer"))
    before = memory("VmRSS")
    assert cli.main(["export", *keys, f"export.shard_gigabytes={SHARD_BYTES / 1e9}"]) == 0
    print_growth(before)


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS, what is resident, or VmHWM, its peak.

    `ru_maxrss` would also have the memory of the process that started this one.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def print_growth(before: int) -> None:
    """Print by how much the peak of this process exceeds what it held before."""
    print("growth", memory("VmHWM") - before, flush=True)


if __name__ == "__main__":
    {"make": make, "pass": import_and_export, "export": export}[sys.argv[1]](*sys.argv[2:])
