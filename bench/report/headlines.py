"""The few comparisons that the README, the top of the page and the history show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.rows import LESS_WORK, Comparison, Row, cases, ours_of


@dataclass(frozen=True)
class Headline:
    """A comparison to show.

    Attributes:
        key: of the history, never reused.
        label: in words.
        bench: name of the file of rows.
        cases: the first that a device has is taken; sizes differ between CPUs and GPUs.
        against: pattern of alternatives, matched at the beginning; the best of them is shown.
        ours: icegrt's provider, if it is not the default one.
    """

    key: str
    label: str
    bench: str
    cases: tuple[str, ...]
    against: str = ""
    ours: str | None = None


HEADLINES = (
    Headline("ppo-uniform-fp32-trl", "PPO iteration, fp32, beside TRL", "ppo", ("uniform fp32",), "TRL"),
    Headline("ppo-uniform-bf16-trl", "PPO iteration, bf16, beside TRL", "ppo", ("uniform bf16",), "TRL"),
    Headline(
        "ppo-uniform-fp32-reference",
        "PPO iteration, fp32, beside plain PyTorch",
        "ppo",
        ("uniform fp32",),
        "reference, ",
    ),
    Headline(
        "ppo-long-tail-fp32-reference",
        "PPO iteration, long-tailed answers, fp32, beside plain PyTorch",
        "ppo",
        ("long-tail fp32",),
        "reference, ",
    ),
    Headline(
        "ppo-8-samples-fp32-trl",
        "PPO iteration, 8 samples a prompt, prompts shared, fp32",
        "ppo",
        ("8-samples fp32",),
        "TRL",
        "icegrt, prompts shared",
    ),
    Headline("rollout-tail", "rollout, long-tailed answers", "rollout_4x256", ("4x256 float32 long tail",)),
    Headline("rollout-tail-bf16", "rollout, long-tailed, bf16", "rollout_4x256", ("4x256 bfloat16 long tail",)),
    Headline("rollout-uniform", "rollout, answers of one length", "rollout_4x256", ("4x256 float32 uniform",)),
    Headline(
        "rollout-shared",
        "rollout, prompts shared by 8 samples",
        "rollout_4x256",
        ("4x256 float32 8 samples of 512",),
        "icegrt, each sample alone",
    ),
    Headline(
        "linear-ppo-loss",
        "PPO loss from the LM head, both ways",
        "linear_ppo_loss",
        ("A8192 V151936 H4096 bfloat16 both", "A2048 V32000 H512 float32 both"),
    ),
    Headline(
        "linear-logprobs",
        "log-probs from the LM head, both ways",
        "linear_logprobs",
        ("A8192 V151936 H4096 bfloat16 both", "A2048 V32000 H512 float32 both"),
    ),
    Headline("policy-loss", "PPO loss of given log-probs", "ppo_policy_loss", ("A1048576 both",)),
    Headline("gae", "GAE over ragged responses", "shaped_gae", ("1M ragged",)),
    Headline(
        "paged-attention",
        "decode attention over pages",
        "paged_attention",
        ("8B S64 ragged bfloat16", "135M S64 ragged float32"),
        "SDPA",
    ),
    Headline(
        "sample-tokens", "sampling of a step's tokens", "sample_tokens", ("N512 V152064 plain", "N128 V4096 plain")
    ),
    Headline("scheduler", "step of the block scheduler", "scheduler", ("1000 sequences, 100000 blocks",)),
)


def find(
    benches: Mapping[str, Sequence[Row]], headlines: Sequence[Headline] = HEADLINES
) -> list[tuple[Headline, Comparison]]:
    """Return the headlines that a device has rows for, each beside the best of its alternatives."""
    found = []
    for headline in headlines:
        comparison = _comparison(headline, benches.get(headline.bench, ()))
        if comparison is not None:
            found.append((headline, comparison))
    return found


def _comparison(headline: Headline, rows: Sequence[Row]) -> Comparison | None:
    groups = {case: group for (case, metric), group in cases(rows).items() if metric in ("time", "throughput")}
    group = next((groups[case] for case in headline.cases if case in groups), [])
    if headline.ours is None:
        ours = ours_of(group)
    else:
        ours = next((row for row in group if row["provider"] == headline.ours), None)
    if ours is None:
        return None
    alternatives = [
        Comparison(ours, row)
        for row in group
        if row is not ours
        and (headline.bench, row["provider"]) not in LESS_WORK
        and re.match(headline.against or r"(?!icegrt|ours|triton|cpp|chunked)", row["provider"])
    ]
    return min(alternatives, key=lambda comparison: comparison.quotient, default=None)
