"""What came of the demo: test ads answered before and after PPO, the figures of every stage, the page.

Tuned on validation, reported on test: nothing else in the demo reads the test ads.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from ad_moderation.checker import check
from icegrt import PPOConfig, RewardConfig, SFTConfig
from icegrt.data import encode_examples, encode_prompts, read_rows
from icegrt.metrics import read_metrics
from icegrt.metrics.statistics import distinct_fraction, paired_bootstrap_ci95
from icegrt.report.page import write_ppo_report
from icegrt.training.sft_loss import heldout_loss, pack_examples

TEST_ADS = 512
SAMPLES = 3
FIXED_EXAMPLES = RANDOM_EXAMPLES = 10


def assess_both(trainer: Any, data: Path) -> dict[str, Any]:
    """Sampled and greedy answers to the test ads, scored, and the loss on held-out general text, as JSON."""
    tokenizer, context = trainer.tokenizer, trainer.actor.model.architecture.context_length
    prompts = encode_prompts(tokenizer, read_rows(data / "prompts_test.jsonl", TEST_ADS), context)
    general = encode_examples(tokenizer, read_rows(data / "general_test.jsonl"), context)
    batches = pack_examples(general, trainer.config.token_budget, trainer.cluster.share)
    return {
        "sampled": _columns(trainer.assess(prompts, SAMPLES)),
        "greedy": _columns(trainer.assess(prompts, 1, greedy=True)),
        "general_loss": heldout_loss(trainer.actor, batches, trainer.chunk_rows, trainer.cluster),
    }


def _columns(assessment: Any) -> dict[str, list]:
    return {
        "prompt": [r.prompt_index for r in assessment.responses],
        "text": [s.text for s in assessment.samples],
        "task": assessment.function_N.tolist(),
        "reward_model": assessment.reward_model_N.tolist(),
        "kl": None if assessment.kl_N is None else assessment.kl_N.tolist(),
        "tokens": assessment.tokens_N.tolist(),
        "truncated": assessment.truncated_N.tolist(),
    }


class Outcome:
    """Reads what the stages left in `out` and puts it together."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.before, self.after = (_read(out / f"assessment_{when}.json") for when in ("before", "after"))
        self.config = PPOConfig.load(out / "ppo" / "config.yaml")
        self.steps = [row for row in read_metrics(out / "ppo") if row["kind"] == "ppo"]
        self.rows = [row.data for row in read_rows(out / "data" / "prompts_test.jsonl", TEST_ADS)]
        self.report = {
            "sft": _read(out / "sft" / "summary.json"),
            "reward": _read(out / "reward" / "summary.json"),
            "ppo": self._ppo(),
        }

    def write(self) -> None:
        """report.json, curves.png and report.html in the demo's folder."""
        settings = [
            stage.load(self.out / stage.section / "config.yaml") for stage in (SFTConfig, RewardConfig, PPOConfig)
        ]
        write_ppo_report(
            self.out,
            self.report,
            examples=self._examples(),
            title="Ad moderation: ICE-Instruct, ICE-Reward and PPO",
            notes=[
                f"{TEST_ADS} test ads, whose templates and values occur in no training row; {SAMPLES} sampled answers "
                "and one greedy answer each, before and after PPO. Task score: the rule checker's, from 0 to 1. "
                "Reward: what PPO is paid, with the reward model's score on its held-out scale.",
            ],
            settings=settings,
        )

    def _reward(self, columns: dict[str, list]) -> np.ndarray:
        """What PPO is paid for an answer, on one fixed scale: the statistics saved with the reward model."""
        saved = _read(self.out / "reward" / "model" / "score_statistics.json")["after"]
        c = self.config
        normalised = np.clip(np.array(columns["reward_model"]) / saved["std"], -c.score_clip, c.score_clip)
        task, truncated = np.array(columns["task"]), np.array(columns["truncated"])
        paid = c.reward_model_weight * normalised + c.reward_function_weight * task
        return paid - c.missing_eos_penalty * truncated

    def _per_prompt(self, values: Any, columns: dict[str, list]) -> np.ndarray:
        prompt = np.array(columns["prompt"])
        return np.bincount(prompt, weights=np.asarray(values, float)) / np.bincount(prompt)

    def _pair(self, mode: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        both = []
        for document in (self.before, self.after):
            columns = document[mode]
            both.append(self._per_prompt(self._reward(columns) if name == "reward" else columns[name], columns))
        return both[0], both[1]

    def _ppo(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"test_ads": len(self.rows), "iterations": len(self.steps)}
        figures["heldout_reward_name"] = "what PPO is paid"
        names = {
            ("sampled", "reward"): "heldout_reward",
            ("sampled", "task"): "task_score",
            ("greedy", "task"): "greedy_task_score",
            ("sampled", "reward_model"): "reward_model_score",
        }
        for (mode, column), name in names.items():
            before, after = self._pair(mode, column)
            figures[f"{name}_before"], figures[f"{name}_after"] = float(before.mean()), float(after.mean())
            figures[f"{name}_gain_ci95"] = list(paired_bootstrap_ci95(before, after))
        for when, document in (("before", self.before), ("after", self.after)):
            sampled = document["sampled"]
            figures[f"general_loss_{when}"] = document["general_loss"]
            figures[f"distinct_fraction_{when}"] = distinct_fraction(sampled["text"])
            figures[f"response_tokens_mean_{when}"] = float(np.mean(sampled["tokens"]))
            figures[f"truncated_fraction_{when}"] = float(np.mean(sampled["truncated"]))
        figures["kl_nats_per_response"] = float(np.mean(self.after["sampled"]["kl"]))
        figures["kl_target_nats_per_response"] = self.config.kl_target_nats_per_response
        figures["response_tokens_per_second"] = float(
            np.median([step["response_tokens_per_second"] for step in self.steps])
        )
        figures["seconds_by_phase"] = self._seconds()
        figures["alarms"] = _read(self.out / "ppo" / "summary.json")["alarms"]
        return figures

    def _seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for step in self.steps:
            for phase, seconds in step["seconds_by_phase"].items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return totals

    def _examples(self) -> list[dict[str, Any]]:
        others = random.Random(len(self.rows)).sample(range(FIXED_EXAMPLES, len(self.rows)), RANDOM_EXAMPLES)
        chosen = [(n, "fixed") for n in range(FIXED_EXAMPLES)] + [(n, "random") for n in sorted(others)]
        return [self._example(n, kind) for n, kind in chosen]

    def _example(self, n: int, kind: str) -> dict[str, Any]:
        row, example = self.rows[n], {"kind": kind}
        for when, document in (("before", self.before), ("after", self.after)):
            text, truncated = document["greedy"]["text"][n], bool(document["greedy"]["truncated"][n])
            result = check(row, text, truncated)
            example |= {when: text, f"{when}_score": {"score": result.score, **result.parts}}
        return example | {"prompt": row["prompt"], "reference": row["response"]}

    def lines(self) -> list[str]:
        """The outcome for a terminal: each figure beside what it is held to."""
        sft, reward, ppo = self.report["sft"], self.report["reward"], self.report["ppo"]
        baseline = reward["baseline_accuracy"]
        loss = ppo["general_loss_after"] / ppo["general_loss_before"] - 1
        distinct = ppo["distinct_fraction_after"] / ppo["distinct_fraction_before"]
        kl, target = ppo["kl_nats_per_response"], ppo["kl_target_nats_per_response"]
        checks = [
            (
                reward["heldout_accuracy"] >= max(0.75, baseline + 0.10),
                f"reward model: accuracy {reward['heldout_accuracy']:.3f} on {reward['heldout_pairs']} held-out untied "
                f"pairs ({reward['heldout_tie_fraction']:.0%} ties); best single feature, "
                f"{reward['baseline_feature']}: {baseline:.3f} (at least 0.75, and 0.10 above it)",
            ),
            _gain(ppo, "heldout_reward", "reward, sampled", 0.0),
            _gain(ppo, "task_score", "checker, sampled", 0.0),
            _gain(ppo, "greedy_task_score", "checker, greedy", -0.02),
            (kl < 2 * target, f"KL {kl:.2f} nats per response (below twice the target of {target:g})"),
            (loss <= 0.05, f"general held-out loss {loss:+.1%} (at most +5%)"),
            (distinct >= 0.8, f"distinct answers {distinct:.2f}x those of SFT (at least 0.8x)"),
        ]
        lines = [f"SFT held-out loss {sft['heldout_loss_before']:.3f} -> {sft['heldout_loss_after']:.3f}"]
        lines += [f"{'ok   ' if good else 'SHORT'} {text}" for good, text in checks]
        lines.append(
            f"length {ppo['response_tokens_mean_before']:.1f} -> {ppo['response_tokens_mean_after']:.1f} tokens, "
            f"truncated {ppo['truncated_fraction_before']:.1%} -> {ppo['truncated_fraction_after']:.1%}"
        )
        return lines + [f"alarm: {alarm}" for alarm in ppo["alarms"]]


def _gain(ppo: dict[str, Any], name: str, label: str, floor: float) -> tuple[bool, str]:
    low, high = ppo[f"{name}_gain_ci95"]
    before, after = ppo[f"{name}_before"], ppo[f"{name}_after"]
    text = f"{label}: {before:.3f} -> {after:.3f}, 95% interval of the gain {low:+.3f} to {high:+.3f} (above {floor:g})"
    return low > floor, text


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
