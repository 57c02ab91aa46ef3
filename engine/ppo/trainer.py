"""PPO with actor, reference, reward and critic: one iteration draws, rolls out, plans, scores, shapes and updates."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from icegrt.config import PPOConfig
from icegrt.data import (
    BlendedDataset,
    EncodedDataset,
    ExampleEncoder,
    Prompt,
    PromptEncoder,
    PromptSampler,
    open_rows,
    report_lengths,
    stop_ids,
)
from icegrt.data.training_data import encode_sources
from icegrt.errors import ConfigError, RewardError, RunError
from icegrt.kernels import masked_moments
from icegrt.metrics import Evaluation, PPOStep, rollout_path
from icegrt.metrics.alarms import Alarms
from icegrt.model.build import check_parallelism
from icegrt.model.hf import exporter
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.score_statistics import saved_statistics
from icegrt.model.hf.writer import save_pretrained
from icegrt.ppo.batch_plan import BatchPlan, plan_batches
from icegrt.ppo.evaluator import EvaluationResult, Evaluator
from icegrt.ppo.experience import Experience, shape
from icegrt.ppo.kl_controller import kl_controller
from icegrt.ppo.metrics import ppo_step, write_rollouts
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.ppo.rewards import RewardComputer, RewardModel, RewardOutputs
from icegrt.ppo.scores import RunningScoreNormalizer, RunningScoreNormalizers, Scores, total_scores
from icegrt.ppo.scoring import score_logprobs, score_values
from icegrt.ppo.setup import build_roles, check_config, check_critic, check_lengths
from icegrt.ppo.update import UpdateOutcome, Updater
from icegrt.report.page import write_run_report
from icegrt.rewards.sources import RewardSourceGroup
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.samples import sample_of
from icegrt.rollout.types import Response, Sampling
from icegrt.training.trainer import Trainer, resolve_chunk_rows, tokenizer_for, write_json
from icegrt.utils.console import print_info, warn

# Steps in a row that may be skipped for a loss or gradient that is not finite.
_MOST_SKIPPED = 3


class PPOTrainer(Trainer):
    """Iterating yields `PPOStep`; `train()` runs to the end, `evaluate()` scores held-out prompts.

    actor, reference, critic: path or `transformers` model. reward: a path or model, a function, the URL of an HTTP
    scorer, or a list of these, each alone or as (source, weight).
    prompts, eval_prompts: an iterable of dicts or a `datasets.Dataset`. All default to what the configuration names.
    """

    unit = "iterations"
    reward_sources: RewardSourceGroup | None = None

    def __init__(
        self,
        config: PPOConfig,
        actor: Any = None,
        tokenizer: Any = None,
        reward: Any = None,
        prompts: Any = None,
        *,
        reference: Any = None,
        critic: Any = None,
        eval_prompts: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        check_config(config)
        actor = actor if actor is not None else config.actor
        prompts = prompts if prompts is not None else config.prompts
        for name, given in (("actor", actor), ("prompts", prompts)):
            if isinstance(given, str) and not given:
                raise ConfigError(f"ppo.{name} is empty; it must be given")
        composition = RewardComposition.of(config, reward)
        check_critic(config, composition, critic)
        super().__init__(config, callbacks)
        try:
            self._set_up(
                actor, tokenizer, composition, prompts, reference or config.reference or None, critic, eval_prompts
            )
        except BaseException:
            self.close()
            raise

    # -- setting up ------------------------------------------------------------------------------------------------

    def _set_up(
        self, actor, tokenizer, composition: RewardComposition, prompts, reference, critic, eval_prompts
    ) -> None:
        config = self.config
        pretrained = HFCheckpointReader(actor)
        check_parallelism(
            pretrained.architecture
        )  # before workers are started and data is encoded, which may take long
        self.reward_sources = composition.sources
        self.reward_sources.start()
        self.tokenizer = tokenizer_for(tokenizer, actor, pretrained.architecture)
        self.sampling = Sampling.of(config.sampling, self.run.seed)
        self.stop_ids = stop_ids(
            self.tokenizer, pretrained.architecture.hf_config, pretrained.folder, config.sampling.stop_token_ids
        )
        context = pretrained.architecture.context_length
        self.prompts = self._encode("prompts", prompts, context)
        held_out = eval_prompts if eval_prompts is not None else config.eval_prompts
        has_held_out = not (isinstance(held_out, str) and not held_out)
        self.eval_prompts = self._encode("eval_prompts", held_out, context, config.eval_limit) if has_held_out else []
        self.roles_by_name = build_roles(config, pretrained, reference, composition, critic)
        check_lengths(config, [p for p in (self.prompts, self.eval_prompts) if p], self.roles_by_name)
        self.actor, self.critic = self.roles_by_name["actor"], self.roles_by_name["critic"]
        self.roles = [self.actor, self.critic]
        models = [RewardModel(e.name, e.weight, self.roles_by_name[role]) for role, e in composition.models.items()]
        self.normalizers = RunningScoreNormalizers(
            {e.name: RunningScoreNormalizer(config, saved_statistics(e.model)) for e in composition.models.values()}
        )
        if critic is None and config.critic.init == "reward":
            # The reward model's head speaks in raw scores, returns are on the scale of what is paid.
            self.critic.model.scale_head(models[0].weight * self.normalizers[models[0].name].factor)
        self.total_steps = config.iterations
        updates = (config.iterations - config.critic.warmup_iterations) * config.ppo_epochs * config.minibatches
        self.actor.learn(config.optimizer, max(1, updates))
        self.critic.learn(config.critic.optimizer, config.iterations * config.critic_epochs * config.minibatches)
        self.chunk_rows = resolve_chunk_rows(config.chunk_rows, pretrained.architecture)
        self.engine = RolloutEngine(
            self.actor.model, self.tokenizer, max_batch=config.max_batch, stop_token_ids=self.stop_ids
        )
        self.reward_computer = RewardComputer(models, self.reward_sources, self.tokenizer)
        self.evaluator = Evaluator(
            config, self.engine, self.reward_computer, self.actor, self.roles_by_name["reference"], self.chunk_rows
        )
        self.kl = kl_controller(config)
        self.order = PromptSampler(len(self.prompts), self.run.seed)
        self.ptx = self._ptx_blend()
        self.updater = Updater(config, self.actor, self.critic, self.chunk_rows, self.cluster.data_group)
        self.alarms, self.alarm_messages = Alarms(config), []
        self.first_evaluation: Evaluation | None = None
        self._skipped_in_a_row = {"actor": 0, "critic": 0}
        self._seconds: dict[str, float] = defaultdict(float)
        self._probe_reward()
        self._restore_and_open_log(self.tokenizer, chunk_rows=self.chunk_rows)
        if self.done_steps == 0 and self.eval_prompts:
            self.first_evaluation = self.evaluate()
            self.alarms.observe(self.first_evaluation)
            self.log(self.first_evaluation)

    def _encode(self, key: str, source: Any, context: int, limit: int = 0) -> EncodedDataset[Prompt]:
        answer = self.config.sampling.max_new_tokens
        if answer >= context:
            raise ConfigError(f"ppo.sampling.max_new_tokens {answer} leaves no room for a prompt: context {context}")
        why = f"context {context} - max_new_tokens {answer} leaves {context - answer}"
        encoder = PromptEncoder(self.tokenizer, context - answer, self.config.truncation, limit_reason=why)
        rows = open_rows(source, limit, input_key=self.config.input_key)
        prompts = EncodedDataset(rows, encoder, str(source) if isinstance(source, (str, Path)) else key)
        report_lengths([prompts])
        return prompts

    def _ptx_blend(self) -> BlendedDataset | None:
        if not self.config.ptx_coef:
            return None
        context = min(self.actor.model.architecture.context_length, self.config.token_budget)
        encoder = ExampleEncoder(self.tokenizer, context, stop_ids=self.stop_ids)
        return BlendedDataset(encode_sources("ppo.ptx_data", self.config.ptx_data, None, encoder), self.run.seed)

    def _probe_reward(self) -> None:
        # A reward function that fails must fail now, not after the first rollout of an expensive run.
        if not self.reward_sources:
            return
        few = self.prompts[:2]
        sampling = dataclasses.replace(self.sampling, max_new_tokens=min(4, self.sampling.max_new_tokens))
        responses = self.engine.generate([p.tokens for p in few], 1, sampling)
        self.reward_sources.probe([sample_of(self.tokenizer, r, few[r.prompt_index]) for r in responses])

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "kl": self.kl.state(),
            "scalings": self.normalizers.state(),
            "order": self.order.state(),
            "ptx": self.ptx.state() if self.ptx is not None else None,
            "alarms": self.alarms.state(),
            "alarm_messages": self.alarm_messages,
            "skipped_in_a_row": self._skipped_in_a_row,
            "chunk_rows": self.chunk_rows,
        }

    def use_chunk_rows(self, chunk_rows: int) -> None:
        """Takes a checkpoint's choice, for scoring, evaluation and update alike."""
        self.chunk_rows = self.evaluator.chunk_rows = self.updater.chunk_rows = chunk_rows

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.load_state(state["kl"])
        # An older checkpoint has moments without a name: those of its only reward model.
        nameless = dict.fromkeys([*self.normalizers][:1], state.get("scaling"))
        self.normalizers.load_state(state.get("scalings", nameless))
        self.order.load_state(state["order"])
        if self.ptx is not None and state["ptx"] is not None:  # None: it was not mixed in until now
            self.ptx.load_state(state["ptx"])
        self.alarms.load_state(state["alarms"])
        self.alarm_messages = list(state["alarm_messages"])
        self._skipped_in_a_row = dict(state["skipped_in_a_row"])
        if state["chunk_rows"] != self.chunk_rows:
            raise ConfigError(
                f"ppo.chunk_rows is {self.chunk_rows}, the checkpoint was made with {state['chunk_rows']}; "
                "other chunks round differently, so set it to that"
            )

    # -- an iteration ----------------------------------------------------------------------------------------------

    def step(self) -> PPOStep:
        """One PPO iteration; returns its metrics, logged, with alarms raised in words."""
        iteration = self.done_steps + 1
        prompts, responses = self._roll_out(iteration)
        with self._timed("plan"):
            plan = plan_batches(
                responses,
                self.config.token_budget,
                self.config.minibatches,
                share=self.cluster.share,
                seed=(self.run.seed << 32) ^ iteration,
            )
        experience, rewards, all_rewards = self._score(plan, prompts)
        self.notify("on_scores", experience)
        with self._timed("update"):
            outcome = self.updater.run(experience, self.kl.coef, iteration, self._draw_ptx(iteration))
        kl_coef = self.kl.coef
        kl = masked_moments(experience.shaped.kl_N.double(), ~rewards.dropped_N, group=self.cluster.data_group)
        self.kl.update(float(kl.mean), int(kl.count))
        write_rollouts(rollout_path(self.dir, iteration), iteration, self.run.seed, experience, all_rewards)
        self.done_steps = iteration
        self._stop_if_broken(outcome)
        row = self._finish_iteration(iteration, experience, rewards, outcome, kl_coef)
        self.notify("on_update", row)
        return row

    def _roll_out(self, iteration: int) -> tuple[list[Prompt], list[Response]]:
        config = self.config
        with self._timed("rollout"):
            prompts = [self.prompts[i] for i in self.order.draw(config.prompts_per_iteration)]
            first_id = (iteration - 1) * config.prompts_per_iteration * config.samples_per_prompt
            responses = self.engine.generate(
                [p.tokens for p in prompts], config.samples_per_prompt, self.sampling, first_sequence_id=first_id
            )
        self.notify("on_rollout", responses)
        return prompts, responses

    def _score(self, plan: BatchPlan, prompts: list[Prompt]) -> tuple[Experience, RewardOutputs, RewardOutputs]:
        """Also what the sources said: of this rank's responses, and of everyone's."""
        config = self.config
        with self._timed("score"):
            # First of all: what is dropped must be masked alike in scoring and update, or their bits would differ.
            all_rewards = self.reward_computer(plan, prompts)
            self._stop_if_all_are_dropped(all_rewards)
            rewards = all_rewards.select(plan.rank_assignment[plan.rank])
            plan = plan.with_masked(rewards.dropped_N)
            batches, temperature = plan.batches, config.sampling.temperature
            old_A, entropy_A = score_logprobs(self.actor, batches, temperature, self.chunk_rows, entropy=True)
            ref_A, _ = score_logprobs(self.roles_by_name["reference"], batches, temperature, self.chunk_rows)
            value_A, last_value_N = score_values(self.critic, batches)
        with self._timed("shape"):
            scores = self._total(plan, rewards)
            rewards_A = rewards.token_reward_A
            shaped = shape(config, self.kl.coef, plan, scores, old_A, ref_A, value_A, last_value_N, rewards_A)
            moments = shaped.moments.reduce(self.cluster.data_group)
        return Experience(plan, scores, old_A, entropy_A, ref_A, value_A, shaped, moments), rewards, all_rewards

    def _total(self, plan: BatchPlan, rewards: RewardOutputs) -> Scores:
        for model in rewards.models:
            self.normalizers[model.name].update(model.score_N, self.cluster.data_group)
        truncated_N = torch.tensor([float(r.truncated) for r in plan.local_responses])
        dropped_N = rewards.dropped_N
        return total_scores(
            self.config, self.normalizers, rewards.models, rewards.source_total_N, truncated_N, dropped_N
        )

    def _stop_if_all_are_dropped(self, rewards: RewardOutputs) -> None:
        kept = masked_moments((~rewards.dropped_N).double(), ~rewards.dropped_N, group=self.cluster.data_group)
        if not float(kept.count):
            error = next((e for source in rewards.sources for e in source.errors if e), "")
            raise RewardError(f"every response of an iteration was dropped, so there is nothing to learn from: {error}")

    def _draw_ptx(self, iteration: int) -> list[list[Any]]:
        if self.ptx is None or iteration <= self.config.critic.warmup_iterations:
            return []
        batches = self.ptx.batches(self.config.ptx_sequences)
        steps = self.config.ppo_epochs * self.config.minibatches
        return [[self.ptx.item(pair) for pair in next(batches)] for _ in range(steps)]

    def _finish_iteration(
        self, iteration: int, experience: Experience, rewards: RewardOutputs, outcome: UpdateOutcome, kl_coef: float
    ) -> PPOStep:
        config, evaluation = self.config, None
        if self.eval_prompts and (iteration == self.total_steps or _due(iteration, config.eval_every)):
            with self._timed("evaluate"):
                evaluation = self.evaluate()
        row = ppo_step(
            iteration, experience, rewards, outcome, kl_coef, dict(self._seconds), evaluation, self.cluster.data_group
        )
        self._seconds.clear()
        self.log(row)
        for message in self.alarms.check(row):
            self.alarm_messages.append(f"iteration {iteration}: {message}")
            warn(self.alarm_messages[-1])
        # Last, so that the checkpoint holds the alarms of this iteration too; a row beyond a checkpoint is dropped on
        # resume, a missing one would never come back. Its seconds are shown with the next iteration.
        if iteration == self.total_steps or _due(iteration, config.checkpoint_every):
            with self._timed("checkpoint"):
                self.save_checkpoint(quality=evaluation.score_mean if evaluation is not None else None)
        return row

    def _stop_if_broken(self, outcome: UpdateOutcome) -> None:
        for name, steps in (("actor", outcome.actor), ("critic", outcome.critic)):
            for step in steps:
                self._skipped_in_a_row[name] = self._skipped_in_a_row[name] + 1 if step.skipped else 0
                if self._skipped_in_a_row[name] >= _MOST_SKIPPED:
                    raise RunError(
                        f"{_MOST_SKIPPED} optimizer steps in a row of the {name} had a loss or gradient that is not "
                        "finite; lower its learning rate, and resume from the last checkpoint"
                    )

    @contextlib.contextmanager
    def _timed(self, phase: str):
        started = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - started

    # -- evaluating and finishing ----------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Sampled answers to the held-out prompts, scored as in training."""
        if not self.eval_prompts:
            raise ConfigError("nothing to evaluate on: set ppo.eval_prompts")
        return self.assess(self.eval_prompts).evaluation(self.done_steps)

    def assess(self, prompts: Sequence[Prompt], samples: int = 1, *, greedy: bool = False) -> EvaluationResult:
        """Answers to `prompts` with every score and, where they are sampled, KL, response by response."""
        return self.evaluator(prompts, self.normalizers, samples, greedy=greedy)

    def describe(self, step: PPOStep) -> dict[str, float]:
        shown = {"score": step.score_mean, "kl": step.kl_nats_per_response}
        if step.function_score_mean is not None:
            shown["function"] = step.function_score_mean
        return shown

    def save_pretrained(self, out: str | Path) -> Path:
        """Write the actor as a Hugging Face checkpoint."""
        return save_pretrained(
            exporter.export_tensors(self.actor.model, self.dtype),
            self.actor.model.architecture,
            out,
            classifier=False,
            dtype=self.run.dtype,
            tokenizer=self.tokenizer,
        )

    def close(self) -> None:
        """As every trainer; and end the reward functions' worker processes."""
        if self.reward_sources is not None:
            self.reward_sources.close()
            self.reward_sources = None
        super().close()

    def finish(self) -> dict[str, Any]:
        """The actor under `<run.dir>/model`, the page of the run, and what alarms were raised."""
        self.write_model()
        summary = {"iterations": self.done_steps, "alarms": self.alarm_messages}
        write_json(self.dir / "summary.json", summary)
        if self.cluster.is_main:
            write_run_report(self.dir, config=self.config)
        return summary


def _due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0


def run(config: PPOConfig) -> None:
    """The command: train to the end and say where everything is."""
    with PPOTrainer(config) as trainer:
        trainer.train()
        print_info(f"actor: {trainer.dir / 'model'}")
        print_info(f"report: {trainer.dir / 'report.html'}")
