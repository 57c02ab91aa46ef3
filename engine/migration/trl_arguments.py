"""Keys that TRL's `PPOConfig` has from `transformers.TrainingArguments` (4.56 to 5.24)."""

from __future__ import annotations

import math
from typing import Any

from icegrt.errors import ConfigError
from icegrt.migration.table import NoEquivalentError, Row, Settings, no_equivalent, same

_LOGGERS = ("wandb", "mlflow")
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ACCELERATOR = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
}
_BOTH = ("ppo.optimizer.", "ppo.critic.optimizer.")


def episodes_per_iteration(settings: Settings) -> int:
    """Return TRL's batch: `per_device_train_batch_size` x `gradient_accumulation_steps` x processes."""
    processes = settings.world_size or settings["world_size"] or 1
    return int(settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes)


def iterations(settings: Settings) -> int:
    """Return TRL's number of iterations.

    Raises:
        ConfigError: it depends on the number of prompts, which is unknown.
    """
    episodes = settings["total_episodes"]
    if episodes is None:
        if settings.dataset_size is None:
            raise ConfigError(
                f"{settings.path}: total_episodes is not given, so TRL would take num_train_epochs "
                f"{settings['num_train_epochs']} times the prompts of the data set; give their number: --dataset-size N"
            )
        episodes = int(settings["num_train_epochs"] * settings.dataset_size)
    return max(1, math.ceil(episodes / episodes_per_iteration(settings)))


def both(key: str) -> tuple[str, str]:
    """Return a key of the actor's and the critic's optimizer: TRL has one optimizer for both models."""
    return f"{_BOTH[0]}{key}", f"{_BOTH[1]}{key}"


def _warmup(settings: Settings) -> tuple[float, float]:
    steps, ratio = settings["warmup_steps"] or 0, settings["warmup_ratio"] or 0.0
    fraction = (steps if steps < 1 else steps / iterations(settings)) if steps else ratio
    if fraction >= 1:
        raise ConfigError(
            f"{settings.where('warmup_steps')}: warmup_steps={steps} is all of the {iterations(settings)} iterations, "
            "so the learning rate would never reach its peak; lower it"
        )
    return fraction, fraction


def _schedule(settings: Settings) -> tuple[str, str]:
    name = settings["lr_scheduler_type"]
    if name not in _SCHEDULES:
        raise NoEquivalentError(f"the schedules are linear, cosine and constant; linear is written for {name}")
    return _SCHEDULES[name], _SCHEDULES[name]


def _min_lr(settings: Settings) -> tuple[Any, Any]:
    arguments = settings["lr_scheduler_kwargs"] or {}
    unread = [key for key in arguments if key not in ("min_lr", "min_lr_rate")]
    if unread or (arguments and settings["lr_scheduler_type"] != "cosine_with_min_lr"):
        raise NoEquivalentError("only min_lr and min_lr_rate of cosine_with_min_lr have an equivalent")
    if not arguments:
        return None, None
    fraction = arguments.get("min_lr_rate") or arguments.get("min_lr", 0.0) / settings["learning_rate"]
    return fraction, fraction


def _optimizer(settings: Settings) -> tuple[()]:
    if not str(settings["optim"]).startswith("adamw_torch") and settings["optim"] != "adamw_apex_fused":
        raise NoEquivalentError("the optimizer is AdamW")
    return ()


def _clip_grad(settings: Settings) -> tuple[float, float]:
    limit = settings["max_grad_norm"] if settings["deepspeed"] else 0.0
    return limit, limit


def _dtype(settings: Settings) -> tuple[str]:
    if settings["fp16"]:
        raise NoEquivalentError("there is no fp16; the default fp32 is kept, and bf16 is the alternative")
    return ("fp32" if settings["bf16"] is False else "bf16",)


def _checkpoint_every(settings: Settings) -> tuple[int]:
    steps, total = settings["save_steps"], iterations(settings)
    if settings["save_strategy"] != "steps":
        return (total,)
    return (min(total, math.ceil(total * steps) if steps < 1 else int(steps)),)


def _log_to(settings: Settings) -> tuple[list[str]]:
    loggers = settings["report_to"] or []
    loggers = [loggers] if isinstance(loggers, str) else loggers
    others = [x for x in loggers if x not in (*_LOGGERS, "none", "tensorboard")]
    if others:
        raise NoEquivalentError(f"the loggers are {', '.join(_LOGGERS)}, and TensorBoard and JSONL always")
    return ([x for x in loggers if x in _LOGGERS],)


