"""Each device step is an operator whose declared cost is what its kernel does, load by load, in the interpreter."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from icegrt.kernels import (
    add_rms_norm,
    copy_blocks,
    kl_divergence,
    linear_logprobs,
    linear_ppo_loss,
    masked_moments,
    paged_attention,
    ppo_policy_loss,
    record_launches,
    rms_norm,
    rope,
    rope_qkv,
    rope_write_kv,
    sample_tokens,
    shaped_gae,
    swiglu,
    token_logprobs,
    use_backend,
    value_loss,
    whiten,
    write_kv,
)
from icegrt.kernels.common.operators import OPERATORS, Cost, device_operator
from icegrt.kernels.dispatch import IMPLEMENTATIONS, play_device
from tests.helpers.sampling_cases import ROWS, bitmask, by_row

A, V, H = 13, 70, 8
LABELS = torch.arange(A)
# Kernel steps that a public call launches without an operator of its own would be missing here.
STEPS = {
    "copy_blocks",
    "fold_statistics",
    "kl_backward_kernel",
    "kl_forward_kernel",
    "masked_moments_kernel",
    "merge_splits",
    "paged_attention",
    "ppo_policy_loss",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope",
    "rope_write_kv",
    "sample_tokens_kernel",
    "shaped_gae_kernel",
    "swiglu_backward",
    "swiglu_forward",
    "token_logprobs_backward",
    "token_logprobs_forward",
    "value_loss",
    "whiten_kernel",
    "write_kv",
}


@dataclass
class Traffic:
    """Addresses that the kernels of one operator call read and wrote, with the bytes at each."""

    grids: int = 0
    read: dict = field(default_factory=dict)
    written: dict = field(default_factory=dict)


class _Memory:
    """Triton's interpreted memory, which records the addresses of every access."""

    def __init__(self, memory, traffic):
        self._memory, self._traffic = memory, traffic

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def load(self, pointers, mask, other, dtype):
        self._traffic.read.update(dict.fromkeys(pointers[mask].ravel().tolist(), np.dtype(dtype).itemsize))
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._traffic.written.update(dict.fromkeys(pointers[mask].ravel().tolist(), value.dtype.itemsize))
        return self._memory.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        addresses = dict.fromkeys(pointers[mask].ravel().tolist(), value.dtype.itemsize)
        self._traffic.read.update(addresses)
        self._traffic.written.update(addresses)
        return self._memory.atomic_rmw(op, pointers, value, mask, sem)


