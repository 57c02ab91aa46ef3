"""Matrix products of an iteration: the operations that a recipe needs, those that ran, and the rate of the machine."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.end_to_end.workloads import Workload

# Rows, inner size and columns of the products whose fastest rate is the peak.
_PROBE = """
import sys, time, torch
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]]
best = 0.0
for rows, inner, columns in ((2048, 1024, 1024), (2048, 256, 4096), (1024, 2048, 2048)):
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    torch.mm(a, b)
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - begin))
print(best / 1e9)
"""
PRODUCTS, ATTENTION = "products", "attention"
aten = torch.ops.aten


def peak_gflops(dtype: str, threads: int) -> float:
    """Return the fastest rate of torch's matrix product now, in GFLOP/s, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, dtype]
    environment = {"OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def useful_flops(workload: Workload, phase: str, tokens: int, answer_tokens: int) -> float:
    """Return the operations of the weights' products in a phase of the full recipe, without padding.

        forward of a trunk: 2 * parameters of its projections * tokens
        LM head:            2 * width * vocabulary * answer tokens

    The figure is the same for all providers. One that skips work, as with frozen weights or shared prompts, executes
    less. Attention's scores are not in it.

    Args:
        workload: the sizes.
        phase: "rollout": the actor's forward pass over each prompt once and over all answers but their last tokens.
            "score": forward passes of actor, reference, critic and reward model over each answer with its prompt.
            "update": forward and backward passes, three forward passes' worth, of actor and critic.
        tokens: of prompts and answers; a prompt counts once for each of its answers.
        answer_tokens: of answers.
    """
    kv = workload.width // workload.heads * workload.kv_heads
    projections = workload.layers * (2 * workload.width * (workload.width + kv) + 3 * workload.width * workload.mlp)
    trunk, head = 2.0 * projections * tokens, 2.0 * workload.width * workload.vocab * answer_tokens
    decoded = (tokens - answer_tokens) // workload.samples + answer_tokens - workload.episodes
    return {
        "rollout": 2.0 * projections * decoded + head,
        "score": 4 * trunk + 2 * head,
        "update": 3 * (2 * trunk + head),
    }[phase]


class PhaseFlops:
    """Counts the operations of an iteration by phase with `torch.utils.flop_counter`.

    PRODUCTS are those with weights (`mm`, `addmm`), ATTENTION are batched products and fused attention. An operation is
    a multiplication or an addition.

        with PhaseFlops() as counter:
            ...                        # the rollout
            counter.end_phase("rollout")

    Attributes:
        phases: phase to {PRODUCTS: operations, ATTENTION: operations}.
    """

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, int]] = {}
        self._counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self._other: Counter[str] = Counter()
        self._before: Counter[str] = Counter()

    def __enter__(self) -> PhaseFlops:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)

    def add(self, kind: str, flops: int) -> None:
        """Count operations that torch does not see, as those of a C++ kernel; `kind`: PRODUCTS or ATTENTION."""
        self._other[kind] += flops

    def end_phase(self, phase: str) -> None:
        """Give all that was counted since the last end of a phase to `phase`."""
        total = Counter(self._other)
        for op, flops in self._counter.get_flop_counts().get("Global", {}).items():
            total[PRODUCTS if op in _WEIGHT_PRODUCTS else ATTENTION] += flops
        counts = self.phases.setdefault(phase, {PRODUCTS: 0, ATTENTION: 0})
        for kind in counts:
            counts[kind] += total[kind] - self._before[kind]
        self._before = total


def attended_pairs(queries: int, keys: int, is_causal: bool) -> int:
    """Return the pairs of query and key; if causal, query i attends to the first i + 1 keys."""
    if not is_causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def _addmm(added: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the operations of torch's fused attention on CPUs, which its counter does not know (2.13)."""
    is_causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
    pairs = attended_pairs(query[-2], key[-2], is_causal)
    return 2 * query[0] * query[1] * pairs * (query[-1] + value[-1])


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the operations of its backward pass: the scores again, and four products."""
    is_causal = kwargs.get("is_causal", args[3] if len(args) > 3 else False)
    pairs = attended_pairs(query[-2], key[-2], is_causal)
    return 2 * query[0] * query[1] * pairs * (3 * query[-1] + 2 * value[-1])


_WEIGHT_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten._scaled_mm}
_FORMULAS = {
    aten.addmm_: _addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
