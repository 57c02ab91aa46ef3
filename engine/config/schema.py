"""Every configuration key, with its type, default, unit and meaning. `loader` reads, checks, prints and saves them.

One YAML file may hold the complete recipe: each command reads the section of its own name (`sft:`, `sample:`,
`reward:`, `ppo:`, `generate:`, `export:`), and dotted overrides name the section first (`ppo.kl_coef=0.1`). Defaults
are those of the PPO-RLHF family. A default from the ICE-GRT paper is marked [paper].

The file has over 400 lines because it is a table: all keys are read in one place.
"""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import Loadable, Section, SectionList, config_class, key

# Help texts of keys that several sections have.
_INPUT_KEY = "column of the prompt, if its name is not recognised (a dot selects a field of an object)"
_PROMPT_TRUNCATION = (
    "for a prompt that leaves no room for the answer: raise an error, drop it, or truncate its beginning"
)
_TOKEN_BUDGET = (
    "largest micro-batch, without padding (replaces TRL's per_device_train_batch_size; verl: "
    "ppo_max_token_len_per_gpu with use_dynamic_bsz)"
)
_SHARING = "what is trained: all weights (full), or low-rank adapters on frozen weights (lora)"
_MAX_BATCH = (
    "sequences decoded at a time on each data-parallel rank (TRL: local_rollout_forward_batch_size; verl: "
    "rollout.max_num_seqs)"
)


