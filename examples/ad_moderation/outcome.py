"""The outcome of the demo: answers to the test ads before and after PPO, the figures of every stage, the report.

Settings were tuned on the validation ads; only this module reads the test ads.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ad_moderation.checker import check
from icegrt import PPOConfig, RewardConfig, SFTConfig
from icegrt.data import EncodedDataset, ExampleEncoder, PromptEncoder, open_rows
from icegrt.report.page import write_ppo_report
from icegrt.training.sft_loss import heldout_loss, pack_examples
from staged_run.assessment import PPOOutcome, assess_answers, example_rows, gain, per_prompt, read_json

TEST_ADS = 512
SAMPLES = 3
FIXED_EXAMPLES = RANDOM_EXAMPLES = 10


def assess_both(trainer: Any, data: Path) -> dict[str, Any]:
    """Return scored sampled and greedy answers to the test ads, and the loss on held-out general text, as JSON."""
    tokenizer, context = trainer.tokenizer, trainer.actor.model.architecture.context_length
    prompts = EncodedDataset(open_rows(data / "prompts_test.jsonl", TEST_ADS), PromptEncoder(tokenizer, context))
    general = EncodedDataset(open_rows(data / "general_test.jsonl"), ExampleEncoder(tokenizer, context))
    batches = pack_examples(general, trainer.config.token_budget, trainer.cluster.share)
    general_loss = heldout_loss(trainer.actor, batches, trainer.chunk_rows, trainer.cluster)
    return {**assess_answers(trainer, prompts, SAMPLES), "general_loss": general_loss}


class Outcome(PPOOutcome):
    """The figures of a demo, from the files of its stages in `out`."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, open_rows(out / "data" / "prompts_test.jsonl", TEST_ADS))
        self.report = {
            "sft": read_json(out / "sft" / "summary.json"),
            "reward": read_json(out / "reward" / "summary.json"),
            "ppo": self._ppo(),
        }

    def write(self) -> None:
        """Write report.json, curves.png and report.html into the demo's folder."""
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
                "Total score: PPO's weighted sum, with the reward model's part normalized on its held-out data.",
            ],
            settings=settings,
        )

    def _total_score(self, answers: dict[str, list]) -> np.ndarray:
        """Return PPO's score of each answer, on the fixed scale of the statistics saved with the reward model."""
        statistics = read_json(self.out / "reward" / "model" / "score_statistics.json")["after"]
        c = self.config
        normalized = np.clip(np.array(answers["reward_model"]) / statistics["std"], -c.score_clip, c.score_clip)
        task, truncated = np.array(answers["task"]), np.array(answers["truncated"])
        score = c.reward_model_weight * normalized + c.reward_function_weight * task
        return score - c.missing_eos_penalty * truncated

    def _scores(self, document: dict[str, Any], mode: str, name: str) -> np.ndarray:
        answers = document[mode]
        values = self._total_score(answers) if name == "total" else answers[name]
        return per_prompt(values, answers)

    def _ppo(self) -> dict[str, Any]:
        # 1. scores before and after, with intervals
        figures: dict[str, Any] = {"test_ads": len(self.rows), "heldout_reward_name": "total score"}
        names = {
            ("sampled", "total"): "heldout_reward",
            ("sampled", "task"): "task_score",
            ("greedy", "task"): "greedy_task_score",
            ("sampled", "reward_model"): "reward_model_score",
        }
        for (mode, column), name in names.items():
            before, after = (self._scores(document, mode, column) for document in (self.before, self.after))
            figures |= gain(name, before, after)
        # 2. figures of the answers and of the run
        for when, document in (("before", self.before), ("after", self.after)):
            figures[f"general_loss_{when}"] = document["general_loss"]
        figures["kl_target_nats_per_response"] = self.config.kl_target_nats_per_response
        return figures | self.training_figures()

    def _examples(self) -> list[dict[str, Any]]:
        rows = example_rows(len(self.rows), FIXED_EXAMPLES, RANDOM_EXAMPLES)
        return [self._example(n, kind) for n, kind in rows]

    def _example(self, n: int, kind: str) -> dict[str, Any]:
        row, example = self.rows[n], {"kind": kind}
        for when, document in (("before", self.before), ("after", self.after)):
            text, truncated = document["greedy"]["text"][n], bool(document["greedy"]["truncated"][n])
            result = check(row, text, truncated)
            example |= {when: text, f"{when}_score": {"score": result.score, **result.parts}}
        return example | {"prompt": row["prompt"], "reference": row["response"]}

    def lines(self) -> list[str]:
        """Return the outcome as lines for a terminal: each figure with its requirement."""
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
            _gain(ppo, "heldout_reward", "total score, sampled", 0.0),
            _gain(ppo, "task_score", "checker, sampled", 0.05, least=0.08),
            _gain(ppo, "greedy_task_score", "checker, greedy", -0.02, least=0.0),
            (kl < 2 * target, f"KL {kl:.2f} nats per response (below twice the target of {target:g})"),
            (loss <= 0.05, f"general held-out loss {loss:+.1%} (at most +5%)"),
            (distinct >= 0.8, f"distinct answers {distinct:.2f}x those of SFT (at least 0.8x)"),
        ]
        lines = [f"SFT held-out loss {sft['heldout_loss_before']:.3f} -> {sft['heldout_loss_after']:.3f}"]
        lines += [f"{'ok   ' if passed else 'SHORT'} {text}" for passed, text in checks]
        lines.append(
            f"length {ppo['response_tokens_mean_before']:.1f} -> {ppo['response_tokens_mean_after']:.1f} tokens, "
            f"truncated {ppo['truncated_fraction_before']:.1%} -> {ppo['truncated_fraction_after']:.1%}"
        )
        return lines + [f"alarm: {alarm}" for alarm in ppo["alarms"]]


def _gain(ppo: dict[str, Any], name: str, label: str, floor: float, least: float | None = None) -> tuple[bool, str]:
    """Return whether the gain's interval lies above `floor`, and the gain is not below `least`, with a line of text."""
    low, high = ppo[f"{name}_gain_ci95"]
    before, after = ppo[f"{name}_before"], ppo[f"{name}_after"]
    wanted = f"interval above {floor:g}" + ("" if least is None else f", gain at least {least:g}")
    text = f"{label}: {before:.3f} -> {after:.3f}, gain {after - before:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    return low > floor and (least is None or after - before >= least), f"{text} ({wanted})"
