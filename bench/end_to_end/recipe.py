"""The configuration of icegrt and of the reference path for a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.end_to_end.workloads import EOS, RECIPE, Workload
from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig, RunConfig, SamplingConfig

ITERATIONS = 10_000


def ppo_config(workload: Workload, folder: str | Path, dtype: str = "fp32", **changes: Any) -> PPOConfig:
    """Return the configuration; an iteration is one pass of one minibatch.

    Args:
        workload: sets prompts, samples and the end of answers.
        folder: of the run.
        dtype: "fp32" or "bf16".
        changes: further keys.
    """
    optimizer = OptimizerConfig(lr=RECIPE["lr"], schedule="constant")
    settings = {
        "iterations": ITERATIONS,
        "prompts_per_iteration": workload.prompts,
        "samples_per_prompt": workload.samples,
        "ppo_epochs": 1,
        "minibatches": 1,
        "eval_every": 0,
        "checkpoint_every": 10**6,
        "kl_coef": RECIPE["kl_coef"],
        "gamma": RECIPE["gamma"],
        "lam": RECIPE["lam"],
        "clip_low": RECIPE["clip"],
        "clip_high": RECIPE["clip"],
        "value_clip": RECIPE["value_clip"],
        "score_scale": False,
        "score_clip": 0.0,
        "sampling": SamplingConfig(
            max_new_tokens=workload.answer_tokens, stop_token_ids=[i for i in workload.stop_ids if i != EOS]
        ),
        "optimizer": optimizer,
        "critic": CriticConfig(optimizer=optimizer),
        "run": RunConfig(dir=str(folder), dtype=dtype),
    }
    return PPOConfig(**(settings | changes))
