"""Every configuration key, with its type, default, unit and meaning. `loader` reads, checks, prints and saves them.

One YAML file may hold the whole recipe: each command reads the section of its own name (`sft:`, `sample:`, `reward:`,
`ppo:`, `generate:`, `export:`), and dotted overrides name the section first (`ppo.kl_coef=0.1`).
Defaults are those of the PPO-RLHF family; none is a figure of the ICE-GRT paper unless its help says so.
"""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import Loadable, Section, SectionList, config_class, key


@config_class
class OptimizerConfig:
    """AdamW with a warm-up and a decay, run by Megatron's distributed optimizer."""

    lr: float = key(1e-5, "peak learning rate", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = key(
        "linear", "decay after the warm-up, to min_lr_fraction * lr"
    )
    min_lr_fraction: float = key(0.0, "learning rate at the end, as a fraction of the peak", ge=0, le=1)
    warmup_fraction: float = key(0.0, "share of all steps spent in linear warm-up", ge=0, lt=1)
    beta1: float = key(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "Adam's decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "Adam's epsilon (a larger one damps early updates)", gt=0)
    weight_decay: float = key(0.0, "decoupled weight decay; norms and biases are spared", ge=0)
    clip_grad: float = key(1.0, "gradient clipping by global norm; 0 turns it off", ge=0)


@config_class
class SamplingConfig:
    """How answers are drawn. top_k and top_p serve `generate` and `sample`; PPO refuses them."""

    temperature: float = key(1.0, "divides the logits in fp32; 0 is greedy", ge=0)
    top_k: int = key(0, "keep the k likeliest tokens; 0 keeps all", ge=0)
    top_p: float = key(1.0, "keep the smallest set of tokens with this probability", gt=0, le=1)
    max_new_tokens: int = key(256, "longest answer", unit="tokens", ge=1)
    stop_token_ids: list[int] = key(
        [], "token ids that end an answer, beside those of the model's configurations and the tokenizer's EOS"
    )


@config_class
class DataSource:
    """One file and its share in the blend."""

    path: str = key("", "JSONL or Parquet file; docs/data.md lists the columns that are recognised")
    input_key: str = key("", "column of the prompt where its name is not recognised (a dot goes into an object)")
    output_key: str = key("", "column of the answer, or of the answers to rank, likewise")
    weight: float = key(1.0, "times each row is seen per epoch (1: once; 0.5: every other row; 2: twice)", gt=0)


@config_class
class ParallelConfig:
    """How one model is cut over ranks; the ranks that torchrun started beyond tensor x pipeline are data parallel."""

    tensor: int = key(1, "ranks that share every layer (heads, MLP columns and vocabulary are cut)", ge=1)
    sequence_parallel: bool = key(
        False, "tensor-parallel ranks also share the tokens between layers: less activation memory, same traffic"
    )
    pipeline: int = key(1, "ranks that share the layers, one stage each", ge=1)
    virtual_pipeline: int = key(
        1, "stages per pipeline rank, interleaved: a smaller bubble for more messages; needs pipeline above 1", ge=1
    )
    pipeline_split: list[int] = key(
        [], "layers of each stage in the order of the forward pass, where they are not to be even"
    )


@config_class
class RunConfig:
    """What every training stage needs to know about the run itself."""

    dir: str = key("", "folder of the run: metrics, checkpoints, exported model; must be empty unless resume is on")
    resume: Literal[False, True, "auto"] = key(
        False,
        "continue from the last whole checkpoint in dir; auto: if there is one, and start anew if there is none (what "
        "torchrun --max-restarts starts again is auto)",
    )
    checkpoint_in_background: Literal[False, True, "auto"] = key(
        "auto", "train on while a checkpoint is written, from a copy in host memory; auto does so on a GPU"
    )
    seed: int = key(0, "seed of everything drawn at random", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations (bf16 keeps fp32 master weights)")
    log_to: list[str] = key([], "loggers beside metrics.jsonl and TensorBoard: wandb, mlflow")
    recompute: Literal["none", "selective", "full"] = key(
        "none", "activations formed again in the backward pass: none, attention (selective), or whole layers (full)"
    )


@config_class
class SFTConfig(Loadable):
    """Supervised fine-tuning: from a base model to the instruction-tuned actor (ICE-Instruct)."""

    section = "sft"
    model: str = key("", "Hugging Face checkpoint to start from")
    data: SectionList[DataSource] = key([], "training files, blended by weight")
    heldout: SectionList[DataSource] = key([], "held-out files; their loss is reported before, during and after")
    epochs: float = key(3.0, "passes over the blend", gt=0)
    batch_sequences: int = key(32, "sequences per optimizer step", ge=1)
    token_budget: int = key(4096, "most tokens in a micro-batch", unit="tokens", ge=1)
    max_length: int = key(0, "longest sequence; 0 takes the model's context", unit="tokens", ge=0)
    truncation: Literal["error", "drop", "left", "right"] = key(
        "error",
        "a longer row: refuse it, leave it out, or cut the prompt's beginning (left) or the response's end (right)",
    )
    eval_every: int = key(0, "optimizer steps between evaluations; 0 evaluates before and after only", ge=0)
    checkpoint_every: int = key(0, "optimizer steps between checkpoints; 0 writes one at the end only", ge=0)
    keep_checkpoints: int = key(2, "last checkpoints kept, beside the one with the lowest held-out loss", ge=1)
    chunk_rows: int = key(0, "rows of logits formed at once; 0 chooses", ge=0)
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(weight_decay=0.1, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "how the model is cut over ranks")
    run: Section[RunConfig] = key(RunConfig(dir="runs/sft"), "the run")


@config_class
class SampleConfig(Loadable):
    """Several answers per prompt from a checkpoint, as JSONL ready for ranking."""

    section = "sample"
    model: str = key("", "Hugging Face checkpoint")
    prompts: str = key("", "JSONL or Parquet file of prompts (`prompt` or `messages`; other columns are kept)")
    input_key: str = key("", "column of the prompt where its name is not recognised (a dot goes into an object)")
    truncation: Literal["error", "drop", "left"] = key(
        "error", "a prompt that leaves no room for the answer: refuse it, leave it out, or cut its beginning"
    )
    out: str = key("", "JSONL file to write: one row per prompt with `responses`")
    samples_per_prompt: int = key(4, "answers per prompt (K)", ge=1)
    temperatures: list[float] = key(
        [], "the K answers take turns at these (0 is greedy); empty: sampling.temperature for all"
    )
    limit: int = key(0, "prompts to use; 0 uses all", ge=0)
    max_batch: int = key(256, "sequences decoded at once", ge=1)
    score_function: str = key("", "`file.py:function` that scores answers: rows then carry `scores`")
    seed: int = key(0, "seed of the sampler", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations")
    sampling: Section[SamplingConfig] = key(SamplingConfig(), "how answers are drawn")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "how the model is cut over ranks")


@config_class
class RewardConfig(Loadable):
    """Reward model: pairwise loss over the ranking of all responses of a prompt (ICE-Reward)."""

    section = "reward"
    model: str = key("", "Hugging Face checkpoint to start from (the instruction-tuned actor)")
    data: SectionList[DataSource] = key([], "`prompt` with `responses` and `scores` or `ranks`, or `chosen`/`rejected`")
    heldout: SectionList[DataSource] = key([], "held-out files of the same form")
    heldout_fraction: float = key(0.1, "share of the prompts held out where no held-out file is named", ge=0, lt=1)
    epochs: float = key(1.0, "passes over the prompts (two overfit easily)", gt=0)
    batch_prompts: int = key(16, "prompts per optimizer step; all responses of a prompt are in one micro-batch", ge=1)
    token_budget: int = key(4096, "most tokens in a micro-batch", unit="tokens", ge=1)
    max_length: int = key(0, "longest sequence; 0 takes the model's context", unit="tokens", ge=0)
    truncation: Literal["error", "drop", "left", "right"] = key(
        "error",
        "a longer row: refuse it, leave it out, or cut the prompt's beginning (left) or the responses' ends (right)",
    )
    tie_margin: float = key(0.0, "scores closer than this are ties and left out", ge=0)
    eval_every: int = key(0, "optimizer steps between evaluations; 0 evaluates each quarter of an epoch", ge=0)
    patience: int = key(3, "evaluations without a better held-out loss before stopping; 0 never stops", ge=0)
    keep_checkpoints: int = key(
        2,
        "last checkpoints kept (one is written at each evaluation), beside the one with the lowest held-out loss",
        ge=1,
    )
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=3e-4, warmup_fraction=0.03), "AdamW")
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "how the model is cut over ranks")
    run: Section[RunConfig] = key(RunConfig(dir="runs/reward"), "the run")


