"""PPO with actor, reference, reward models and critic: the loop over iterations."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icegrt.config import PPOConfig
from icegrt.data import Example, Prompt
from icegrt.data.types import Rows, TokenizerSource
from icegrt.distributed.pipeline import fetch
from icegrt.errors import ConfigError
from icegrt.metrics import PHASE_LABELS, Evaluation, PPOStep, rollout_path
from icegrt.metrics.alarms import Alarms
from icegrt.model.hf.reader import ModelSource
from icegrt.ppo.batch_plan import BatchPlan, plan_batches, stream_seed
from icegrt.ppo.calibration import CalibrationWriter, value_calibration
from icegrt.ppo.dynamic_sampling import Selection
from icegrt.ppo.evaluator import EvaluationResult
from icegrt.ppo.experience import Experience
from icegrt.ppo.inference import Inference, infer
from icegrt.ppo.inference_checks import check_logprobs, locate_reward_errors
from icegrt.ppo.memory_log import MemoryLog, MemoryPlan
from icegrt.ppo.metrics import moments_of, ppo_step, rollout_rows
from icegrt.ppo.pretraining import ValuePretraining
from icegrt.ppo.reward_sources import RewardArgument, RewardComposition
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.rollout_writer import RolloutWriter
from icegrt.ppo.sampling import ResponseSampler
from icegrt.ppo.scores import Scores
from icegrt.ppo.setup import PPOInputs, build_ppo, check_config, check_critic, check_positive_nll, probe_reward_sources
from icegrt.ppo.shaping import shape_experience, shape_scores
from icegrt.ppo.update import UpdateOutcome
from icegrt.ppo.value_reuse import learn_values
from icegrt.roles.role import StepOutcome
from icegrt.roles.skip_guard import SkipGuard
from icegrt.rollout.types import Response
from icegrt.training.trainer import Trainer, write_json
from icegrt.utils.console import print_info, warn
from icegrt.utils.trace import trace_range


class PPOTrainer(Trainer[PPOConfig, PPOStep]):
    """Trains an actor with PPO. Iterate it for one `PPOStep` per iteration, or call `train()`.

    Each input is the argument if it is not None, else the key of the configuration, else the default named below.

    Args:
        config: keys of the `ppo` section.
        actor: the policy to train; path or `transformers` model.
        tokenizer: default: the one in the actor's folder.
        reward: a path or model, a function, the URL of an HTTP scorer, or a list of these, each alone or as
            (source, weight).
        prompts: path, iterable of dicts or `datasets.Dataset`.
        reference: the policy that the KL is measured against; default: the actor as it starts.
        critic: path or model with a scalar head, of any size; default: as `critic.init` names it.
        eval_prompts: held-out prompts, in the form of `prompts`.
        callbacks: objects with any of the hooks of `Callback`.
    """

    unit = "iterations"
    length_key = "iterations"

    def __init__(
        self,
        config: PPOConfig,
        actor: ModelSource | None = None,
        tokenizer: TokenizerSource | None = None,
        reward: RewardArgument | None = None,
        prompts: Rows | None = None,
        *,
        reference: ModelSource | None = None,
        critic: ModelSource | None = None,
        eval_prompts: Rows | None = None,
        callbacks: Sequence[object] = (),
    ) -> None:
        check_config(config)
        actor = actor if actor is not None else config.actor
        prompts = prompts if prompts is not None else config.prompts
        for name, value in (("actor", actor), ("prompts", prompts)):
            if _is_empty(value):
                raise ConfigError(f"ppo.{name} is empty; it must be given")
        eval_prompts = eval_prompts if eval_prompts is not None else config.eval_prompts
        eval_prompts = None if _is_empty(eval_prompts) else eval_prompts
        rewards, reference = RewardComposition.of(config, reward), reference or config.reference or None
        critic = critic or (config.critic.model if config.has_critic else None) or None
        check_critic(config, rewards, critic)
        check_positive_nll(config, rewards)
        inputs = PPOInputs(actor, tokenizer, rewards, prompts, reference, critic, eval_prompts)
        self._memory_plan = MemoryPlan.read(config.memory_plan) if config.memory_plan else None
        super().__init__(config, callbacks, inputs=inputs)

    def _set_up(self, inputs: PPOInputs) -> None:
        self._resources.callback(inputs.rewards.sources.close)
        self._memory_log = MemoryLog(self._memory_plan, self.config, self.cluster) if self._memory_plan else None
        parts = self.components = build_ppo(self.config, inputs, self.cluster, self._resumed_chunk_rows)
        self.tokenizer, self.prompts, self.eval_prompts = parts.tokenizer, parts.prompts, parts.eval_prompts
        self.actor, self.critic = parts.actor, parts.critic
        self.roles = [parts.actor] if parts.critic is None else [parts.actor, parts.critic]
        self.chunk_rows = parts.scorer.chunk_rows
        self._sampler = ResponseSampler(self.config, parts, self.cluster, self._timed)
        self.pretraining = ValuePretraining(self.config)
        self.total_steps = self.config.iterations + self.pretraining.most_iterations()
        self.alarms = Alarms(self.config)
        self.alarm_messages: list[str] = []
        self._skip_guard = SkipGuard(*(role.name for role in self.roles))
        self._seconds: dict[str, float] = defaultdict(float)
        self._calibration_writer = CalibrationWriter()
        self._rollout_writer = RolloutWriter()
        self._resources.callback(self._rollout_writer.close)
        probe_reward_sources(parts)

    def _evaluate_at_start(self) -> None:
        if self.done_steps == 0 and self.eval_prompts:
            evaluation = self.evaluate()
            self.alarms.observe(evaluation)
            self.log(evaluation)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizers, as JSON."""
        parts = self.components
        return {
            "kl": parts.kl_controller.state(),
            "scalings": parts.normalizers.state(),
            "evaluation_scalings": parts.normalizers.frozen_state(),
            "order": parts.prompt_sampler.state(),
            "ptx": parts.ptx.state() if parts.ptx is not None else None,
            "alarms": self.alarms.state(),
            "alarm_messages": self.alarm_messages,
            "skipped_in_a_row": self._skip_guard.skipped_in_a_row,
            "chunk_rows": self.chunk_rows,
            "pretraining": self.pretraining.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`. Raises `ConfigError` for other reward models or another logit chunk size."""
        parts = self.components
        parts.kl_controller.load_state(state["kl"])
        # An older checkpoint has moments without a name: those of its only reward model.
        nameless = dict.fromkeys([*parts.normalizers][:1], state.get("scaling"))
        parts.normalizers.load_state(state.get("scalings", nameless))
        parts.normalizers.load_frozen_state(state.get("evaluation_scalings"))
        parts.prompt_sampler.load_state(state["order"])
        if parts.ptx is not None and state["ptx"] is not None:  # None: the saved run did not mix ptx in
            parts.ptx.load_state(state["ptx"])
        self.pretraining.load_state(state.get("pretraining"))
        self.total_steps = self.config.iterations + self.pretraining.most_iterations()
        self.alarms.load_state(state["alarms"])
        self.alarm_messages = list(state["alarm_messages"])
        self._skip_guard.skipped_in_a_row = dict(state["skipped_in_a_row"])
        if state["chunk_rows"] != self.chunk_rows:
            raise ConfigError(
                f"ppo.chunk_rows is {self.chunk_rows}, the checkpoint was made with {state['chunk_rows']}; "
                "other chunks round differently, so set it to that"
            )

    # -- an iteration ----------------------------------------------------------------------------------------------

    def step(self) -> PPOStep:
        """Run one PPO iteration: rollout, inference and update. Collective.

        It also logs the metrics and prints alarms. If they are due, it evaluates and writes a checkpoint.

        Returns:
            The metrics of the iteration, with its evaluation.
        """
        iteration, is_pretraining = self.done_steps + 1, not self.pretraining.is_over
        self._begin_step()
        # 1. Roll out: draw prompts, and let the actor sample responses to them. Dynamic sampling scores them at once.
        prompts, responses, selection = self._sample(is_pretraining)
        self.notify("on_rollout", responses)
        # 2. Batch: assign responses or prompts to minibatches, ranks and micro-batches.
        plan = self._plan(responses)
        # 3. Infer, while reward functions and HTTP scorers run.
        with self._timed("score"):
            inference = infer(self.config, self.components, self.cluster, plan, prompts, iteration, selection)
        # 4. Advantages: normalise and add up the scores, then KL penalty and GAE. The critic's step comes between if it
        #    gives the values.
        kl_coef, value_step = self.components.kl_controller.coef, None
        scores = self._shape_scores(inference, is_scored=selection is not None)
        if self.critic is not None and self.config.reuse_update_values:
            inference, value_step = self._learn_values(inference, scores, kl_coef, prompts)
        experience = self._shape_experience(inference, scores, kl_coef)
        self.notify("on_scores", experience)
        # 5. Update actor and critic, a step per minibatch.
        with self._timed("update"):
            ptx = self._draw_ptx(iteration)
            outcome = self.components.updater.run(
                experience, kl_coef, iteration, ptx, pretraining=self.pretraining, value_step=value_step
            )
        # 6. Control the KL coefficient, and record the iteration.
        self._control_kl(experience, inference.rewards)
        row = self._record(inference, experience, outcome, kl_coef, selection)
        self._finish_iteration(row)
        self.notify("on_update", row)
        return row

    def _sample(self, is_pretraining: bool) -> tuple[list[Prompt], list[Response], Selection | None]:
        """Return prompts, responses of all ranks to them, and with dynamic sampling how both were selected."""
        if self.config.dynamic_sampling and not is_pretraining:
            selection = self._sampler.select(self.done_steps)
            return selection.prompts, selection.responses, selection
        return *self._sampler.sample(self.done_steps), None

    def _plan(self, responses: list[Response]) -> BatchPlan:
        config = self.config
        with self._timed("plan"):
            return plan_batches(
                responses,
                config.token_budget,
                config.minibatches,
                minibatch_by=config.minibatch_by,
                cluster=self.cluster,
                seed=stream_seed(self.run.seed, self.done_steps + 1),
            )

    @property
    def _shaping(self) -> PPOConfig:
        """The configuration of advantages and returns."""
        return self.config if self.pretraining.is_over else self.pretraining.config

    def _shape_scores(self, inference: Inference, *, is_scored: bool) -> Scores:
        normalizers = self.components.normalizers
        with self._timed("shape"):
            return shape_scores(self.config, normalizers, inference, self.cluster, observe=not is_scored)

    def _learn_values(
        self, inference: Inference, scores: Scores, kl_coef: float, prompts: Sequence[Prompt]
    ) -> tuple[Inference, StepOutcome]:
        """Take the critic's first step. Returns the inference with the values before it, and the step."""
        plan, parts = inference.plan, self.components
        lr = None if self.pretraining.is_over else self.pretraining.learning_rate
        assert parts.critic is not None  # an estimator that reads values has one
        policies = inference.old_logprob_A, inference.ref_logprob_A, inference.rewards.token_reward_A
        with self._timed("update"):
            step = learn_values(self._shaping, parts.critic, kl_coef, plan, scores, *policies, lr=lr)
            check_logprobs(self.done_steps + 1, plan, prompts, parts.roles, self.cluster, critic=step.value_A)
        return replace(inference, value_A=step.value_A, last_value_N=step.last_value_N), step.outcome

    def _shape_experience(self, inference: Inference, scores: Scores, kl_coef: float) -> Experience:
        """Return the experience of the iteration, and write its value calibration."""
        cluster, shaping = self.cluster, self._shaping
        with self._timed("shape"):
            experience = shape_experience(self.config, shaping, kl_coef, inference, scores, cluster)
            if inference.last_value_N is not None:
                tables = value_calibration(shaping, experience, inference.last_value_N, cluster)
                if cluster.is_main:
                    is_pretraining = not self.pretraining.is_over
                    self._calibration_writer.write(self.dir, self.done_steps + 1, tables, pretraining=is_pretraining)
        return experience

    def _control_kl(self, experience: Experience, rewards: RewardOutputs) -> None:
        kl = fetch(moments_of(experience.shaped.kl_N, ~rewards.dropped_N, self.cluster))
        if self.pretraining.is_over:  # before, the coefficient would fall to 0 while the actor does not move
            self.components.kl_controller.update(float(kl.mean), int(kl.count))

    def _record(
        self,
        inference: Inference,
        experience: Experience,
        outcome: UpdateOutcome,
        kl_coef: float,
        selection: Selection | None,
    ) -> PPOStep:
        """Write the responses, count the iteration, and evaluate if that is due. Returns the metrics."""
        iteration, is_pretraining = self.done_steps + 1, not self.pretraining.is_over
        rows = rollout_rows(iteration, self.run.seed, experience, inference.all_rewards, self.cluster)
        if self.cluster.is_main:
            self._rollout_writer.submit(rollout_path(self.dir, iteration), rows)
        self.done_steps = iteration
        self._skip_guard.check("actor", outcome.actor)
        self._skip_guard.check("critic", outcome.critic)
        evaluation = None if is_pretraining else self._evaluate_if_due(iteration)
        seconds = dict(self._seconds)
        self._seconds.clear()
        row = ppo_step(
            iteration, experience, inference.rewards, outcome, kl_coef, seconds, evaluation, self.cluster, selection
        )
        if is_pretraining:
            row = self.pretraining.count(row)
            if self.pretraining.is_over:
                self.total_steps = self.config.iterations + self.pretraining.done_iterations
        return row

    def _draw_ptx(self, iteration: int) -> list[list[Example]]:
        """Return a batch of pretraining text for each of the actor's steps."""
        ptx, config = self.components.ptx, self.config
        first = config.critic_warmup + self.pretraining.done_iterations
        if ptx is None or not self.pretraining.is_over or iteration <= first:
            return []
        batches = ptx.batches(config.ptx_sequences)
        return [[ptx.item(pair) for pair in next(batches)] for _ in range(config.ppo_epochs * config.minibatches)]

    def _evaluate_if_due(self, iteration: int) -> Evaluation | None:
        if not self.eval_prompts or not (iteration == self.total_steps or _due(iteration, self.config.eval_every)):
            return None
        with self._timed("evaluate"):
            return self.evaluate()

    def _finish_iteration(self, row: PPOStep) -> None:
        """Log the metrics, print alarms, and save a checkpoint if one is due."""
        self.log(row)
        if self._memory_log is not None:
            self._memory_log.write(self.dir, row.iteration, self.total_steps)
        for message in self.alarms.check(row):
            self.alarm_messages.append(f"iteration {row.iteration}: {message}")
            warn(self.alarm_messages[-1])
        if row.evaluation is not None and row.iteration < self.total_steps:
            with self._timed("evaluate"):
                self.write_report()
        # The checkpoint comes last, so that it holds this iteration's alarms. A resumed run drops metrics rows beyond
        # its checkpoint, but could not restore a missing one. The seconds count for the next iteration.
        is_last = row.iteration == self.total_steps or (row.pretraining and self.pretraining.is_over)
        if is_last or _due(row.iteration, self.config.checkpoint_every):
            with self._timed("checkpoint"):
                self.save_checkpoint(quality=row.evaluation.score_mean if row.evaluation is not None else None)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.cluster.enter_phase(f"{phase} of iteration {self.done_steps + 1}")
        started = time.perf_counter()
        memory = contextlib.nullcontext() if self._memory_log is None else self._memory_log.phase(phase)
        with trace_range(PHASE_LABELS.get(phase, phase)), memory:
            yield
        self._seconds[phase] += time.perf_counter() - started

    # -- evaluating and finishing ----------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Sample answers to the held-out prompts and score them as in training. Returns the means."""
        if not self.eval_prompts:
            raise ConfigError("nothing to evaluate on: set ppo.eval_prompts")
        with locate_reward_errors(f"evaluation after iteration {self.done_steps}"):
            return self.assess(self.eval_prompts).evaluation(self.done_steps)

    def assess(self, prompts: Sequence[Prompt], samples: int = 1, *, greedy: bool = False) -> EvaluationResult:
        """Return `samples` answers per prompt with all scores; with KL unless `greedy`."""
        return self.components.evaluator(prompts, samples, greedy=greedy)

    def describe(self, step: PPOStep) -> dict[str, float]:
        """Return the figures of a step for the progress line."""
        figures = {"score": step.score_mean, "kl": step.kl_nats_per_response}
        if step.function_score_mean is not None:
            figures["function"] = step.function_score_mean
        return figures

    def save_checkpoint(self, quality: float | None = None) -> Path:
        """Write a checkpoint now, after the responses of its iterations. Collective."""
        self._rollout_writer.flush()
        return super().save_checkpoint(quality)

    def write_report(self) -> None:
        """Write the report of the run so far, on rank 0, after the responses that it shows."""
        self._rollout_writer.flush()
        super().write_report()

    def save_pretrained(self, out: str | Path) -> Path:
        """Write the actor as a Hugging Face checkpoint."""
        return self.actor.save_pretrained(out, self.run.dtype, self.tokenizer)

    def finish(self) -> dict[str, Any]:
        """Write the actor to `<run.dir>/model`, the summary and the report. Returns the summary."""
        self.write_model()
        summary = {"iterations": self.done_steps, "alarms": self.alarm_messages}
        write_json(self.dir / "summary.json", summary)
        self.write_report()
        return summary


def _is_empty(source: Any) -> bool:
    return isinstance(source, str) and not source


def _due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0


def run(config: PPOConfig) -> None:
    """Run the command: train to the end and print where the results are."""
    with PPOTrainer(config) as trainer:
        trainer.train()
        print_info(f"actor: {trainer.dir / 'model'}")
        print_info(f"report: {trainer.dir / 'report.html'}")