@config_class
class OptimizerConfig:
    """AdamW with a warm-up and a decay, by Megatron's distributed optimizer."""

    lr: float = key(1e-5, "peak learning rate", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = key(
        "linear", "decay after the warm-up, to min_lr_fraction * lr"
    )
    min_lr_fraction: float = key(0.0, "learning rate at the end, as a fraction of the peak", ge=0, le=1)
    warmup_fraction: float = key(0.0, "linear warm-up, as a fraction of all steps", ge=0, lt=1)
    beta1: float = key(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "Adam's decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "Adam's epsilon; a larger value damps early updates", gt=0)
    weight_decay: float = key(0.0, "decoupled weight decay, not applied to norms and biases", ge=0)
    clip_grad: float = key(1.0, "largest global norm of the gradient; 0: no clipping", ge=0)
    on_host: bool = key(False, "keep Adam's moments and fp32 master weights in host memory, and take the steps there")


@config_class
class SamplingConfig:
    """Sampling of answers. top_k and top_p are for `generate` and `sample`; PPO refuses them."""

    temperature: float = key(1.0, "divides the logits in fp32; 0: greedy", ge=0)
    top_k: int = key(0, "sample from the k most probable tokens; 0: from all", ge=0)
    top_p: float = key(1.0, "sample from the smallest set of tokens with this probability", gt=0, le=1)
    min_p: float = key(
        0.0, "sample from the tokens with at least this share of the largest probability; 0: from all", ge=0, le=1
    )
    max_new_tokens: int = key(256, "longest answer", unit="tokens", ge=1)
    min_new_tokens: int = key(0, "no stop token is sampled before this many tokens", unit="tokens", ge=0)
    stop: list[str] = key([], "texts that end an answer; the token that completes one is its last")
    stop_token_ids: list[int] = key(
        [], "further token ids that end an answer, besides the tokenizer's EOS and the EOS ids of the model"
    )


@config_class
class RolloutConfig:
    """The rollout engine: continuous batching over a paged KV cache."""

    kv_memory: float | str = key(
        0.9,
        "memory of the KV cache: up to 1 a share of the free memory, above 1 bytes, or a text such as 20GiB; requests "
        "that need less take less (vLLM: gpu_memory_utilization)",
    )
    block_size: int = key(16, "tokens of a block of the cache, a power of two", unit="tokens", ge=1)
    token_budget: int = key(
        2048,
        "most rows of a step; longer prompts are computed in parts beside the decoding sequences (vLLM: "
        "max_num_batched_tokens)",
        unit="tokens",
        ge=1,
    )
    order: Literal["first_come", "longest_remaining"] = key("first_come", "which waiting request starts first")
    reuse_prefixes: bool = key(True, "requests reuse cached blocks with the same tokens (vLLM: enable_prefix_caching)")
    cuda_graphs: bool = key(True, "capture decode steps as CUDA graphs, one for each size of the batch")


@config_class
class DataSource:
    """One file and its weight in the blend."""

    path: str = key("", "JSONL or Parquet file; docs/data.md lists the recognised columns")
    input_key: str = key("", _INPUT_KEY)
    output_key: str = key("", "column of the answer, or of the answers to rank, if its name is not recognised")
    weight: float = key(1.0, "uses of each row per epoch (1: once; 0.5: in every other epoch; 2: twice)", gt=0)


@config_class
class ParallelConfig:
    """Parallelism of one model. The data-parallel size is the number of ranks / (tensor x pipeline)."""

    tensor: int = key(1, "tensor-parallel size: ranks over which heads, MLP columns and vocabulary are sharded", ge=1)
    sequence_parallel: bool = key(
        False, "shard the tokens between layers over the tensor-parallel ranks: less activation memory, same traffic"
    )
    pipeline: int = key(1, "pipeline-parallel size: ranks with consecutive layers", ge=1)
    virtual_pipeline: int = key(
        1, "interleaved stages per pipeline rank: a smaller bubble, more messages; needs pipeline above 1", ge=1
    )
    pipeline_split: list[int] = key([], "layers of each stage in the order of the forward pass; empty: even")


@config_class
class LoRAConfig:
    """Low-rank adapters: a projection's product x W^T becomes x W^T + alpha / rank * (x A^T) B^T; A and B train."""

    rank: int = key(16, "rank of the adapters (peft: r; verl: lora_rank)", ge=1)
    alpha: float = key(32.0, "the adapters' products are multiplied by alpha / rank (peft, verl: lora_alpha)", gt=0)
    target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "projections of attention and MLP that get an adapter, by their Hugging Face names (peft, verl: "
        "target_modules)",
    )
    use_rslora: bool = key(False, "multiply by alpha / sqrt(rank) instead (peft: use_rslora)")


@config_class
class RunConfig:
    """Settings that all training commands share."""

    dir: str = key(
        "", "folder of the run: metrics, checkpoints, exported model; must be empty unless resume or overwrite is set"
    )
    resume: Literal[False, True, "auto"] = key(
        False,
        "resume from the last complete checkpoint in dir; auto: start from the beginning if there is none (a restart "
        "by torchrun --max-restarts uses auto)",
    )
    overwrite: bool = key(
        False,
        "replace an earlier run in dir: its files are removed when the new run has begun, other files in dir stay; "
        "not with resume=true (with resume=auto: only a run without a checkpoint is replaced)",
    )
    checkpoint_in_background: Literal[False, True, "auto"] = key(
        "auto", "copy the state to host memory and train while it is written; auto: on a GPU only"
    )
    seed: int = key(0, "seed of all random numbers", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations (bf16 keeps fp32 master weights)")
    log_to: list[str] = key([], "loggers besides metrics.jsonl and TensorBoard: wandb, mlflow")
    recompute: Literal["none", "selective", "full"] = key(
        "none", "activations recomputed in the backward pass: none, attention (selective), or complete layers (full)"
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
    token_budget: int = key(4096, _TOKEN_BUDGET, unit="tokens", ge=1)
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
    sharing: Literal["full", "lora"] = key("full", _SHARING)
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapter, with sharing=lora")
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(weight_decay=0.1, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")
    run: Section[RunConfig] = key(RunConfig(dir="runs/sft"), "the run")


@config_class
class SampleConfig(Loadable):
    """Several answers per prompt from a checkpoint, as JSONL ready for ranking."""

    section = "sample"
    model: str = key("", "Hugging Face checkpoint")
    prompts: str = key("", "JSONL or Parquet file of prompts (`prompt` or `messages`; other columns are kept)")
    input_key: str = key("", _INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", _PROMPT_TRUNCATION)
    out: str = key("", "JSONL file to write: one row per prompt with `responses`")
    samples_per_prompt: int = key(4, "answers per prompt (K)", ge=1)
    temperatures: list[float] = key(
        [], "temperatures of the K answers, repeated in order (0: greedy); empty: sampling.temperature for all"
    )
    limit: int = key(0, "number of prompts to use; 0: all", ge=0)
    max_batch: int = key(256, _MAX_BATCH, ge=1)
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
    token_budget: int = key(4096, _TOKEN_BUDGET, unit="tokens", ge=1)
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
    sharing: Literal["full", "lora"] = key("full", _SHARING)
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapter, with sharing=lora; the scalar head trains with it")
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=3e-4, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of the model")
    run: Section[RunConfig] = key(RunConfig(dir="runs/reward"), "the run")


@config_class
class CriticConfig:
    """Initial weights, warm-up and optimizer of the critic."""

    init: Literal["reward", "actor"] = key(
        "reward",
        "initial weights: the first reward model's, with its head scaled to the returns, or the actor's, with a zero "
        "head",
    )
    warmup_iterations: int = key(0, "number of first iterations in which only the critic is trained", ge=0)
    epochs: int = key(0, "the critic's passes over an iteration's experience; 0: ppo_epochs", ge=0)
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=1e-4), "AdamW of the critic")


@config_class
class OffloadConfig:
    """State that leaves the device while its role is not in use."""

    roles: Literal["none", "optimizer", "all"] = key(
        "none",
        "what leaves the device while its role is not in use: nothing; gradients and optimizer state; parameters too",
    )
    actor: Literal["none", "optimizer", "all"] | None = key(None, "of the actor; empty: as `roles`")
    critic: Literal["none", "optimizer", "all"] | None = key(None, "of the critic; empty: as `roles`")
    reference: Literal["none", "all", "layers"] | None = key(
        None, "of the reference; layers: all, and a pass brings one layer after another; empty: as `roles`"
    )
    reward: Literal["none", "all", "layers"] | None = key(None, "of the reward models, as `reference`")
    prefetch: bool = key(
        False,
        "bring back what the next role needs while the present one computes; the device then holds state of both",
    )


@config_class
class RewardSource:
    """A reward source: a reward model, a reward function or an HTTP scorer, with its weight in the score."""

    name: str = key("", "name in metrics and rollouts; empty: the function's name, the URL's host, or reward_model")
    model: str = key("", "checkpoint of a reward model, as ppo.reward_model; set one of model, function and url")
    function: str = key("", "`file.py:function` or `module:function`")
    url: str = key("", "URL of an HTTP scorer, which gets the samples by POST")
    weight: float = key(1.0, "weight of its score in the total; only scores of reward models are normalized before")
    style: Literal["auto", "icegrt", "trl", "verl", "openrlhf"] = key(
        "auto", "library whose signature the function has; auto: by the names of its parameters"
    )
    label_key: str = key("", "column of verl's ground_truth or OpenRLHF's labels; empty: their usual columns")


@config_class
class HTTPConfig:
    """Requests to HTTP scorers."""

    batch_size: int = key(32, "samples per request", ge=1)
    concurrency: int = key(4, "requests at a time, per scorer and rank", ge=1)
    timeout_seconds: float = key(60.0, "time limit of a request", unit="seconds", gt=0)
    retries: int = key(5, "retries after no answer, a time-out, or status 408, 425, 429 or 5xx", ge=0)
    backoff_seconds: float = key(
        0.5, "pause before the first retry; doubles, with jitter, up to 30", unit="seconds", ge=0
    )
    max_answer_bytes: int = key(16_000_000, "longest accepted answer", unit="bytes", ge=1)
    token_env: str = key("", "environment variable of the token for `Authorization: Bearer`; empty: no token")


@config_class
class RewardCallConfig:
    """Additional reward sources, and calls of functions and HTTP scorers."""

    sources: SectionList[RewardSource] = key(
        [], "additional reward sources, besides ppo.reward_model and ppo.reward_function"
    )
    workers: int = key(1, "worker processes per function and rank; 0: call it in the training process", ge=0)
    timeout_seconds: float = key(
        300.0, "time limit of one call of a function; after it the worker is killed; 0: no limit",
        unit="seconds", ge=0,
    )  # fmt: skip
    on_error: Literal["stop", "score", "drop"] = key(
        "stop", "if a source fails on a response: end the run, use error_score as its score, or drop the response"
    )
    error_score: float = key(0.0, "the source's score of a response that it failed on, with on_error=score")
    http: Section[HTTPConfig] = key(HTTPConfig(), "requests to HTTP scorers")


@config_class
class PPOConfig(Loadable):
    """PPO with actor, reference, reward models and critic (ICE-GRT)."""

    section = "ppo"
    # The four roles and the data.
    actor: str = key("", "Hugging Face checkpoint of the actor")
    reference: str = key("", "checkpoint of the KL penalty's reference model; empty: the actor's")
    reward_model: str = key(
        "",
        "checkpoint of the reward model (sequence classification, one label); with sharing=lora it may be an adapter "
        "on the actor's checkpoint; empty: none",
    )
    reward_model_weight: float = key(1.0, "weight of the reward model's normalized score in the total")
    reward_function: str = key("", "`file.py:function` or `module:function`; empty: none")
    reward_function_weight: float = key(1.0, "weight of the function's score in the total; it is not normalized")
    reward: Section[RewardCallConfig] = key(RewardCallConfig(), "additional reward sources, and calls of functions")
    prompts: str = key("", "JSONL or Parquet file of prompts; the reward function gets all columns")
    eval_prompts: str = key("", "file of held-out prompts; empty: no evaluation")
    input_key: str = key("", _INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", _PROMPT_TRUNCATION)
    critic: Section[CriticConfig] = key(CriticConfig(), "the critic")
    # The iteration.
    iterations: int = key(24, "PPO iterations", ge=1)
    prompts_per_iteration: int = key(32, "prompts per iteration, over all ranks (verl: data.train_batch_size)", ge=1)
    samples_per_prompt: int = key(4, "responses per prompt", ge=1)
    ppo_epochs: int = key(2, "passes over an iteration's experience", ge=1)
    minibatches: int = key(
        2,
        "number of minibatches per pass, with one optimizer step each (TRL: num_mini_batches; verl: "
        "data.train_batch_size / actor.ppo_mini_batch_size)",
        ge=1,
    )
    minibatch_by: Literal["response", "prompt"] = key(
        "response",
        "what is drawn into a minibatch: single responses, or prompts with all their responses, which then share the "
        "prompt's tokens in inference and update",
    )
    token_budget: int = key(4096, _TOKEN_BUDGET, unit="tokens", ge=1)
    chunk_rows: int = key(
        0, "logit chunk size: rows of logits computed at a time; 0: automatic, fixed for the run", ge=0
    )
    reuse_update_logprob: bool = key(
        False, "with ppo_epochs=1 and minibatches=1: use the log-probs of the update's own forward pass as the old ones"
    )
    sampling: Section[SamplingConfig] = key(
        SamplingConfig(), "sampling of the responses (scoring and update divide the logits by temperature too)"
    )
    max_batch: int = key(256, _MAX_BATCH, ge=1)
    rollout: Section[RolloutConfig] = key(RolloutConfig(), "the rollout engine")
    # Score and reward.
    score_scale: bool = key(True, "divide each reward model's score by its running standard deviation")
    score_shift: bool = key(False, "subtract its running mean first")
    score_clip: float = key(5.0, "clip the normalized score to +- this; 0: no clipping", ge=0)
    missing_eos_penalty: float = key(0.0, "subtracted from the score of a truncated response", ge=0)
    bootstrap_truncated: bool = key(
        False, "bootstrap the return of a truncated response from the critic's value after its last token"
    )
    # KL control.
    kl_coef: float = key(0.05, "coefficient of the KL penalty against the reference", ge=0)
    kl_in: Literal["reward", "loss"] = key("reward", "subtract the KL penalty from the reward, or add it to the loss")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = key(
        "k1", "estimator of the KL per token (in the loss, its gradient is that of k2)"
    )
    kl_control: Literal["fixed", "adaptive"] = key("fixed", "keep kl_coef constant, or adapt it to the target")
    kl_target_nats_per_response: float = key(
        6.0, "target of the adaptive controller; an alarm is raised at twice it", unit="nats per response", gt=0
    )
    kl_horizon_responses: int = key(10_000, "horizon of the adaptive controller", unit="responses", ge=1)
    # Advantages and losses.
    gamma: float = key(1.0, "discount", gt=0, le=1)
    lam: float = key(0.95, "GAE's lambda", ge=0, le=1)
    whiten_advantages: bool = key(True, "whiten over the global batch (population variance)")
    clip_low: float = key(0.2, "clip the policy ratio below 1 - this [paper: 0.2]", gt=0, lt=1)
    clip_high: float = key(0.2, "clip the policy ratio above 1 + this [paper: 0.2]", gt=0)
    dual_clip: float | None = key(
        None, "for a negative advantage A, the loss is at most this times -A; empty: no limit", gt=1
    )
    value_clip: float = key(0.2, "clip the value to the old value +- this; 0: no clipping", ge=0)
    entropy_coef: float = key(0.0, "weight of the entropy bonus", ge=0)
    ptx_coef: float = key(0.0, "weight of the pretraining (ptx) loss added to the actor's loss", ge=0)
    ptx_data: SectionList[DataSource] = key(
        [], "data of the ptx loss: prompt and response, or messages; loss on responses"
    )
    ptx_sequences: int = key(16, "ptx sequences per minibatch", ge=1)
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=1e-5), "AdamW of the actor")
    # Evaluation, checkpoints, the run.
    eval_every: int = key(5, "iterations between evaluations on eval_prompts; 0: before and after training only", ge=0)
    eval_limit: int = key(0, "number of held-out prompts to use; 0: all", ge=0)
    checkpoint_every: int = key(5, "iterations between checkpoints; the last iteration always writes one", ge=1)
    keep_checkpoints: int = key(
        2, "number of last checkpoints kept, besides the one with the highest evaluated held-out score", ge=1
    )
    sharing: Literal["full", "lora"] = key(
        "full",
        "weights of the roles: a model for each (full), or one frozen model with an adapter for the actor, one for the "
        "critic, and none for the reference (lora)",
    )
    lora: Section[LoRAConfig] = key(LoRAConfig(), "the adapters of actor and critic, with sharing=lora")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "parallelism of each of the models")
    offload: Section[OffloadConfig] = key(OffloadConfig(), "state that leaves the device while its role is not in use")
    memory_plan: str = key(
        "",
        "file that `icegrt plan --out` wrote for this run: memory.json then has its peaks beside the measured ones; "
        "empty: none",
    )
    run: Section[RunConfig] = key(RunConfig(dir="runs/ppo"), "the run")

    @property
    def critic_epochs(self) -> int:
        """The critic's passes over an iteration's experience."""
        return self.critic.epochs or self.ppo_epochs


@config_class
class GenerateConfig(Loadable):
    """Answers of a model to prompts, printed or written as JSONL."""

    section = "generate"
    model: str = key("", "Hugging Face checkpoint, or a run's folder")
    prompt: list[str] = key([], "prompts, as texts")
    prompts: str = key("", "JSONL or Parquet file of prompts")
    input_key: str = key("", _INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", _PROMPT_TRUNCATION)
    out: str = key("", "JSONL file to write; empty: print")
    chat: bool = key(True, "apply the tokenizer's chat template, if it has one")
    samples_per_prompt: int = key(1, "answers per prompt", ge=1)
    max_batch: int = key(256, _MAX_BATCH, ge=1)
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
