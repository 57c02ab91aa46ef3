"""A tiny forward pass for `icegrt doctor`: checks that Megatron-core runs on this machine."""

from __future__ import annotations

import torch

from icegrt.distributed.cluster import Cluster
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_parallel_model
from icegrt.packing import pack

_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def run() -> str:
    """Run two layers over two packed sequences. Returns a line of text with the device."""
    architecture = Architecture.from_config(_CONFIG)
    with Cluster.open() as cluster:
        model = build_parallel_model(architecture, "lm", cluster, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        with torch.no_grad():
            hidden = model.chunks[-1].hidden(pack([[1, 2, 3], [4]], [[5], [6, 7]]).to(cluster.device))
        if not torch.isfinite(hidden).all():
            raise RuntimeError("the hidden states are not finite")
        return f"2 layers over {hidden.shape[0]} packed tokens on {cluster.device}"
