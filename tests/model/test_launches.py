"""What a layer launches: fused operations between its matrix products, and nothing per layer that a pass can share."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icegrt.kernels import record_launches
from icegrt.packing import pack
from tests.helpers import tiny_models

# Views, and memory without content.
NO_LAUNCH = ("empty", "detach", "_unsafe_view", "new_empty")
# Two norms, rope, attention, activation; qwen3 has a norm for queries and keys each.
FUSED = {"llama": 5, "qwen2": 5, "qwen3": 7}
MOST = {"forward": 14, "backward": 24}


class OperationCounter(TorchDispatchMode):
    """Counts the PyTorch operations that launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        name = func.__name__.split(".")[0]
        if not is_view and not name.startswith(NO_LAUNCH):
            self.launches[name] += 1
        return out


def launches(family, layers):
    """Return the operations of a forward and of a backward of one micro-batch, fused ones under their backend."""
    role = tiny_models.role(tiny_models.causal_lm(0, family, num_hidden_layers=layers))
    model = role.model.chunks[0].train().requires_grad_(True)
    batch = pack([[2] * 5] * 3, [[3] * 4] * 3)
    counts = {}
    with OperationCounter() as forward, record_launches() as fused:
        hidden = model.hidden(batch)
    counts["forward"] = forward.launches + Counter(backend for _, backend in fused)
    with OperationCounter() as backward, record_launches() as fused:
        hidden.sum().backward()
    counts["backward"] = backward.launches + Counter(backend for _, backend in fused)
    return counts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_launches_per_layer(cluster, family):
    few, more = launches(family, 2), launches(family, 3)
    for phase, most in MOST.items():
        per_layer = more[phase] - few[phase]
        assert per_layer["mm"] == {"forward": 4, "backward": 8}[phase] and per_layer["cpp"] == FUSED[family]
        assert per_layer.total() <= most, per_layer
        assert not {"cos", "sin", "neg", "pow", "mean", "rsqrt", "silu", "mul"} & set(per_layer), per_layer
    assert few["forward"]["cos"] == few["forward"]["sin"] == 1
    assert not (more["forward"] - few["forward"])["cat"]


def test_recomputed_layers_repeat_their_bits(cluster):
    """Full and selective recomputation give the gradients of none, to the bit."""
    batch, gradients = pack([[2] * 5, [4] * 3], [[3] * 4, [5] * 6]), []
    for recompute in ("none", "selective", "full"):
        model = tiny_models.role(tiny_models.causal_lm(0, "qwen3"), recompute=recompute).model.chunks[0]
        model.train().requires_grad_(True)
        model.hidden(batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and all(tiny_models.same(other, gradients[0]) for other in gradients[1:])
    assert all(torch.isfinite(g).all() for g in gradients[0].values())
