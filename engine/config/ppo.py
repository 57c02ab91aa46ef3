"""Configuration keys of `ppo`.

Defaults are those of the PPO-RLHF family. A default from the ICE-GRT paper is marked [paper].
"""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import Loadable, Section, SectionList, config_class, key
from icegrt.config.shared import (
    INPUT_KEY,
    MAX_BATCH,
    PROMPT_TRUNCATION,
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
class PretrainConfig:
    """Value pretraining in a PPO run, before its first iteration. The actor stays as it is."""

    iterations: int = key(
        0,
        "most iterations of pretraining, besides ppo.iterations: the critic learns the returns of the initial actor at "
        "lambda 1, without value clipping; 0: none",
        ge=0,
    )
    patience: int = key(
        5, "stop after this many iterations without a higher explained variance of new returns; 0: never", ge=0
    )
    lr: float = key(0.0, "learning rate of pretraining, constant; 0: critic.optimizer.lr", ge=0)


@config_class
class CriticConfig:
    """Initial weights, pretraining, warm-up and optimizer of the critic."""

    model: str = key(
        "",
        "checkpoint of the critic, of any size: a reward model, the model of `icegrt value`, an exported critic or a "
        "TRL model with a value head; empty: as `init` names it",
    )
    new_head: bool = key(False, "`model` may lack a value head, which is then zero")
    init: Literal["reward", "actor"] = key(
        "reward",
        "initial weights, if `model` is empty: the first reward model's, with its head scaled to the returns, or the "
        "actor's, with a zero head",
    )
    freeze: list[str] = key(
        [],
        "modules of the critic that do not train, of attention, mlp, embedding and norm; with sharing=lora their "
        "adapters do not, and attention and mlp alone have adapters",
    )
    pretrain: Section[PretrainConfig] = key(PretrainConfig(), "value pretraining before the first iteration")
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
    input_key: str = key("", INPUT_KEY)
    truncation: Literal["error", "drop", "left"] = key("error", PROMPT_TRUNCATION)
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
    token_budget: int = key(4096, TOKEN_BUDGET, unit="tokens", ge=1)
    chunk_rows: int = key(
        0, "logit chunk size: rows of logits computed at a time; 0: automatic, fixed for the run", ge=0
    )
    reuse_update_logprob: bool = key(
        False,
        "with ppo_epochs=1 and minibatches=1: use the log-probs of the update's own forward pass as the old ones; with "
        "kl_logprobs=rollout inference then has no pass of the actor",
    )
    reuse_update_values: bool = key(
        False,
        "with minibatches=1: the critic learns before the actor, and the forward pass of its first step gives the old "
        "values, so that inference has no pass of the critic",
    )
    sampling: Section[SamplingConfig] = key(
        SamplingConfig(), "sampling of the responses (scoring and update divide the logits by temperature too)"
    )
    max_batch: int = key(256, MAX_BATCH, ge=1)
    rollout: Section[RolloutConfig] = key(RolloutConfig(), "the rollout engine")
    # Score and reward.
    score_scale: bool = key(True, "divide each reward model's score by its running standard deviation")
    score_shift: bool = key(False, "subtract its running mean first")
    score_clip: float = key(5.0, "clip the normalized score to +- this; 0: no clipping", ge=0)
    missing_eos_penalty: float = key(0.0, "subtracted from the score of a truncated response", ge=0)
    overlong_buffer: int = key(
        0,
        "soft penalty on long responses (DAPO): over the last this many tokens before max_new_tokens it grows from 0 "
        "to overlong_factor, and is subtracted from the score; 0: none",
        unit="tokens",
        ge=0,
    )
    overlong_factor: float = key(1.0, "penalty of a response of max_new_tokens tokens", ge=0)
    bootstrap_truncated: bool = key(
        False, "bootstrap the return of a truncated response from the critic's value after its last token"
    )
    # KL control.
    kl_coef: float = key(0.05, "coefficient of the KL penalty against the reference", ge=0)
    kl_in: Literal["reward", "loss"] = key("reward", "subtract the KL penalty from the reward, or add it to the loss")
    kl_logprobs: Literal["inference", "rollout"] = key(
        "inference",
        "actor's log-probs that the KL penalty and its metric read: those of an inference pass, or the rollout's, "
        "which saves that pass with reuse_update_logprob or correction=dis; they agree to about 1e-4 nats in fp32, so "
        "the first iteration's KL is not exactly 0",
    )
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = key(
        "k1", "estimator of the KL per token (in the loss, its gradient is that of k2)"
    )
    kl_control: Literal["fixed", "adaptive"] = key("fixed", "keep kl_coef constant, or adapt it to the target")
    kl_target_nats_per_response: float = key(
        6.0, "target of the adaptive controller; an alarm is raised at twice it", unit="nats per response", gt=0
    )
    kl_horizon_responses: int = key(10_000, "horizon of the adaptive controller", unit="responses", ge=1)
    # Advantages and losses.
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = key(
        "gae",
        "estimator of the advantages; only gae has a critic; rloo and grpo compare the responses to a prompt",
    )
    group_std: Literal["group", "batch", "none"] = key(
        "group",
        "what grpo divides by: the standard deviation of the rewards of a prompt, of the whole batch, or nothing (Dr. "
        "GRPO)",
    )
    gamma: float = key(1.0, "discount; rloo and grpo read the sum of the rewards alone", gt=0, le=1)
    lam: float = key(0.95, "GAE's lambda, of advantages and returns", ge=0, le=1)
    lam_policy: float | Literal["adaptive"] | None = key(
        None,
        "lambda of the advantages, from 0 to 1; adaptive: 1 - 1 / (lam_alpha * tokens of the response), not below 0 "
        "(VAPO); empty: lam",
    )
    lam_alpha: float = key(
        0.05,
        "alpha of lam_policy=adaptive, whose lambda is 0 for a response of up to 1 / lam_alpha tokens (0.05: 20)",
        gt=0,
    )
    lam_value: float | None = key(
        None, "lambda of the returns, which the critic learns (VC-PPO, VAPO: 1); empty: lam", ge=0, le=1
    )
    advantage_unit: Literal["token", "turn"] = key(
        "token",
        "a step of GAE: a token, or a turn, which is a maximal run of unmasked tokens and has one advantage; the "
        "critic then learns at a turn's first token. A response without masked tokens is one turn",
    )
    whiten_advantages: Literal[False, True, "rank", "auto"] = key(
        "auto",
        "whiten over the global batch (population variance); rank: each data-parallel rank by its own moments, for "
        "studies; auto: true for gae and reinforce++, false for rloo and grpo",
    )
    skip_zero_advantage: Literal[False, True, "auto"] = key(
        "auto",
        "leave responses whose advantages are all exactly 0 out of the actor's pass, unless a KL in the loss, an "
        "entropy bonus or positive_nll_coef needs them; they count in the mean of the loss; auto: true without a "
        "critic",
    )
    dynamic_sampling: bool = key(
        False,
        "leave out prompts whose responses all have the same score, and draw others in their place",
    )
    dynamic_sampling_max_rounds: int = key(
        10, "with dynamic_sampling: most draws in an iteration; then prompts that were left out fill it", ge=1
    )
    clip_low: float = key(0.2, "clip the policy ratio below 1 - this [paper: 0.2]", gt=0, lt=1)
    clip_high: float = key(0.2, "clip the policy ratio above 1 + this [paper: 0.2]", gt=0)
    dual_clip: float | None = key(
        None, "for a negative advantage A, the loss is at most this times -A; empty: no limit", gt=1
    )
    correction: Literal["none", "tis", "dis"] = key(
        "none",
        "correction by the rollout's log-probs: none; truncated importance sampling, the weight min(p_old / p_rollout, "
        "tis_cap) beside the clipped ratio (tis); or double-sided, the loss -A r with r = p_new / p_rollout inside "
        "[1 - dis_low, 1 + dis_high] and 0 outside, without clipping and without p_old (dis)",
    )
    correction_level: Literal["token", "sequence"] = key(
        "token",
        "ratio of the correction: of each token, or of the whole response: the product of its tokens' ratios (tis), or "
        "their geometric mean (dis)",
    )
    tis_cap: float = key(2.0, "largest weight of tis (verl: rollout_is_threshold)", gt=0)
    dis_low: float = key(0.2, "dis: no loss below the ratio 1 - this", ge=0, le=1)
    dis_high: float = key(0.2, "dis: no loss above the ratio 1 + this", ge=0)
    loss_aggregation: Literal["token", "sequence", "constant"] = key(
        "token",
        "the policy loss of a minibatch: mean over tokens, mean over responses of their token means, or mean over "
        "responses of the sum over tokens divided by loss_constant (Dr. GRPO)",
    )
    loss_constant: int = key(0, "divisor of loss_aggregation=constant; 0: sampling.max_new_tokens", unit="tokens", ge=0)
    positive_nll_coef: float = key(
        0.0, "weight of the mean of -log p over the tokens of right responses, added to the actor's loss (VAPO)", ge=0
    )
    positive_nll_threshold: float = key(0.5, "a response is right if its score is at least this")
    positive_nll_score: Literal["function", "total"] = key(
        "function", "score that the threshold is of: the task score (first function or HTTP scorer), or the total score"
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
    profile: Section[ProfileConfig] = key(ProfileConfig(), "a trace of some steps")
    run: Section[RunConfig] = key(RunConfig(dir="runs/ppo"), "the run")

    @property
    def has_critic(self) -> bool:
        """Whether the estimator of the advantages reads values."""
        return self.advantage == "gae"

    @property
    def policy_lambda(self) -> float | Literal["adaptive"]:
        """The lambda of the advantages."""
        return self.lam if self.lam_policy is None else self.lam_policy

    @property
    def value_lambda(self) -> float:
        """The lambda of the returns."""
        return self.lam if self.lam_value is None else self.lam_value

    @property
    def has_own_returns(self) -> bool:
        """Whether a return may be something else than the advantage plus the value of the same token."""
        return self.has_critic and (self.advantage_unit == "turn" or self.policy_lambda != self.value_lambda)

    @property
    def critic_warmup(self) -> int:
        """Number of first iterations in which only the critic is trained."""
        return self.critic.warmup_iterations if self.has_critic else 0

    @property
    def whitening(self) -> Literal["global", "rank", "none"]:
        """Which moments the advantages are whitened by."""
        names: dict[bool | str, Literal["global", "rank", "none"]] = {True: "global", "rank": "rank", False: "none"}
        return names.get(self.whiten_advantages, "global" if self.advantage in ("gae", "reinforce++") else "none")

    @property
    def critic_epochs(self) -> int:
        """The critic's passes over an iteration's experience."""
        return self.critic.epochs or self.ppo_epochs

    @property
    def critic_is_inferred(self) -> bool:
        """Whether inference has a pass of the critic; if not, the forward pass of its first step gives the values."""
        return self.has_critic and not self.reuse_update_values

    @property
    def actor_is_inferred(self) -> bool:
        """Whether inference has a pass of the actor; if not, the rollout's log-probs take the place of its own."""
        if self.kl_logprobs == "rollout" and self.reuse_update_logprob:
            return False
        kl_needs_it = self.kl_in == "reward" and self.kl_coef > 0 and self.kl_logprobs == "inference"
        return self.correction != "dis" or kl_needs_it
