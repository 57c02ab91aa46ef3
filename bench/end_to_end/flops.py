"""Matrix products of an iteration: the floating-point operations that they need, and the rate of the machine."""

from __future__ import annotations

import subprocess
import sys

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


def peak_gflops(dtype: str, threads: int) -> float:
    """Return the fastest rate of torch's matrix product now, in GFLOP/s, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, dtype]
    environment = {"OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def useful_flops(workload: Workload, phase: str, tokens: int, answer_tokens: int) -> float:
    """Return the operations of the matrix products that a phase needs, without padding and without attention's scores.

        forward of a trunk: 2 * parameters of its projections * tokens
        LM head:            2 * width * vocabulary * answer tokens

    Args:
        workload: the sizes.
        phase: "score": forward passes of actor, reference, critic and reward model. "update": forward and backward
            passes, three forward passes' worth, of actor and critic.
        tokens: of prompts and answers.
        answer_tokens: of answers.
    """
    kv = workload.width // workload.heads * workload.kv_heads
    projections = workload.layers * (2 * workload.width * (workload.width + kv) + 3 * workload.width * workload.mlp)
    trunk, head = 2.0 * projections * tokens, 2.0 * workload.width * workload.vocab * answer_tokens
    return {"score": 4 * trunk + 2 * head, "update": 3 * (2 * trunk + head)}[phase]
