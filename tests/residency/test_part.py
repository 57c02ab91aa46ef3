"""Storages leave the device and return with their bits; a failure at any of them loses nothing."""

import mmap
import os

import pytest
import torch

from icegrt.errors import RunError
from icegrt.residency import HostMemory, Part, Residency, host_memory
from icegrt.residency import part as parts

CPU = torch.device("cpu")


class State:
    """Three tensors on two storages, as Megatron's views on a buffer, and a count of their changes."""

    def __init__(self):
        self.buffer, self.other, self.version = torch.randn(40), torch.randn(3, 5).bfloat16(), 0
        self.view = self.buffer.view(-1)[8:24].view(4, 4)

    def tensors(self):
        return [self.view, self.other, self.buffer]

    def copies(self):
        return [x.clone() for x in self.tensors()]

    def bytes(self):
        return [x.untyped_storage().nbytes() for x in (self.buffer, self.other)]


def part_of(state, host=None, kept=True):
    version = (lambda: state.version) if kept else None
    return Part("actor: parameters", state.tensors, host or HostMemory(CPU), version)


def holds(state, copies):
    return all(torch.equal(x, copy) for x, copy in zip(state.tensors(), copies, strict=True))


def test_views_and_buffers_return_with_their_bits_in_the_storages_that_they_had():
    state, host = State(), HostMemory(CPU)
    copies, sizes = state.copies(), state.bytes()
    storages = [x.untyped_storage()._cdata for x in state.tensors()]
    part = part_of(state, host)
    for _ in range(3):
        part.release()
        assert state.bytes() == [0, 0] and not part.is_resident
        part.fill()
        assert state.bytes() == sizes and part.is_resident and holds(state, copies)
    assert [x.untyped_storage()._cdata for x in state.tensors()] == storages
    # The copies are allocated once: 160 and 30 bytes, aligned.
    assert host.bytes == 192 + 64


def test_a_change_moves_and_what_did_not_change_is_not_copied_again(monkeypatch):
    state = State()
    part = part_of(state)
    part.release()
    part.fill()
    state.view.add_(1)
    state.version += 1
    changed = state.copies()
    part.release()
    part.fill()
    assert holds(state, changed)
    copied = []
    content = parts._content
    monkeypatch.setattr(parts, "_content", lambda storage: copied.append(storage) or content(storage))
    part.release()
    assert copied == []
    part.fill()
    assert len(copied) == 2 and holds(state, changed)


def test_state_that_is_not_kept_takes_no_host_memory_and_returns_as_zeros():
    state, host = State(), HostMemory(CPU)
    part = part_of(state, host, kept=False)
    part.release()
    assert state.bytes() == [0, 0]
    part.fill()
    assert host.bytes == 0 and not any(x.any() for x in state.tensors())


def test_new_tensors_join_at_the_next_release_and_old_ones_are_forgotten():
    state = State()
    part = part_of(state)
    part.release()
    part.fill()
    state.other = torch.randn(7, 7)
    copies = state.copies()
    part.release()
    assert state.bytes() == [0, 0]
    part.fill()
    assert holds(state, copies) and len(part._slots) == 2


def test_the_host_memory_is_a_mapping_of_its_own_outside_of_private_memory():
    def mapped():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssShmem"))

    before = mapped()
    (block,) = HostMemory(CPU).allocate_each([64 << 20])
    block.fill_(1)
    assert 64 << 10 <= mapped() - before < 80 << 10


def test_a_failing_allocation_on_the_device_keeps_what_is_on_the_host(monkeypatch):
    state = State()
    copies, part = state.copies(), part_of(state)
    for failing in range(2):
        part.release()
        fills = []
        fill = parts._Slot.fill

        def some_fail(slot, copies, failing=failing, fills=fills, fill=fill):
            fills.append(slot)
            if len(fills) == failing + 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            fill(slot, copies)

        with monkeypatch.context() as patches, pytest.raises(RunError) as caught:
            patches.setattr(parts._Slot, "fill", some_fail)
            part.fill()
        missing = (190, 30)[failing]
        assert f"actor: parameters: {missing} bytes do not fit on the device (CUDA out of memory." in str(caught.value)
        assert "lower ppo.token_budget" in str(caught.value) and not part.is_resident
        if failing:  # what has returned may leave again
            part.release()
        part.fill()
        assert holds(state, copies)


def test_a_failing_allocation_on_the_host_releases_nothing(monkeypatch):
    state = State()
    copies, sizes, part = state.copies(), state.bytes(), part_of(state)

    def no_memory(*arguments):
        raise OSError(12, os.strerror(12))

    with (
        monkeypatch.context() as patches,
        pytest.raises(RunError, match=r"256 bytes of host memory .*\(.*Cannot alloc"),
    ):
        patches.setattr(mmap, "mmap", no_memory)
        part.release()
    assert state.bytes() == sizes and holds(state, copies) and part.is_resident
    part.release()
    part.fill()
    assert holds(state, copies)


def test_pinned_blocks_are_unregistered_before_they_are_unmapped(monkeypatch):
    class CUDART:
        def __init__(self):
            self.registered = {}

        def cudaHostRegister(self, address, nbytes, flags):
            self.registered[address] = nbytes
            return 0 if nbytes < 1000 else 2

        def cudaHostUnregister(self, address):
            with open("/proc/self/maps") as maps:
                spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
            assert any(start <= address < stop for start, stop in spans)
            del self.registered[address]

    cudart = CUDART()
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", lambda: cudart)
    host = HostMemory(torch.device("cuda"))
    host.allocate_each([60, 30])
    host.allocate_each([200])
    assert sorted(cudart.registered.values()) == [128, 256]
    with pytest.raises(RunError, match=r"1,024 bytes of host memory .*cudaHostRegister returned 2"):
        host.allocate_each([1000])
    cudart.registered.pop(next(address for address, nbytes in cudart.registered.items() if nbytes == 1024))
    del host
    assert cudart.registered == {}


def test_what_is_held_is_resident_and_everything_else_is_not():
    states = {(role, kind): State() for role in ("actor", "critic") for kind in ("parameters", "gradients")}
    residency, host = Residency(), HostMemory(CPU)
    for (role, kind), state in states.items():
        residency.add(role, kind, part_of(state, host, kept=kind == "parameters"))

    def resident():
        on_device = {key for key, state in states.items() if any(state.bytes())}
        assert on_device == residency.resident()
        return on_device

    assert resident() == set(states)
    residency.move()
    assert resident() == set()
    with residency.hold("actor", "parameters", "gradients"):
        assert resident() == {("actor", "parameters"), ("actor", "gradients")}
        with residency.hold("actor", "parameters"):  # an inner hold releases nothing that an outer one needs
            assert resident() == {("actor", "parameters"), ("actor", "gradients")}
        with residency.hold("critic", "parameters"):
            assert resident() == {("actor", "parameters"), ("actor", "gradients"), ("critic", "parameters")}
    assert ("actor", "gradients") in resident()  # nothing moves when a hold ends
    with residency.hold("actor", "parameters"):
        assert resident() == {("actor", "parameters")}
    with residency.hold("critic"):
        assert resident() == set()