@config_class
class CriticConfig:
    """Where the critic comes from and how it is warmed up."""

    init: Literal["reward", "actor"] = key(
        "reward",
        "start from the (first) reward model, its head on the reward's scale, or from the actor with a zero head",
    )
    warmup_iterations: int = key(0, "first iterations in which only the critic learns", ge=0)
    epochs: int = key(0, "the critic's passes over an iteration's experience; 0: as many as ppo_epochs", ge=0)
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=1e-4), "AdamW of the critic")


@config_class
class RewardSource:
    """A reward model, a reward function or an HTTP scorer, with its weight in the score."""

    name: str = key("", "what metrics and rollouts call it; empty: the function's name, the URL's host, reward_model")
    model: str = key("", "checkpoint of a reward model, as ppo.reward_model; give one of this, function and url")
    function: str = key("", "`file.py:function` or `module:function`")
    url: str = key("", "an HTTP scorer that samples are posted to")
    weight: float = key(1.0, "weight of its score, of which only a reward model's is normalised")
    style: Literal["auto", "icegrt", "trl", "verl", "openrlhf"] = key(
        "auto", "whose form the function has; auto tells by the names of its parameters"
    )
    label_key: str = key("", "column that verl's ground_truth or OpenRLHF's labels are taken from; empty: their usual")