class Measured(TorchDispatchMode):
    """Runs every operator with its traffic recorded."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls, self.monkeypatch = [], monkeypatch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "icegrt":
            return func(*args, **(kwargs or {}))
        traffic = Traffic()
        run = interpreter.GridExecutor.__call__

        def counted(executor, *grid_args, **options):
            traffic.grids += 1
            return run(executor, *grid_args, **options)

        with self.monkeypatch.context() as patch, record_launches() as launches:
            patch.setattr(interpreter, "_interpreter", _Memory(interpreter._interpreter, traffic))
            patch.setattr(interpreter.GridExecutor, "__call__", counted)
            result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("icegrt::")
        self.calls.append((name, OPERATORS[name].cost(*args), traffic, launches))
        return result


def calls(dtype):
    generator = torch.Generator().manual_seed(0)

    def stream(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, y, logits, hidden, weight = stream(A), stream(A), stream(A, V), stream(A, H), stream(V, H)
    # Separate memory for every input: the addresses are counted.
    old, advantage, ref, returns = (stream(A).detach() for _ in range(4))
    keys = {"seed": 3, "sequence_ids": LABELS, "positions": LABELS.clone()}
    settings = by_row([ROWS[n % len(ROWS)] for n in range(A)])
    allowed = bitmask(torch.ones(A, V))
    cu, moments = torch.tensor([0, 8, A], dtype=torch.int32), masked_moments(x.detach().float())
    mask, number = torch.ones(A, dtype=torch.bool), torch.tensor(5.0)
    # Token, group, head of the group, element.
    residual, qkv, angles = stream(A, H), stream(A, 2, 4, H), stream(A, H // 2).detach()
    cos, sin = angles.cos(), angles.sin()
    policy = {"normalizer": number, "kl_coef": 0.1, "ref_logprob_A": ref, "mask_A": mask, "weight_A": mask + 0.5}
    return {
        "token_logprobs": lambda: token_logprobs(logits, LABELS, temperature=0.7, entropy=True),
        "linear_logprobs": lambda: linear_logprobs(hidden, weight, LABELS, chunk_rows=5),
        "linear_ppo_loss": lambda: linear_ppo_loss(
            hidden, weight, LABELS, None, advantage * (LABELS % 3 > 0), chunk_rows=5, normalizer=3.0
        ),
        "ppo_policy_loss": lambda: ppo_policy_loss(
            x, old, advantage, entropy_A=y, entropy_coef=0.1, moments=moments, **policy
        ),
        "value_loss": lambda: value_loss(x, old, returns, normalizer=2.0, mask_A=mask),
        "kl_divergence": lambda: kl_divergence(x, y, "k3"),
        "shaped_gae": lambda: [
            shaped_gae(torch.ones(2), x, y, y, cu, kl_coef=0.1, mask_A=mask, bootstrap_N=torch.ones(2)),
            shaped_gae(torch.ones(2), x, y, y, cu, kl_coef=0.1, lam=torch.rand(2), lam_value=1.0, unit="turn"),
        ],
        "masked_moments": lambda: masked_moments(x.detach().repeat(400), mask.repeat(400)),
        "whiten": lambda: whiten(x.float(), moments),
        "sample_tokens": lambda: [
            sample_tokens(logits, temperature=0.7, top_k=5, top_p=0.9, **keys),
            sample_tokens(logits, **keys | settings, allowed_NW=allowed),
        ],
        "rms_norm": lambda: rms_norm(hidden, weight[0]),
        "add_rms_norm": lambda: add_rms_norm(hidden, residual, weight[0]),
        "rope": lambda: rope(qkv[:, 0], qkv[:, 1, :2], cos, sin),
        "rope_qkv": lambda: rope_qkv(qkv, cos, sin),
        "swiglu": lambda: swiglu(logits),
    }


def paged_calls(dtype, device="cpu"):
    """Return calls on pages: all sequences have the greatest length, and blocks of their own, as costs assume."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32).to(device)

    k, v, keys, values, cache = draw(5, 2, 8), draw(5, 2, 8), draw(70, 2, 16, 8), draw(70, 2, 16, 8), draw(3, 9, 40)
    slots, copy_from, copy_to = integers(3, 70, 5, 16, 90), integers(3, 4), integers(5, 6)
    tables, one_row, chunks = integers(*range(70)).view(2, 35), draw(2, 6, 8), draw(9, 6, 8)
    starts, rows = integers(0, 3, 9), integers(1, 0)

    angles = draw(5, 4).float()
    projection = (draw(5, 2, 4, 8), angles.cos(), angles.sin())

    def attend(q, length, **keywords):
        # The block tables and lengths of every call have memory of their own.
        pages = (keys, values, tables.clone(), integers(length, length))
        return paged_attention(q, *pages, max_length=length, **keywords)

    return {
        "write_kv": lambda: write_kv(k, v, keys, values, slots),
        "rope_write_kv": lambda: [rope_write_kv(*projection, keys, values, slots)],
        "copy_blocks": lambda: copy_blocks(cache, copy_from, copy_to),
        "paged_attention": lambda: [
            attend(one_row, 33),
            attend(one_row, 550, table_rows_S=rows),
            attend(one_row, 550, window=20),
            attend(chunks, 550, row_starts=starts),
        ],
    }