def _recompute(settings: Settings) -> tuple[str | None]:
    return ("full" if settings.given.get("gradient_checkpointing") else None,)


TRAINING_ARGUMENTS = (
    Row(("num_train_epochs",), 3.0, (), "read if `total_episodes` is null", "number"),
    same(
        "learning_rate",
        3e-6,
        "number",
        *both("lr"),
        note="TRL has one AdamW over both models; ours are two, each with a schedule of its own steps",
        reported=True,
    ),
    Row(
        ("lr_scheduler_type",),
        "linear",
        both("schedule"),
        "TRL lowers it once per iteration, here every optimizer step does; other schedules have no equivalent",
        "text",
        _schedule,
    ),
    Row(
        ("lr_scheduler_kwargs",),
        None,
        both("min_lr_fraction"),
        "min_lr_rate, or min_lr / learning_rate, of `cosine_with_min_lr`",
        "any",
        _min_lr,
    ),
    Row(
        ("warmup_steps",),
        0,
        both("warmup_fraction"),
        "iterations, or a fraction below 1; here always a fraction",
        "number",
        _warmup,
    ),
    Row(
        ("warmup_ratio",),
        0.0,
        both("warmup_fraction"),
        "transformers 4; without `warmup_steps`",
        "number",
        _warmup,
    ),
    same("weight_decay", 0.0, "number", *both("weight_decay")),
    same("adam_beta1", 0.9, "number", *both("beta1")),
    same("adam_beta2", 0.999, "number", *both("beta2")),
    same("adam_epsilon", 1e-8, "number", *both("eps")),
    Row(
        ("max_grad_norm",),
        1.0,
        both("clip_grad"),
        "TRL's PPO loop does not clip gradients, except under DeepSpeed: 0 is written without it. Our default is 1",
        "number",
        _clip_grad,
        True,
    ),
    Row(("optim",), "adamw_torch_fused", (), "AdamW in every implementation of torch; no other", "text", _optimizer),
    Row(
        ("bf16",),
        None,
        ("ppo.run.dtype",),
        "null: bf16, unless fp16 is set. In TRL fp32 weights under autocast; here bf16 weights with fp32 "
        "master weights",
        "bool",
        _dtype,
        True,
    ),
    no_equivalent("fp16", why="there is no fp16"),
    Row(
        ("gradient_checkpointing",),
        True,
        ("ppo.run.recompute",),
        "TRL's PPO loop replaces that of transformers and never applies it. A `true` in the file is taken as meant: "
        "`full`. Without the key nothing is computed again, as in TRL",
        "bool",
        _recompute,
    ),
    same("seed", 42, "int", "ppo.run.seed"),
    same("output_dir", None, "text", "ppo.run.dir", note="must be empty, unless the run resumes"),
    Row(
        ("save_steps",),
        500,
        ("ppo.checkpoint_every",),
        "iterations; a fraction below 1 is one of the run. The last iteration always writes a checkpoint",
        "number",
        _checkpoint_every,
    ),
    Row(
        ("save_strategy",),
        "steps",
        ("ppo.checkpoint_every",),
        "other than `steps`: one checkpoint, at the end",
        "text",
        _checkpoint_every,
    ),
    Row(
        ("save_total_limit",),
        None,
        ("ppo.keep_checkpoints",),
        "null keeps all in TRL, 2 and the best here",
        "int",
        lambda settings: (settings["save_total_limit"],),
    ),
    Row(
        ("report_to",),
        "none",
        ("ppo.run.log_to",),
        "wandb and mlflow; TensorBoard and JSONL are always written",
        "any",
        _log_to,
    ),
    no_equivalent("eval_strategy", default="no", why="set ppo.eval_prompts to evaluate, and ppo.eval_every"),
    no_equivalent(
        "eval_steps eval_delay eval_on_start eval_accumulation_steps prediction_loss_only "
        "include_for_metrics batch_eval_metrics eval_use_gather_object do_train do_eval do_predict "
        "load_best_model_at_end metric_for_best_model greater_is_better",
        why="TRL's PPO does not read it; the checkpoint with the best held-out score is always kept",
    ),
    no_equivalent("per_device_eval_batch_size", default=8, why="evaluation decodes ppo.max_batch sequences at a time"),
    no_equivalent("eval_do_concat_batches", default=True, why="TRL's PPO does not read it"),
    no_equivalent("max_steps", default=-1, why="TRL's PPO does not read it: total_episodes ends the run"),
    no_equivalent(
        "push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_private_repo "
        "hub_model_id hub_always_push hub_revision",
        why="nothing is uploaded: `ppo.run.dir`/model is a Hugging Face checkpoint",
    ),
    no_equivalent("hub_token", default="<HUB_TOKEN>", why="nothing is uploaded"),
    no_equivalent("hub_strategy", default="every_save", why="nothing is uploaded"),
    no_equivalent(
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint save_only_model "
        "save_on_each_node enable_jit_checkpoint overwrite_output_dir",
        why="checkpoints hold the whole state; `icegrt ppo --resume` continues from the last one",
    ),
    no_equivalent("logging_strategy", default="steps", why="every iteration is a row of metrics.jsonl"),
    no_equivalent("logging_steps", default=10, why="every iteration is a row of metrics.jsonl"),
    no_equivalent("logging_nan_inf_filter log_on_each_node", default=True, why="every iteration is logged once"),
    no_equivalent("log_level", default="passive", why="ICEGRT_QUIET=1 silences progress"),
    no_equivalent("log_level_replica", default="warning", why="rank 0 prints"),
    no_equivalent("include_num_input_tokens_seen", default="no", why="metrics.jsonl counts tokens"),
    no_equivalent("project", default="huggingface", why="the logger's own environment variables name the project"),
    no_equivalent(
        "run_name logging_dir logging_first_step disable_tqdm trackio_space_id trackio_bucket_id "
        "trackio_static_space_id",
        why="logs are files of `ppo.run.dir`; loggers read their own environment variables",
    ),
    no_equivalent(
        "deepspeed fsdp fsdp_config parallelism_config fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap mp_parameters tpu_num_cores tpu_metrics_debug "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend",
        why="parallelism is ppo.parallel with Megatron's distributed optimizer; see ppo.offload, and `icegrt plan`",
    ),
    no_equivalent("accelerator_config", default=_ACCELERATOR, why="batches are planned by tokens over all ranks"),
    no_equivalent("ddp_timeout", default=1800, why="a failing rank ends all ranks"),
    no_equivalent("average_tokens_across_devices", default=True, why="losses are means over the tokens of all ranks"),
    no_equivalent(
        "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode "
        "torch_empty_cache_steps auto_find_batch_size use_cache optim_args optim_target_modules tf32 "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs bf16_full_eval fp16_full_eval "
        "full_determinism use_cpu no_cuda jit_mode_eval use_mps_device use_ipex torchdynamo",
        why="kernels, device and chunk sizes are chosen by the engine",
    ),
    no_equivalent("activation_checkpointing", default=True, why="as gradient_checkpointing, which is read"),
    no_equivalent("skip_memory_metrics", default=True, why="metrics.jsonl has peaks of memory"),
    no_equivalent("neftune_noise_alpha label_smoothing_factor", default=0.0, why="TRL's PPO does not read it"),
    no_equivalent("data_seed", why="one seed for all: ppo.run.seed"),
    no_equivalent("train_sampling_strategy", default="random", why="prompts are drawn at random without replacement"),
    no_equivalent("length_column_name", default="length", why="prompts are tokenized here"),
    no_equivalent(
        "dataloader_drop_last dataloader_num_workers dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context label_names group_by_length",
        why="prompts are tokenized when a run starts, and stay in memory",
    ),
    no_equivalent(
        "dataloader_pin_memory dataloader_in_order remove_unused_columns",
        default=True,
        why="reward functions get all columns",
    ),
    no_equivalent("debug local_rank _n_gpu past_index", default=-1, why="it concerns TRL's launch"),
    no_equivalent("save_safetensors", default=True, why="models are written as safetensors"),
    no_equivalent("adafactor", why="the optimizer is AdamW"),
    no_equivalent("fp16_backend half_precision_backend", default="auto", why="there is no fp16"),
    no_equivalent("fp16_opt_level", default="O1", why="there is no fp16"),
    no_equivalent("per_gpu_train_batch_size", why="set per_device_train_batch_size"),
    no_equivalent(
        "ray_scope",
        default="last",
        why="there is no search of hyperparameters",
    ),
    no_equivalent(
        "per_gpu_eval_batch_size use_legacy_prediction_loop include_inputs_for_metrics include_tokens_per_second",
        why="TRL's PPO does not read it",
    ),
)
