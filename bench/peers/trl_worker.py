"""Iterations of TRL's PPO trainer: `python -m bench.peers.trl_worker WORKLOAD DTYPE ROWS...` in the peers' environment.

It runs at the fastest of the batch sizes, ROWS, and imports nothing of icegrt. TRL trains with bf16 by autocast on fp32
weights, as its own `bf16` argument does.
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable

import greenlet
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.end_to_end.flops import PhaseFlops
from bench.end_to_end.protocol import private_stdout, serve, try_settings
from bench.end_to_end.workloads import PAD, RECIPE, Workload, tokenizer, worker_parser

ITERATIONS = 10_000


class Phases:
    """Watches an iteration of `PPOTrainer.train`: its phases, its tokens, and the padding of its forward passes.

    The rollout is `batch_generation`, and the update begins with the first `Accelerator.accumulate`. Between them are
    inference, the reward model and the advantages: "score".

    Attributes:
        seconds: by phase.
        tokens, answer_tokens: of the iteration, without padding.
        padding_fraction: padding over all positions of the passes that score and train. It is computed if a counter
            watches.
    """

    def __init__(self, workload: Workload) -> None:
        self._stop_ids = torch.tensor(workload.stop_ids)
        self._counter: PhaseFlops | None = None
        self._positions = self._padding = 0
        self._accumulates = False
        self._begin = 0.0
        self.seconds: dict[str, float] = {}
        self.tokens = self.answer_tokens = 0

    @property
    def padding_fraction(self) -> float:
        """Padding over all positions."""
        return self._padding / self._positions

    def begin(self, counter: PhaseFlops | None) -> None:
        """Begin an iteration."""
        self.seconds, self._counter, self._accumulates = {}, counter, False
        self._positions = self._padding = 0
        self._begin = time.perf_counter()

    def end(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.seconds[phase], self._begin = now - self._begin, now
        if self._counter is not None:
            self._counter.end_phase(phase)

    def watch_rollout(self) -> None:
        """Wrap the functions of TRL's module that sample, score and train."""
        generate = ppo_trainer.batch_generation

        def generated(model, queries, *args):
            query_responses, logits = generate(model, queries, *args)
            self.end("rollout")
            self._count_tokens(queries, query_responses[:, queries.shape[1] :])
            return query_responses, logits

        ppo_trainer.batch_generation = generated
        for name in ("forward", "get_reward"):
            setattr(ppo_trainer, name, self._with_padding(getattr(ppo_trainer, name)))

    def watch_update(self, trainer: PPOTrainer) -> None:
        """Wrap the call that begins each micro-batch of a trainer's update."""
        accumulate = trainer.accelerator.accumulate

        def accumulated(*args):
            if not self._accumulates:
                self._accumulates = True
                self.end("score")
            return accumulate(*args)

        trainer.accelerator.accumulate = accumulated

    def _with_padding(self, function: Callable) -> Callable:
        def watched(model, query_responses, *args):
            if self._counter is not None:
                self._positions += query_responses.numel()
                self._padding += int((query_responses == PAD).sum())
            return function(model, query_responses, *args)

        return watched

    def _count_tokens(self, queries: torch.Tensor, responses: torch.Tensor) -> None:
        """Count prompts without padding, and responses up to their first stop token."""
        stopped_NT = torch.isin(responses, self._stop_ids).cumsum(1)
        before_N = (stopped_NT == 0).sum(1)
        self.answer_tokens = int((before_N + (before_N < responses.shape[1])).sum())
        self.tokens = self.answer_tokens + int((queries != PAD).sum())


class Pause(TrainerCallback):
    """Hands control back to the caller after each iteration of `PPOTrainer.train`.

    `train` is one loop; it calls `on_step_end` after each iteration and continues when that returns.
    """

    def __init__(self, resume) -> None:
        self._resume = resume

    def on_step_end(self, args, state, control, **kwargs):
        """Wait for the next iteration."""
        self._resume()
        return control


def trainer(workload: Workload, dtype: str, rows: int, folder: str, callback: TrainerCallback) -> PPOTrainer:
    """Return TRL's trainer; `rows`: episodes of a batch in rollout, scoring and update."""
    actor, reward = workload.actor(), workload.reward_model()
    settings = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=workload.episodes // rows,
        local_rollout_forward_batch_size=rows,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=ITERATIONS * workload.episodes,
        response_length=workload.answer_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=RECIPE["kl_coef"],
        gamma=RECIPE["gamma"],
        lam=RECIPE["lam"],
        cliprange=RECIPE["clip"],
        cliprange_value=RECIPE["value_clip"],
        vf_coef=1.0,
        learning_rate=RECIPE["lr"],
        lr_scheduler_type="constant",
        num_sample_generations=0,
        logging_steps=ITERATIONS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=dtype == "bf16",
        fp16=False,
    )
    prompts = [ids for ids in workload.prompt_ids() for _ in range(workload.samples)]
    made = PPOTrainer(
        args=settings,
        processing_class=tokenizer(workload, padding_side="left", model_input_names=["input_ids"]),
        model=actor,
        ref_model=copy.deepcopy(actor),
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[callback],
    )
    actor.generation_config.eos_token_id = workload.stop_ids
    return made


class Iterations:
    """TRL's loop at one batch size, an iteration at a time.

    Args:
        workload: what to run.
        dtype: "fp32" or "bf16".
        rows: episodes of a batch.
        folder: of the trainer.
        phases: watches them.
    """

    def __init__(self, workload: Workload, dtype: str, rows: int, folder: str, phases: Phases) -> None:
        caller = greenlet.getcurrent()
        made = trainer(workload, dtype, rows, folder, Pause(lambda: caller.switch()))
        phases.watch_update(made)
        self._phases, self._loop = phases, greenlet.greenlet(made.train)

    def step(self, counter: PhaseFlops | None = None) -> dict:
        """Run an iteration and return its figures."""
        self._phases.begin(counter)
        self._loop.switch()
        self._phases.end("update")
        return {
            "phases": self._phases.seconds,
            "answer_tokens": self._phases.answer_tokens,
            "tokens": self._phases.tokens,
        }

    def count(self) -> dict:
        """Run an iteration and return its operations beside its figures."""
        with PhaseFlops() as counter:
            figures = self.step(counter)
        return figures | {"flops": counter.phases, "padding": self._phases.padding_fraction}


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = worker_parser(__doc__)
    parser.add_argument("rows", nargs="+", type=int, help="sizes of a batch to try; each divides the episodes")
    options = parser.parse_args()
    workload = options.workload
    for rows in options.rows:
        if workload.episodes % rows:
            sys.exit(f"{rows} rows do not divide {workload.episodes} episodes")
    with tempfile.TemporaryDirectory() as folder:
        phases = Phases(workload)
        phases.watch_rollout()
        # At most one: a trainer holds four models and the states of two optimizers.
        loop: dict[str, Iterations] = {}

        def run(setting: str) -> dict:
            if setting not in loop:
                loop.clear()
                gc.collect()
                loop[setting] = Iterations(workload, options.dtype, int(setting.split()[0]), folder, phases)
            return loop[setting].step()

        seconds = try_settings([f"{rows} rows" for rows in options.rows], run)
        fastest = min(seconds, key=seconds.__getitem__)
        run(fastest)
        serve(loop[fastest].step, out, loop[fastest].count, seconds)


if __name__ == "__main__":
    main()