@config_class
class HTTPConfig:
    """How HTTP scorers are asked."""

    batch_size: int = key(32, "samples per request", ge=1)
    concurrency: int = key(4, "requests at a time, per scorer and rank", ge=1)
    timeout_seconds: float = key(60.0, "longest that a request may take", unit="seconds", gt=0)
    retries: int = key(5, "further tries after no answer, a time-out, or status 408, 425, 429 or 5xx", ge=0)
    backoff_seconds: float = key(
        0.5, "pause before the second try; doubles, with jitter, up to 30", unit="seconds", ge=0
    )
    max_answer_bytes: int = key(16_000_000, "longest answer that is read", unit="bytes", ge=1)
    token_env: str = key("", "environment variable with the token to send as `Authorization: Bearer`; empty sends none")


@config_class
class RewardCallConfig:
    """More sources of reward, and how functions and HTTP scorers are called."""

    sources: SectionList[RewardSource] = key([], "what pays beside ppo.reward_model and ppo.reward_function")
    workers: int = key(1, "processes per function and rank; 0 calls it in the process that trains", ge=0)
    timeout_seconds: float = key(
        300.0, "longest that one call of a function may take; its worker is then killed; 0: no limit",
        unit="seconds", ge=0,
    )  # fmt: skip
    on_error: Literal["stop", "score", "drop"] = key(
        "stop", "a response that a source fails on: end the run, give it error_score, or train without it"
    )
    error_score: float = key(0.0, "the source's score of a response that it failed on, with on_error=score")
    http: Section[HTTPConfig] = key(HTTPConfig(), "HTTP scorers")


