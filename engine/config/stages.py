"""Configuration keys of the commands beside PPO: `sft`, `sample`, `reward`, `value`, `generate` and `export`."""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import Loadable, Section, SectionList, config_class, key
from icegrt.config.shared import (
    INPUT_KEY,
    MAX_BATCH,
    PROMPT_TRUNCATION,
    SHARING,
    TOKEN_BUDGET,
    DataSource,
    LoRAConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)


@config_class
class SFTConfig(Loadable):
    """Supervised fine-tuning of a base model, which gives the instruction-tuned actor (ICE-Instruct)."""

    section = "sft"
    model: str = key("", "Hugging Face checkpoint to start from")
    data: SectionList[DataSource] = key([], "training files, blended by weight")
    heldout: SectionList[DataSource] = key(
        [], "held-out files; their loss is evaluated before, during and after training"
    )
    epochs: float = key(3.0, "passes over the blend", gt=0)
    batch_sequences: int = key(32, "sequences per optimizer step, over all ranks", ge=1)
    token_budget: int = key(4096, TOKEN_BUDGET, unit="tokens", ge=1)
    max_length: int = key(0, "longest sequence; 0: the model's context", unit="tokens", ge=0)
    truncation: Literal["error", "drop", "left", "right"] = key(
        "error",
        "for a longer row: raise an error, drop it, or truncate the prompt's beginning (left) or the response's end "
        "(right)",
    )
    eval_every: int = key(0, "optimizer steps between evaluations; 0: before and after training only", ge=0)
    checkpoint_every: int = key(0, "optimizer steps between checkpoints; 0: one at the end only", ge=0)
    keep_checkpoints: int = key(
        2, "number of last checkpoints kept, besides the one with the lowest held-out loss", ge=1
    )
    chunk_rows: int = key(0, "logit chunk size: rows of logits computed at a time; 0: automatic", ge=0)
    sharing: Literal["full", "lora"] = key("full", SHARING)
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapter, with sharing=lora")
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(weight_decay=0.1, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")
    profile: Section[ProfileConfig] = key(ProfileConfig(), "a trace of some steps")
    run: Section[RunConfig] = key(RunConfig(dir="runs/sft"), "the run")


@config_class
class SampleConfig(Loadable):
    """Several answers per prompt from a checkpoint, as JSONL ready for ranking."""

    section = "sample"
    model: str = key("", "Hugging Face checkpoint")
    prompts: str = key("", "JSONL or Parquet file of prompts (`prompt` or `messages`; other columns are kept)")
    input_key: str = key("", INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", PROMPT_TRUNCATION)
    out: str = key("", "JSONL file to write: one row per prompt with `responses`")
    samples_per_prompt: int = key(4, "answers per prompt (K)", ge=1)
    temperatures: list[float] = key(
        [], "temperatures of the K answers, repeated in order (0: greedy); empty: sampling.temperature for all"
    )
    limit: int = key(0, "number of prompts to use; 0: all", ge=0)
    max_batch: int = key(256, MAX_BATCH, ge=1)
    rollout: Section[RolloutConfig] = key(RolloutConfig(), "the rollout engine")
    score_function: str = key("", "`file.py:function` that scores the answers; rows then have `scores`")
    seed: int = key(0, "seed of the sampler", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations")
    sampling: Section[SamplingConfig] = key(SamplingConfig(), "sampling of the answers")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")


@config_class
class RewardConfig(Loadable):
    """Training of a reward model, with a pairwise loss over the ranked responses of each prompt (ICE-Reward)."""

    section = "reward"
    model: str = key("", "Hugging Face checkpoint to start from (the instruction-tuned actor)")
    data: SectionList[DataSource] = key([], "`prompt` with `responses` and `scores` or `ranks`, or `chosen`/`rejected`")
    heldout: SectionList[DataSource] = key([], "held-out files of the same form")
    heldout_fraction: float = key(0.1, "fraction of the prompts held out, if `heldout` is empty", ge=0, lt=1)
    epochs: float = key(1.0, "passes over the prompts (two overfit easily)", gt=0)
    batch_prompts: int = key(16, "prompts per optimizer step; one micro-batch has all responses of a prompt", ge=1)
    token_budget: int = key(4096, TOKEN_BUDGET, unit="tokens", ge=1)
    max_length: int = key(0, "longest sequence; 0: the model's context", unit="tokens", ge=0)
    truncation: Literal["error", "drop", "left", "right"] = key(
        "error",
        "for a longer row: raise an error, drop it, or truncate the prompt's beginning (left) or the responses' ends "
        "(right)",
    )
    tie_margin: float = key(0.0, "a pair with a smaller difference of scores is a tie and dropped", ge=0)
    eval_every: int = key(0, "optimizer steps between evaluations; 0: one each quarter of an epoch", ge=0)
    patience: int = key(3, "stop after this many evaluations without a lower held-out loss; 0: never", ge=0)
    keep_checkpoints: int = key(
        2,
        "number of last checkpoints kept (each evaluation writes one), besides the one with the lowest held-out loss",
        ge=1,
    )
    sharing: Literal["full", "lora"] = key("full", SHARING)
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapter, with sharing=lora; the scalar head trains with it")
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=3e-4, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")
    profile: Section[ProfileConfig] = key(ProfileConfig(), "a trace of some steps")
    run: Section[RunConfig] = key(RunConfig(dir="runs/reward"), "the run")


@config_class
class ValueConfig(Loadable):
    """Value pretraining: a critic for PPO, trained on the returns (lambda 1) of a fixed policy."""

    section = "value"
    model: str = key(
        "", "checkpoint to start from: a language model (its new value head is zero), a reward model or a critic"
    )
    data: SectionList[DataSource] = key(
        [], "rollouts: the folder of a PPO run, or files of its `rollouts/`; empty: sample them, as `ppo` says"
    )
    heldout: SectionList[DataSource] = key([], "held-out rollouts of the same form")
    heldout_fraction: float = key(0.1, "fraction of the prompts held out, if `heldout` is empty", gt=0, lt=1)
    ppo: str = key(
        "",
        "YAML file whose `ppo` section names the policy (actor), its prompts, its sampling and its reward sources; "
        "with an empty `data`",
    )
    iterations: int = key(8, "iterations of that section to sample: prompts_per_iteration prompts each", ge=1)
    gamma: float = key(1.0, "discount of the returns; that of PPO", gt=0, le=1)
    epochs: float = key(2.0, "passes over the rollouts", gt=0)
    batch_sequences: int = key(32, "responses per optimizer step, over all ranks", ge=1)
    token_budget: int = key(4096, TOKEN_BUDGET, unit="tokens", ge=1)
    max_length: int = key(0, "longest sequence; 0: the model's context", unit="tokens", ge=0)
    eval_every: int = key(0, "optimizer steps between evaluations; 0: one each quarter of an epoch", ge=0)
    patience: int = key(
        3, "stop after this many evaluations without a higher held-out explained variance; 0: never", ge=0
    )
    keep_checkpoints: int = key(
        2,
        "number of last checkpoints kept (each evaluation writes one), besides the one with the highest held-out "
        "explained variance",
        ge=1,
    )
    freeze: list[str] = key([], "modules that do not train, of attention, mlp, embedding and norm")
    sharing: Literal["full", "lora"] = key("full", SHARING)
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapter, with sharing=lora; the value head trains with it")
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=1e-4, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")
    profile: Section[ProfileConfig] = key(ProfileConfig(), "a trace of some steps")
    run: Section[RunConfig] = key(RunConfig(dir="runs/value"), "the run")


@config_class
class GenerateConfig(Loadable):
    """Answers of a model to prompts, printed or written as JSONL."""

    section = "generate"
    model: str = key("", "Hugging Face checkpoint, or a run's folder")
    prompt: list[str] = key([], "prompts, as texts")
    prompts: str = key("", "JSONL or Parquet file of prompts")
    input_key: str = key("", INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", PROMPT_TRUNCATION)
    out: str = key("", "JSONL file to write; empty: print")
    chat: bool = key(True, "apply the tokenizer's chat template, if it has one")
    samples_per_prompt: int = key(1, "answers per prompt", ge=1)
    max_batch: int = key(256, MAX_BATCH, ge=1)
    rollout: Section[RolloutConfig] = key(RolloutConfig(), "the rollout engine")
    seed: int = key(0, "seed of the sampler", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations")
    sampling: Section[SamplingConfig] = key(
        SamplingConfig(temperature=0.0), "sampling of the answers; greedy by default"
    )
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")


@config_class
class ExportConfig(Loadable):
    """Conversion of a run's checkpoint to a Hugging Face checkpoint; an adapter is merged with its trunk."""

    section = "export"
    run: str = key("", "folder of a run")
    role: Literal["actor", "critic", "reward", "model"] = key(
        "actor", "the trained model to export (SFT and reward runs have only one, which actor and model name too)"
    )
    checkpoint: str = key("latest", "the checkpoint: latest, best (by held-out score or loss), or step_NNNNNN")
    out: str = key("", "folder to write; must be empty or absent")
    adapter: bool = key(False, "write the adapter of a run with sharing=lora alone, in the format of peft (fp32)")
    base: str = key("", "checkpoint that an adapter was trained on; empty: where it was then")
    dtype: Literal["fp32", "bf16"] = key("fp32", "dtype of the exported weights")
    shard_gigabytes: float = key(5.0, "largest size of one file of weights", unit="GB", gt=0)
