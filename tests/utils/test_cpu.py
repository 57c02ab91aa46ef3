"""bf16 on a CPU without instructions for it: one warning with the key, and none where it is as fast."""

import pytest
import torch

from icegrt.utils import cpu

CPU = torch.device("cpu")


@pytest.fixture
def slowdown(monkeypatch):
    cpu._warn_once.cache_clear()
    yield lambda value: monkeypatch.setattr(cpu, "bf16_slowdown", lambda: value)
    cpu._warn_once.cache_clear()


def test_slow_bf16_is_warned_of_once_with_the_key_and_what_to_set(slowdown, capsys):
    slowdown(40.0)
    for _ in range(2):
        cpu.warn_of_slow_bf16(torch.bfloat16, CPU, "ppo.run.dtype")
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "40 times as long" in err and err.rstrip().endswith("set ppo.run.dtype=fp32")


@pytest.mark.parametrize(
    ("value", "dtype", "device"),
    [
        (0.4, torch.bfloat16, CPU),  # the processor has the instructions
        (40.0, torch.float32, CPU),
        (40.0, torch.bfloat16, torch.device("cuda", 0)),
    ],
)
def test_no_warning_where_bf16_costs_nothing(slowdown, capsys, value, dtype, device):
    slowdown(value)
    cpu.warn_of_slow_bf16(dtype, device, "ppo.run.dtype")
    assert capsys.readouterr().err == ""


def test_slowdown_is_a_quotient_of_seconds():
    assert 0 < cpu.bf16_slowdown() < float("inf")