@config_class
class PPOConfig(Loadable):
    """PPO with actor, reference, reward and critic (ICE-GRT)."""

    section = "ppo"
    # The four roles and the data.
    actor: str = key("", "Hugging Face checkpoint of the actor")
    reference: str = key("", "checkpoint that the KL is measured against; empty takes the actor's")
    reward_model: str = key("", "checkpoint of the reward model (sequence classification, one label); empty uses none")
    reward_model_weight: float = key(1.0, "weight of the reward model's (normalised) score")
    reward_function: str = key("", "`file.py:function` or `module:function`; empty uses none")
    reward_function_weight: float = key(1.0, "weight of the function's score, which is not normalised")
    reward: Section[RewardCallConfig] = key(RewardCallConfig(), "more sources of reward, and how they are called")
    prompts: str = key("", "JSONL or Parquet file of prompts; all columns reach the reward function")
    eval_prompts: str = key("", "file of held-out prompts; empty evaluates nothing")
    input_key: str = key("", "column of the prompt where its name is not recognised (a dot goes into an object)")
    truncation: Literal["error", "drop", "left"] = key(
        "error", "a prompt that leaves no room for the answer: refuse it, leave it out, or cut its beginning"
    )
    critic: Section[CriticConfig] = key(CriticConfig(), "the critic")
    # The iteration.
    iterations: int = key(24, "PPO iterations", ge=1)
    prompts_per_iteration: int = key(32, "prompts drawn per iteration", ge=1)
    samples_per_prompt: int = key(4, "responses per prompt", ge=1)
    ppo_epochs: int = key(2, "passes over an iteration's experience", ge=1)
    minibatches: int = key(2, "optimizer steps per pass, whatever the micro-batch size", ge=1)
    token_budget: int = key(4096, "most tokens in a micro-batch", unit="tokens", ge=1)
    chunk_rows: int = key(0, "rows of logits formed at once; 0 chooses once per run", ge=0)
    reuse_update_logprob: bool = key(
        False, "with one epoch of one minibatch: the update's own forward is the old log-prob"
    )
    sampling: Section[SamplingConfig] = key(
        SamplingConfig(), "how responses are drawn (temperature also divides the logits in scoring and update)"
    )
    max_batch: int = key(256, "sequences decoded at once", ge=1)
    # Score and reward.
    score_scale: bool = key(True, "divide each reward model's score by its running standard deviation")
    score_shift: bool = key(False, "subtract its running mean first")
    score_clip: float = key(5.0, "clip the normalised score to +- this; 0 does not", ge=0)
    missing_eos_penalty: float = key(0.0, "subtracted from the score of a truncated response; 0 takes nothing", ge=0)
    bootstrap_truncated: bool = key(
        False, "a truncated response bootstraps from the critic's value after its last token"
    )
    # KL control.
    kl_coef: float = key(0.05, "coefficient of the KL penalty against the reference", ge=0)
    kl_in: Literal["reward", "loss"] = key("reward", "where the KL penalty enters")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = key(
        "k1", "estimator of the KL per token (in the loss its gradient is k2's)"
    )
    kl_control: Literal["fixed", "adaptive"] = key("fixed", "keep kl_coef, or steer it towards the target")
    kl_target_nats_per_response: float = key(
        6.0, "the adaptive controller's target; alarms at twice it", unit="nats per response", gt=0
    )
    kl_horizon_responses: int = key(10_000, "the adaptive controller's horizon", unit="responses", ge=1)
    # Advantages and losses.
    gamma: float = key(1.0, "discount", gt=0, le=1)
    lam: float = key(0.95, "GAE's lambda", ge=0, le=1)
    whiten_advantages: bool = key(True, "whiten over the whole global batch (population variance)")
    clip_low: float = key(0.2, "policy ratio clipped below 1 - this [paper: 0.2]", gt=0, lt=1)
    clip_high: float = key(0.2, "policy ratio clipped above 1 + this [paper: 0.2]", gt=0)
    dual_clip: float | None = key(None, "for negative advantages the loss is at most this times -A; empty: off", gt=1)
    value_clip: float = key(0.2, "value clipped to the old value +- this; 0 does not clip", ge=0)
    entropy_coef: float = key(0.0, "weight of the entropy bonus", ge=0)
    ptx_coef: float = key(0.0, "weight of the pretraining loss mixed into the actor's", ge=0)
    ptx_data: SectionList[DataSource] = key([], "text for ptx_coef: prompt/response or messages, loss on responses")
    ptx_sequences: int = key(16, "ptx sequences per minibatch", ge=1)
    optimizer: Section[OptimizerConfig] = key(OptimizerConfig(lr=1e-5), "AdamW of the actor")
    # Evaluation, checkpoints, the run.
    eval_every: int = key(5, "iterations between evaluations on eval_prompts; 0 evaluates before and after only", ge=0)
    eval_limit: int = key(0, "held-out prompts to use; 0 uses all", ge=0)
    checkpoint_every: int = key(5, "iterations between checkpoints; the last one is always written", ge=1)
    keep_checkpoints: int = key(
        2, "last checkpoints kept, beside the one with the highest held-out score (of those with an evaluation)", ge=1
    )
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "how each of the four models is cut over ranks")
    run: Section[RunConfig] = key(RunConfig(dir="runs/ppo"), "the run")

    @property
    def critic_epochs(self) -> int:
        """The critic's passes over an iteration's experience."""
        return self.critic.epochs or self.ppo_epochs


@config_class
class GenerateConfig(Loadable):
    """Answers to prompts, printed or written as JSONL."""

    section = "generate"
    model: str = key("", "Hugging Face checkpoint, or a run's folder")
    prompt: list[str] = key([], "prompts given here")
    prompts: str = key("", "JSONL or Parquet file of prompts")
    input_key: str = key("", "column of the prompt where its name is not recognised (a dot goes into an object)")
    truncation: Literal["error", "drop", "left"] = key(
        "error", "a prompt that leaves no room for the answer: refuse it, leave it out, or cut its beginning"
    )
    out: str = key("", "JSONL file to write; empty prints")
    chat: bool = key(True, "apply the tokenizer's chat template, if it has one")
    samples_per_prompt: int = key(1, "answers per prompt", ge=1)
    max_batch: int = key(256, "sequences decoded at once", ge=1)
    seed: int = key(0, "seed of the sampler", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations")
    sampling: Section[SamplingConfig] = key(
        SamplingConfig(temperature=0.0), "how answers are drawn; greedy unless asked"
    )
    parallel: Section[ParallelConfig] = key(ParallelConfig(), "how the model is cut over ranks")


@config_class
class ExportConfig(Loadable):
    """A run's checkpoint becomes a Hugging Face checkpoint."""

    section = "export"
    run: str = key("", "folder of a run")
    role: Literal["actor", "critic"] = key("actor", "which trained model (SFT and reward runs have only one)")
    checkpoint: str = key("latest", "which checkpoint: latest, best (by held-out score or loss), or step_NNNNNN")
    out: str = key("", "folder to write; must be empty or absent")
    dtype: Literal["fp32", "bf16"] = key("fp32", "dtype of the exported weights")
    shard_gigabytes: float = key(5.0, "most that one file of weights holds", unit="GB", gt=0)
