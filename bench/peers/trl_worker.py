"""Iterations of TRL's PPO trainer: `python -m bench.peers.trl_worker WORKLOAD DTYPE ROWS`, in the peers' environment.

It imports nothing of icegrt. TRL trains with bf16 by autocast on fp32 weights, as its own `bf16` argument does.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.end_to_end.protocol import private_stdout, serve
from bench.end_to_end.workloads import RECIPE, WORKLOADS, Workload

ITERATIONS = 10_000


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


def tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the ids of the workload's pad and EOS tokens."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, workload.vocab))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "model_input_names": ["input_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


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
        processing_class=tokenizer(workload),
        model=actor,
        ref_model=copy.deepcopy(actor),
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[callback],
    )
    actor.generation_config.eos_token_id = workload.stop_ids
    return made


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("rows", type=int, help="episodes of a batch; divides the episodes of an iteration")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    if workload.episodes % options.rows:
        sys.exit(f"{options.rows} rows do not divide {workload.episodes} episodes")
    import greenlet

    with tempfile.TemporaryDirectory() as folder:
        main_loop = greenlet.getcurrent()
        made = trainer(workload, options.dtype, options.rows, folder, Pause(lambda: main_loop.switch()))
        training = greenlet.greenlet(made.train)

        def step() -> dict:
            training.switch()
            return {"phases": {}}

        serve(step, out)


if __name__ == "__main__":
    main()