def backward(result):
    if result is None or isinstance(result, list):  # written in place, or without a gradient
        return
    if isinstance(result, tuple):
        # The gradient of a sum is one number in memory, expanded.
        sum(value.square().sum() for value in result).backward()
        return
    for value in [result] if isinstance(result, torch.Tensor) else [*vars(result).values()]:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.sum().backward(retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_declared_costs_are_what_the_interpreter_counts(monkeypatch, dtype):
    names = set()
    for op, call in (calls(dtype) | paged_calls(dtype)).items():
        with use_backend("triton"), Measured(monkeypatch) as measured, record_launches() as launches:
            backward(call())
        assert sum(cost.launches for _, cost, _, _ in measured.calls) == len(launches) > 0, op
        for name, cost, traffic, own in measured.calls:
            assert own == [(name, "triton")] and traffic.grids == cost.launches == 1
            counted = sum(traffic.read.values()), sum(traffic.written.values())
            if name == "shaped_gae_kernel":
                # Empty slots have no map, and the last tile's is read by no other.
                assert counted[0] <= cost.bytes_read <= counted[0] + 1000 and counted[1] == cost.bytes_written
            else:
                assert counted == (cost.bytes_read, cost.bytes_written), (op, name)
            assert cost.flops > 0
            names.add(name)
    of_kernels = {name for name, op in OPERATORS.items() if op.launch.__module__.startswith("icegrt.kernels")}
    assert names == STEPS == of_kernels


def test_every_operation_with_a_triton_backend_is_covered():
    assert set(calls(torch.float32) | paged_calls(torch.float32)) == {
        op for op, backends in IMPLEMENTATIONS.items() if "triton" in backends
    }


class Operators(TorchDispatchMode):
    """Records the operators' names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "icegrt":
            self.names.append(func._schema.name.removeprefix("icegrt::"))
        return func(*args, **(kwargs or {}))


def on_meta(dtype):
    with torch.device("meta"):
        x, y, logits = (torch.empty(*shape, dtype=dtype, requires_grad=True) for shape in ((A,), (A,), (A, V)))
        labels, cu = torch.empty(A, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
        score = torch.empty(2)
        moments = masked_moments(torch.empty(A))
    keys = {"seed": 3, "sequence_ids": labels, "positions": labels}
    settings = {name: x.to("meta") for name, x in by_row([ROWS[n % len(ROWS)] for n in range(A)]).items()}
    allowed = bitmask(torch.ones(A, V)).to("meta")
    return {
        "token_logprobs": lambda: token_logprobs(logits, labels, temperature=0.7, entropy=True),
        "ppo_policy_loss": lambda: ppo_policy_loss(
            x, y.detach(), y.detach(), entropy_A=y, entropy_coef=0.1, moments=moments, normalizer=2.0
        ),
        "value_loss": lambda: value_loss(x, y.detach(), y.detach(), normalizer=2.0),
        "kl_divergence": lambda: kl_divergence(x, y, "k3"),
        "shaped_gae": lambda: [
            shaped_gae(score, x, y, y, cu, kl_coef=0.1, bootstrap_N=score.clone()),
            shaped_gae(score, x, y, y, cu, kl_coef=0.1, lam=score.clone(), lam_value=1.0, unit="turn"),
        ],
        "masked_moments": lambda: masked_moments(x.detach().repeat(400)),
        "whiten": lambda: whiten(x.float(), moments),
        "sample_tokens": lambda: [
            sample_tokens(logits, temperature=0.7, top_k=5, top_p=0.9, **keys),
            sample_tokens(logits, **keys | settings, allowed_NW=allowed),
        ],
    }


def test_meta_tensors_launch_the_operators_of_real_ones():
    real = calls(torch.float32) | paged_calls(torch.float32)
    for op, call in (on_meta(torch.float32) | paged_calls(torch.float32, "meta")).items():
        recorded = []
        for kind in (play_device("meta", "cuda"), contextlib.nullcontext()):
            run = call if not recorded else real[op]
            with kind, use_backend("triton") if recorded else contextlib.nullcontext(), Operators() as operators:
                backward(run())
            recorded.append(operators.names)
        assert recorded[0] == recorded[1] != [], op


def test_without_a_rehearsal_meta_tensors_take_no_triton():
    with Operators() as operators:
        kl_divergence(torch.empty(A, device="meta"), torch.empty(A, device="meta"), "k3")
    assert operators.names == []


def test_a_second_registration_replaces_the_first():
    try:
        for number in (1, 2):

            @device_operator("replaced_step(Tensor(a!) out)", lambda out, n=number: Cost(n, 0, 0, 0))
            def step(out, n=number):
                out.fill_(n)

        out = torch.zeros(2)
        step(out)
        assert out.tolist() == [2, 2] and OPERATORS["replaced_step"].cost(out).launches == 2
    finally:
        del OPERATORS["replaced_step"]
