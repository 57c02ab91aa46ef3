"""Copies beside the computation: the order that CUDA streams are given, and when prefetched parts may be used."""

import contextlib
import itertools

import torch

from icegrt.residency import HostMemory, Part, Residency, copies
from icegrt.residency.order import RecurringOrder

CPU = torch.device("cpu")


class Streams:
    """Stands in for torch.cuda: streams and events that write what they are told to a log.

    Events are named after their stream and numbered: `wait A B1` lets stream A wait for the first event of B.
    """

    def __init__(self, patches, names):
        self.log, self.names = [], names
        names = iter(["out", "in"])
        self.current = compute = Stream(self, "compute")
        patches.setattr(torch.cuda, "Stream", lambda device: Stream(self, next(names)))
        patches.setattr(torch.cuda, "current_stream", lambda *device: compute)
        patches.setattr(torch.cuda, "stream", self.entered)
        patches.setattr(torch.Tensor, "record_stream", lambda x, stream: self.write("keep", x, "for", stream.name))
        copy = torch.Tensor.copy_

        def copied(target, source, non_blocking=False):
            self.write("copy", source, "to", target, "on", self.current.name)
            assert non_blocking
            return copy(target, source)

        patches.setattr(torch.Tensor, "copy_", copied)

    @contextlib.contextmanager
    def entered(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def write(self, *words):
        names = {x.untyped_storage().data_ptr(): name for name, x in self.names.items() if x.untyped_storage().nbytes()}
        words = [names.get(w.untyped_storage().data_ptr(), "host") if isinstance(w, torch.Tensor) else w for w in words]
        self.log.append(" ".join(words))

    def take(self):
        log, self.log = self.log, []
        return log


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name, self.events = streams, name, itertools.count(1)

    def record_event(self):
        event = f"{self.name}{next(self.events)}"
        self.streams.write("record", event)
        return event

    def wait_event(self, event):
        self.streams.write("wait", self.name, event)


def part_of(tensors, host, version=lambda: 0):
    return Part("actor: parameters", lambda: tensors, host, version)


def test_copies_wait_for_the_last_use_and_uses_for_the_copy_and_released_memory_for_both(monkeypatch):
    x, zeros = torch.randn(8), torch.ones(4)
    streams = Streams(monkeypatch, {"x": x, "zeros": zeros})
    host = HostMemory(CPU)
    host.copies = copies.StreamedCopies(torch.device("cuda"))
    part, content = part_of([x], host), x.tolist()
    left = ["record compute1", "wait out compute1", "copy x to host on out", "keep x for out", "record out1"]
    part.release()
    assert streams.take() == left and x.untyped_storage().nbytes() == 0
    # The memory that a copy fills may be what the computation has released, and the copy on the host be on its way.
    arriving = ["record compute2", "wait in compute2", "wait in out1", "copy host to x on in"]
    assert part.prefetch() and not part.is_resident
    assert part.prefetch()
    assert streams.take() == [*arriving, "record in1"]
    part.fill()
    assert streams.take() == ["wait compute in1"] and part.is_resident and x.tolist() == content
    # Without a change there is nothing to copy.
    part.release()
    assert streams.take() == ["record compute3", "wait out compute3", "record out2"]
    # What is on its way and leaves again is waited for.
    part.prefetch()
    assert streams.take()[-1] == "record in2"
    part.release()
    assert streams.take() == ["wait compute in2", "record compute5", "wait out compute5", "record out3"]
    part.fill()
    assert streams.take()[-2:] == ["record in3", "wait compute in3"]
    # Content that is not kept is made where the computation runs.
    gradients = Part("actor: gradients", lambda: [zeros], host, None)
    gradients.release()
    gradients.fill()
    assert not any("copy" in line for line in streams.take()) and not zeros.any()


def test_memory_on_its_way_may_be_released_again(monkeypatch):
    x = torch.randn(8)
    host = HostMemory(CPU)
    part, content = part_of([x], host), x.tolist()
    part.release()
    part.prefetch()
    part.release()
    assert x.untyped_storage().nbytes() == 0 and not part.is_resident
    part.fill()
    assert x.tolist() == content


def test_a_prefetch_without_memory_for_it_leaves_nothing_behind(monkeypatch):
    x, y = torch.randn(8), torch.randn(8)
    host = HostMemory(CPU)
    part, content = part_of([x, y], host), y.tolist()
    part.release()
    with monkeypatch.context() as patches:
        to_device, calls = host.copies.to_device, []

        def second_fails(device, source):
            calls.append(device)
            if len(calls) == 2:
                raise RuntimeError("CUDA out of memory")
            to_device(device, source)

        patches.setattr(host.copies, "to_device", second_fails)
        assert not part.prefetch()
    assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes() == 0
    part.fill()
    assert part.is_resident and y.tolist() == content


def test_the_next_item_is_what_followed_the_last_two():
    order = RecurringOrder()
    iteration = ["actor", "reward", "critic", "actor", "reference", "update actor", "update critic"]
    for item in iteration:
        order.after(item)
    for n, item in enumerate(iteration):
        expected = iteration[(n + 1) % len(iteration)]
        # Two items are known from the start of the second iteration on.
        assert order.after(item) == (expected if n else None)
        assert order.after(item) == (expected if n else None)
    assert order.after("actor") == "reward"
    order.after("evaluation")
    assert order.after("actor") is None


def held_after(residency, parts, *keys):
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(residency.hold(*key))
    return {name for name, (part, x) in parts.items() if x.untyped_storage().nbytes()}


def test_what_the_next_hold_needs_returns_early_unless_the_memory_is_needed(monkeypatch):
    host, residency, parts = HostMemory(CPU), Residency(prefetch=True), {}
    for name in "abc":
        x = torch.randn(8)
        parts[name] = part_of([x], host), x
        residency.add(name, "parameters", parts[name][0])

    def on_device_in(name):
        with residency.hold(name, "parameters"):
            assert parts[name][0].is_resident
            return {name for name, (_, x) in parts.items() if x.untyped_storage().nbytes()}

    assert [on_device_in(name) for name in "abcab"] == [{"a"}, {"b"}, {"c"}, {"a"}, {"b", "c"}]
    assert [on_device_in(name) for name in "ca"] == [{"c", "a"}, {"a", "b"}]
    to_device, calls = host.copies.to_device, []

    def two_fail(device, source):
        calls.append(device)
        if len(calls) <= 2:
            raise RuntimeError("CUDA out of memory")
        to_device(device, source)

    monkeypatch.setattr(host.copies, "to_device", two_fail)
    # c does not fit beside b. It then fits when what is expected after it has left.
    assert [on_device_in(name) for name in "bca"] == [{"b"}, {"c", "a"}, {"a", "b"}]
