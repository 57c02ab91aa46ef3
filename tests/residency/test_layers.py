"""Layers of frozen roles visit the device one after another, with the bits of a resident run."""

import pytest
import torch

from icegrt.errors import RunError
from icegrt.residency import ENDS, GRADIENTS, KINDS, PARAMETERS, HostMemory, LayerParts, Part
from icegrt.residency import part as parts
from tests.helpers import tiny_models as tiny
from tests.residency.test_offloaded_runs import make, rows, same, state, train

CPU = torch.device("cpu")
OFFLOAD = {"roles": "all", "reference": "layers", "reward": "layers"}


def stack(count=4):
    layers, host = [torch.randn(8) for _ in range(count)], HostMemory(CPU)
    some = [Part(f"layer {n}", [x].copy, host, lambda: 0) for n, x in enumerate(layers)]
    return layers, LayerParts(some)


def on_device(layers) -> list[int]:
    return [n for n, x in enumerate(layers) if x.untyped_storage().nbytes()]


def test_a_layer_and_the_one_after_it_are_on_the_device():
    layers, streamed = stack()
    content = [x.tolist() for x in layers]
    streamed.enter(2)
    assert on_device(layers) == [0, 1, 2, 3] and streamed.is_resident  # all are there; nothing moves
    streamed.release()
    assert on_device(layers) == [] and not streamed.is_resident
    for layer, visiting in [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [0, 3]), (0, [0, 1]), (2, [2, 3])]:
        streamed.enter(layer)
        assert on_device(layers) == visiting and layers[layer].tolist() == content[layer]
    streamed.fill()
    assert streamed.is_resident and [x.tolist() for x in layers] == content
    streamed.release()
    assert on_device(layers) == []


def test_a_stack_of_one_layer_is_its_own_successor():
    layers, streamed = stack(1)
    streamed.release()
    streamed.enter(0)
    assert on_device(layers) == [0]


def test_a_layer_that_does_not_fit_is_an_error_and_all_is_on_the_host(monkeypatch):
    layers, streamed = stack()
    content = [x.tolist() for x in layers]
    streamed.release()
    streamed.enter(0)

    def fails(slot, copies):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patches, pytest.raises(RunError, match="layer 2: 32 bytes do not fit"):
        patches.setattr(parts._Slot, "fill", fails)
        streamed.enter(2)
    assert on_device(layers) == []
    streamed.fill()
    assert [x.tolist() for x in layers] == content


class Peak:
    """The most bytes of each frozen role's parameters on the device at a layer's start, and its layers' and others'."""

    def __init__(self, trainer):
        self.bytes, self.limit, self.whole, self.visits = {}, {}, {}, 0
        for name in ("reference", "reward"):
            role = trainer.components.roles[name]
            with role.placement.hold(PARAMETERS):
                layers = [sum(p.nbytes for p in layer.parameters()) for layer in role.model.chunks[0].decoder.layers]
                self.whole[name] = sum(p.nbytes for p in role.model.parameters())
            self.limit[name] = 2 * max(layers) + self.whole[name] - sum(layers)
            self.bytes[name] = 0
            for layer in role.model.chunks[0].decoder.layers:
                layer.register_forward_pre_hook(lambda *_, name=name, role=role: self.look(name, role))

    def look(self, name, role):
        self.visits += 1
        sizes = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in role.model.parameters()}
        self.bytes[name] = max(self.bytes[name], sum(sizes.values()))


@pytest.mark.parametrize(("dtype", "prefetch"), [("fp32", False), ("bf16", True)])
def test_a_run_that_streams_reference_and_reward_model_has_the_bits_of_a_resident_one(dtype, prefetch, tmp_path):
    sources = tiny.causal_lm(0, num_hidden_layers=5), tiny.scorer(1, num_hidden_layers=5)
    changes = {"models": sources, "eval_every": 0, "run": {"dtype": dtype}}
    resident = train(tmp_path / "resident", **changes)
    with make(tmp_path / "run", **changes, offload=OFFLOAD | {"prefetch": prefetch}) as trainer:
        peak = Peak(trainer)
        trainer.train()
        assert same((state(trainer), rows(tmp_path / "run")), resident)
    assert peak.visits > 5 * 4
    assert peak.bytes == peak.limit and all(peak.limit[name] < peak.whole[name] for name in peak.limit)


def test_whoever_holds_the_parameters_of_a_streamed_role_has_all_of_them(tmp_path):
    with make(tmp_path / "run", offload=OFFLOAD) as trainer:
        role = trainer.components.reference
        with role.placement.hold(*KINDS):
            assert len(tiny.parameters(role)) == len(list(role.model.parameters()))
        residency = role.placement.residency
        with trainer.critic.placement.hold(GRADIENTS):
            assert {("reference", PARAMETERS), ("reference", ENDS)}.isdisjoint(residency.resident())
        assert all(not p.untyped_storage().nbytes() for p in role.model.parameters())
