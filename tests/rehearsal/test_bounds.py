"""Bytes on the wire, the bound of a phase, and the figures of the hardware."""

import dataclasses

import pytest

from icegrt.errors import ConfigError
from icegrt.rehearsal.bounds import Bound, bound_of, wire_bytes
from icegrt.rehearsal.counts import TO_DEVICE, Copy, PhaseCounts, Transfer
from icegrt.rehearsal.hardware import PRESETS, find_hardware
from icegrt.rehearsal.sites import NOWHERE


@pytest.mark.parametrize(
    ("op", "ranks", "node", "network"),
    [
        ("all-gather", range(4), 750, 0),
        ("reduce-scatter", range(8), 875, 0),
        ("all-reduce", range(4), 1500, 0),
        ("all-reduce", (0, 8), 0, 1000),  # one rank a node: 2 (m - 1) / m
        ("all-reduce", range(16), 1750, 125),  # eight ranks share what their node sends
        ("send", (0, 8), 0, 1000),
        ("send", (0, 1), 1000, 0),
        ("receive", (0, 8), 0, 0),
        ("all-reduce", (3,), 0, 0),
    ],
)
def test_bytes_on_the_wire(op, ranks, node, network):
    assert wire_bytes(Transfer(op, "group", tuple(ranks)), 1000, 8) == (node, network)


def test_the_bound_is_the_slowest_unit():
    hardware = PRESETS["h100-80"]
    counts = PhaseCounts()
    counts.product_flops["bfloat16"] = int(hardware.bf16_flops)
    counts.bytes_read = int(2 * hardware.memory_bandwidth)
    counts.copies[Copy(TO_DEVICE, NOWHERE, True, False)].add(int(hardware.host_bandwidth / 2))
    counts.launches["mm", NOWHERE] = 1000
    counts.transfers[Transfer("send", "group", (0, 1))].add(int(hardware.link_bandwidth))
    bound = bound_of(counts, hardware, 8)
    assert bound == Bound(arithmetic=1.0, memory=2.0, links=1.0, host_copies=0.5, launches=0.002)
    assert (bound.seconds, bound.limit, bound.times(3).seconds) == (2.0, "memory", 6.0)


def test_own_figures_change_those_of_a_preset(tmp_path):
    path = tmp_path / "gpu.yaml"
    path.write_text("base: h100-80\nname: h100-94\nmemory_bytes: 94e9\n")
    expected = dataclasses.replace(
        PRESETS["h100-80"], name="h100-94", memory_bytes=94e9, source=f"{path}, based on h100-80"
    )
    assert find_hardware(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: h100", "base `h100` is not one of"),
        ("memory: 80", "`memory` is not a figure"),
        ("name: x", "`bf16_flops` is missing"),
        ("base: h100-80\nmemory_bytes: much", "`memory_bytes` must be a number, got 'much'"),
        ("base: h100-80\nmemory_bytes: 0", "`memory_bytes` must be above 0"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_figures_are_named(tmp_path, text, message):
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        find_hardware(str(path))


def test_unknown_hardware_is_named():
    with pytest.raises(ConfigError, match=r"`h100` is neither a YAML file nor one of a100-80, h100-80"):
        find_hardware("h100")
    with pytest.raises(ConfigError, match="no such file"):
        find_hardware("absent.yaml")
