"""Value calibration: what the critic's values lack of the returns, by token position and by response length.

    bias = mean of (value - return)        explained variance = 1 - var(value - return) / var(return)

Both are formed from sums and counts in buckets, which add up over ranks and iterations. Returns are those at the lambda
that the critic learns, and at lambda 1: the rewards that followed, without the critic's own values in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import shaped_gae
from icegrt.metrics import calibration_path
from icegrt.ppo.experience import Experience
from icegrt.utils.console import warn
from icegrt.utils.files import write_text_atomic

SUMS = ("count", "return_sum", "return_sq_sum", "error_sum", "error_sq_sum")
# Buckets per doubling: lengths differ by less than positions.
PER_DOUBLING = {"position": 2, "length": 4}

# Legend: A, this rank's actions; N, its responses; R, actions with a return; B, buckets.


def bucket_starts(longest: int, per_doubling: int) -> list[int]:
    """Return the first number of each bucket: 1 and further rounded powers of 2^(1 / per_doubling), up to `longest`."""
    steps = range(math.floor(per_doubling * math.log2(max(longest, 1))) + 1)
    return sorted({math.ceil(2 ** (step / per_doubling)) for step in steps})


def value_calibration(
    config: PPOConfig, experience: Experience, last_value_N: Tensor, cluster: Cluster
) -> list[dict[str, Any]]:
    """Return the tables of an iteration, reduced over ranks. Collective; the host waits for the device twice.

    Args:
        config: of the iteration: gamma, the lambda of the returns, the unit and the longest response are read.
        experience: this rank's responses, with values.
        last_value_N: [N], after every response's last token.
        cluster: the ranks.

    Returns:
        A table for each lambda and axis ("position": of the token in its response, from 1; "length": counted tokens of
        the response): `lambda`, `by`, `first`, the first number of each bucket, and the sums of `SUMS` by bucket. The
        error is value - return. Numbers beyond the last bucket count in it.
    """
    plan, shaped = experience.plan, experience.shaped
    # 1. One copy to the host.
    value_A, return_A, reward_A, last_value_N = (
        x.double() for x in fetch((experience.value_A, shaped.return_A, shaped.reward_A, last_value_N))
    )
    returns = {config.value_lambda: return_A}
    if config.value_lambda != 1.0:
        bootstrap_N = torch.where(plan.truncated_N, last_value_N, 0.0) if config.bootstrap_truncated else None
        returns[1.0] = shaped_gae(
            torch.zeros_like(last_value_N),
            value_A,
            torch.zeros_like(value_A),
            None,
            plan.cu_actions,
            kl_coef=0.0,
            gamma=config.gamma,
            lam=1.0,
            unit=config.advantage_unit,
            bootstrap_N=bootstrap_N,
            mask_A=plan.mask_A,
            token_reward_A=reward_A,
        ).return_A
    # 2. The bucket of each action with a return.
    counts_A = plan.turn_starts_A if config.advantage_unit == "turn" else plan.mask_A
    index_R = torch.arange(value_A.numel()) if counts_A is None else counts_A.nonzero().squeeze(1)
    cu_actions, lengths_N = plan.cu_actions.long(), plan.cu_actions.diff().long()
    axes = {
        "position": torch.arange(value_A.numel()) - cu_actions[:-1].repeat_interleave(lengths_N) + 1,
        "length": plan.counted_lengths_N.repeat_interleave(lengths_N),
    }
    starts = {by: bucket_starts(config.sampling.max_new_tokens, per) for by, per in PER_DOUBLING.items()}
    # 3. Sums of all tables in one vector, and one collective.
    tables = [(lam, by) for lam in returns for by in axes]
    local = [_bucket_sums(value_A[index_R], returns[lam][index_R], axes[by][index_R], starts[by]) for lam, by in tables]
    totals = iter(cluster.all_reduce_sum(torch.cat([sums.flatten() for sums in local]).tolist()))
    return [
        {"lambda": lam, "by": by, "first": starts[by]}
        | {name: [next(totals) for _ in starts[by]] for name in SUMS}
        for lam, by in tables
    ]  # fmt: skip


def _bucket_sums(value_R: Tensor, return_R: Tensor, number_R: Tensor, starts: Sequence[int]) -> Tensor:
    """Return the sums of `SUMS` by bucket, [5, B] float64; `number_R` is what the buckets divide."""
    bucket_R = torch.bucketize(number_R, torch.tensor(starts), right=True) - 1
    error_R = value_R - return_R
    terms = (torch.ones_like(value_R), return_R, return_R.square(), error_R, error_R.square())
    return torch.stack([bucket_R.bincount(weights=x, minlength=len(starts)) for x in terms])


class CalibrationWriter:
    """Writes the tables of iterations into a run's folder; see `calibration_path`.

    A file that cannot be written is a warning, the first time: the run does not need it.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def write(
        self, run_dir: Path, iteration: int, tables: Sequence[dict[str, Any]], *, pretraining: bool = False
    ) -> None:
        """Write the tables of an iteration; pretraining: whether it is one of value pretraining."""
        path = calibration_path(run_dir, iteration)
        try:
            path.parent.mkdir(exist_ok=True)
            document = {"iteration": iteration, "pretraining": pretraining, "tables": list(tables)}
            write_text_atomic(path, json.dumps(document) + "\n")
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warn(f"{path}: not written ({error.strerror or error}); the run goes on, make room on the disk")
