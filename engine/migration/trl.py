"""Keys of TRL's PPO, version 1.0 to 1.10: `PPOConfig`, and the script and model arguments that its example reads.

Read in the sources of 1.0.0 and 1.10.0, whose `PPOConfig` has the same fields and defaults.
"""

from __future__ import annotations

import math
from typing import Any

from icegrt.errors import ConfigError
from icegrt.migration.table import NoEquivalentError, Row, Settings, no_equivalent, same
from icegrt.migration.trl_arguments import TRAINING_ARGUMENTS, episodes_per_iteration, iterations

LIBRARY = "TRL's PPO (1.0 to 1.10)"
_STOP_TOKENS = ("eos", "<STOP_TOKEN>")  # `to_json_string` hides values of keys that end in _token
_PEFT_DEFAULT = ["q_proj", "v_proj"]
_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def optimizer_steps_per_pass(settings: Settings) -> int:
    """Return the optimizer steps that TRL takes in a pass over an iteration's responses.

    TRL steps after `gradient_accumulation_steps` micro-batches, whatever the minibatch (`Accelerator.accumulate`).
    """
    micro = int(settings["per_device_train_batch_size"])
    accumulated = int(settings["gradient_accumulation_steps"])
    minibatches = int(settings["num_mini_batches"])
    local = micro * accumulated
    if local % minibatches:
        raise ConfigError(
            f"{settings.where('num_mini_batches')}: num_mini_batches={minibatches} does not divide "
            f"per_device_train_batch_size x gradient_accumulation_steps = {local}; TRL refuses it, too"
        )
    return max(1, minibatches * math.ceil(local // minibatches / micro) // accumulated)


def _minibatches(settings: Settings) -> tuple[int]:
    return (optimizer_steps_per_pass(settings),)


def _iterations(settings: Settings) -> tuple[int]:
    return (iterations(settings),)


def _eval_every(settings: Settings) -> tuple[int]:
    generations = settings["num_sample_generations"]
    return (max(1, iterations(settings) // generations) if generations > 0 else 0,)


def _stop(settings: Settings) -> tuple[Any]:
    token, token_id = settings["stop_token"], settings["stop_token_id"]
    if token is not None and token not in _STOP_TOKENS:
        raise ConfigError(f"{settings.where('stop_token')}: stop_token={token}: TRL knows eos and null only")
    if token is None and token_id is None:
        raise NoEquivalentError("without it TRL samples response_length tokens; here a response ends at the EOS token")
    return (None if token_id is None else [int(token_id)],)


def _token_budget(settings: Settings) -> tuple[int | None]:
    twice = 2 * settings["response_length"]
    return (twice if twice > 4096 else None,)


def _sharing(settings: Settings) -> tuple[Any, ...]:
    return ("lora", "actor") if settings["use_peft"] else ("full", "reward")


def _with_lora(key: str) -> Any:
    return lambda settings: (settings[key] if settings["use_peft"] else None,)


def _lora_modules(settings: Settings) -> tuple[Any]:
    if not settings["use_peft"]:
        return (None,)
    modules = settings["lora_target_modules"]
    if modules in ("all-linear", ["all-linear"]):
        return (_ALL_LINEAR,)
    return (_PEFT_DEFAULT if not modules else [modules] if isinstance(modules, str) else modules,)


def _always(*values: Any) -> Any:
    return lambda settings: values


BATCH = (
    Row(
        ("per_device_train_batch_size",),
        8,
        ("ppo.prompts_per_iteration", "ppo.samples_per_prompt"),
        "x `gradient_accumulation_steps` x processes is the number of prompts of an iteration, over all ranks, with "
        "one response each. As a micro-batch it has no equivalent: `ppo.token_budget` counts tokens",
        "int",
        lambda settings: (episodes_per_iteration(settings), 1),
    ),
    Row(
        ("gradient_accumulation_steps",),
        1,
        ("ppo.prompts_per_iteration",),
        "a factor of the batch, as above; micro-batches follow from `ppo.token_budget`",
        "int",
        lambda settings: (episodes_per_iteration(settings),),
    ),
    Row(
        ("num_mini_batches",),
        1,
        ("ppo.minibatches",),
        "here a minibatch is an optimizer step. TRL takes a step after `gradient_accumulation_steps` micro-batches, so "
        "with `num_mini_batches` up to that number it takes 1 step per pass; the command writes the number of steps",
        "int",
        _minibatches,
        True,
    ),
    Row(
        ("total_episodes",),
        None,
        ("ppo.iterations",),
        "responses, divided by those of an iteration and rounded up; null: `num_train_epochs` x the prompts of the "
        "data set (`--dataset-size`)",
        "int",
        _iterations,
    ),
    same("num_ppo_epochs", 4, "int", "ppo.ppo_epochs"),
    same(
        "local_rollout_forward_batch_size",
        64,
        "int",
        "ppo.max_batch",
        note="here the sequences that are decoded at a time; inference takes the micro-batches of the update",
        reported=True,
    ),
    Row(
        ("response_length",),
        53,
        ("ppo.sampling.max_new_tokens", "ppo.token_budget"),
        "the budget is raised if two responses exceed it; it must hold the longest prompt and a response",
        "int",
        lambda settings: (settings["response_length"], *_token_budget(settings)),
    ),
    no_equivalent(
        "num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size",
        why="TRL computes it from the keys above",
    ),
    Row(("world_size",), None, (), "TRL computes it; the command has `--world-size`", "int"),
)

ALGORITHM = (
    same("temperature", 0.7, "number", "ppo.sampling.temperature"),
    Row(
        ("stop_token",),
        None,
        ("ppo.sampling.stop_token_ids",),
        "`eos` is the only behaviour here. Null: TRL samples `response_length` tokens always",
        "text",
        _stop,
    ),
    Row(
        ("stop_token_id",),
        None,
        ("ppo.sampling.stop_token_ids",),
        "here EOS ends a response, too",
        "int",
        lambda settings: (None if settings["stop_token_id"] is None else [int(settings["stop_token_id"])],),
        True,
    ),
    same(
        "missing_eos_penalty",
        None,
        "number",
        "ppo.missing_eos_penalty",
        note="here the penalty of a truncated response: one that ends at another stop token or text is complete",
        reported=True,
    ),
    same("kl_coef", 0.05, "number", "ppo.kl_coef"),
    same("kl_estimator", "k1", "text", "ppo.kl_estimator"),
    same("gamma", 1.0, "number", "ppo.gamma"),
    same("lam", 0.95, "number", "ppo.lam"),
    same("cliprange", 0.2, "number", "ppo.clip_low", "ppo.clip_high"),
    Row(
        ("cliprange_value",),
        0.2,
        ("ppo.value_clip",),
        "0 is no clipping here; TRL holds the value at its old one",
        "number",
        lambda settings: (settings["cliprange_value"],),
        False,
    ),
    no_equivalent(
        "vf_coef",
        default=0.1,
        why="the critic has an optimizer of its own, with the same learning rate; Adam's step does not depend on a "
        "factor of the loss, but for epsilon",
    ),
    no_equivalent("whiten_rewards", default=False, why="rewards are never whitened; advantages are"),
    Row(
        ("(scores as the model gives them)",),
        None,
        ("ppo.score_scale", "ppo.score_clip"),
        "our defaults divide scores by their running standard deviation and clip them",
        "any",
        _always(False, 0.0),
    ),
    Row(
        ("(KL in the reward, fixed coefficient)",),
        None,
        ("ppo.kl_in", "ppo.kl_control"),
        "",
        "any",
        _always("reward", "fixed"),
    ),
    Row(
        ("(advantages whitened)",),
        None,
        ("ppo.whiten_advantages",),
        "here over the responses of all ranks, in TRL over those of one process",
        "any",
        _always(True),
    ),
)

MODELS = (
    same(
        "sft_model_path",
        None,
        "text",
        "ppo.actor",
        note="read by TRL's example, not by its trainer. Empty here: the model is given in Python, or on the command "
        "line; TRL's default is EleutherAI/pythia-160m. The reference is the actor as it starts",
    ),
    same(
        "reward_model_path",
        None,
        "text",
        "ppo.reward_model",
        note="as above; sequence classification, one label",
    ),
    Row(
        ("use_peft",),
        False,
        ("ppo.sharing", "ppo.critic.init"),
        "with adapters TRL's value model stays a whole model that starts from the reward model; here the critic is an "
        "adapter, and starts from the actor with a zero head",
        "bool",
        _sharing,
        True,
    ),
    Row(("lora_r",), 16, ("ppo.lora.rank",), "with `use_peft`", "int", _with_lora("lora_r")),
    Row(("lora_alpha",), 32, ("ppo.lora.alpha",), "with `use_peft`", "number", _with_lora("lora_alpha")),
    Row(
        ("lora_target_modules",),
        None,
        ("ppo.lora.target_modules",),
        "null is peft's choice, q_proj and v_proj for Llama, Mistral and Qwen2; `all-linear` is our default",
        "any",
        _lora_modules,
    ),
    Row(("use_rslora",), False, ("ppo.lora.use_rslora",), "with `use_peft`", "bool", _with_lora("use_rslora")),
    no_equivalent("lora_dropout", default=0.05, why="adapters have no dropout"),
    no_equivalent("lora_task_type", default="CAUSAL_LM", why="the role decides"),
    no_equivalent(
        "use_dora lora_target_parameters lora_modules_to_save model_adapter_name ref_adapter_name",
        why="adapters are plain LoRA on projections; the reference is the model without its adapter",
    ),
    no_equivalent(
        "load_in_8bit load_in_4bit use_bnb_nested_quant bnb_4bit_quant_storage",
        why="weights are fp32 or bf16",
    ),
    no_equivalent("bnb_4bit_quant_type", default="nf4", why="weights are fp32 or bf16"),
    no_equivalent("model_name_or_path", why="read by TRL's example for the tokenizer; here it is that of the actor"),
    no_equivalent("model_revision", default="main", why="models are folders"),
    no_equivalent("trust_remote_code", why="no code of a checkpoint is run"),
    no_equivalent(
        "dtype torch_dtype",
        default="float32",
        why="`ppo.run.dtype` is one for parameters and activations; bf16 keeps fp32 master weights",
    ),
    no_equivalent("attn_implementation", why="attention is chosen by the device"),
    no_equivalent(
        "dataset_name dataset_config dataset_streaming datasets",
        why="prompts are a JSONL or Parquet file: set ppo.prompts, and ppo.eval_prompts",
    ),
    no_equivalent("dataset_train_split", default="train", why="a file has no splits: set ppo.prompts"),
    no_equivalent("dataset_test_split", default="test", why="a file has no splits: set ppo.eval_prompts"),
    no_equivalent("dataset_num_proc", why="prompts are tokenized when a run starts, in one process"),
    no_equivalent("ignore_bias_buffers env", why="it concerns TRL's launch"),
    no_equivalent("ds3_gather_for_generation", default=True, why="rollout uses the actor's own shards"),
    Row(
        ("num_sample_generations",),
        10,
        ("ppo.eval_every",),
        "TRL prints completions of its evaluation set so many times in a run; here `ppo.eval_prompts` are sampled and "
        "scored every so many iterations, if they are given",
        "int",
        _eval_every,
    ),
)

ROWS = (*BATCH, *ALGORITHM, *MODELS, *TRAINING_ARGUMENTS)
