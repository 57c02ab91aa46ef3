"""Check a PPO run's configuration and inputs, and build its components, before any time is spent on training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icegrt.config import PPOConfig
from icegrt.data import (
    BlendedDataset,
    EncodedDataset,
    ExampleEncoder,
    Prompt,
    PromptSampler,
    open_rows,
    report_lengths,
    stop_ids,
)
from icegrt.data.training_data import encode_prompts, encode_sources
from icegrt.data.types import Rows, Tokenizer, TokenizerSource
from icegrt.distributed.cluster import Cluster
from icegrt.errors import ConfigError
from icegrt.model.architecture import Architecture
from icegrt.model.build import check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader, ModelSource
from icegrt.model.hf.score_statistics import saved_statistics
from icegrt.model.lora.spec import AdapterSpec
from icegrt.ppo.estimator_keys import check_estimator
from icegrt.ppo.evaluator import Evaluator
from icegrt.ppo.kl_controller import FixedKL, kl_controller
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.ppo.rewards import RewardComputer, RewardModel
from icegrt.ppo.role_setup import build_roles, role_sources
from icegrt.ppo.scores import RunningScoreNormalizer, RunningScoreNormalizers
from icegrt.ppo.scoring import LogprobScorer
from icegrt.ppo.update import Updater
from icegrt.residency import KINDS
from icegrt.roles.freezing import check_freeze
from icegrt.roles.role import Role, TrainableRole
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.samples import sample_of
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling
from icegrt.training.inputs import resolve_chunk_rows, tokenizer_for
from icegrt.utils.console import warn


@dataclass(frozen=True)
class PPOInputs:
    """Models and data of a run, from Python or from the configuration; nothing is loaded yet.

    Attributes:
        actor, reference, critic: path or `transformers` model; reference and critic may be None.
        tokenizer: None: the actor's.
        rewards: reward models, functions and HTTP scorers.
        prompts, eval_prompts: path, rows or `datasets.Dataset`; eval_prompts may be None.
    """

    actor: ModelSource
    tokenizer: TokenizerSource | None
    rewards: RewardComposition
    prompts: Rows
    reference: ModelSource | None
    critic: ModelSource | None
    eval_prompts: Rows | None


@dataclass(frozen=True)
class PPOComponents:
    """The objects that a PPO run consists of.

    Attributes:
        tokenizer: shared by all roles.
        sampling: how rollouts are drawn.
        prompts, eval_prompts: encoded; no eval prompts: an empty list.
        prompt_sampler: the order of the prompts.
        ptx: pretraining text to mix in; None without.
        roles: actor, reference, one per reward model, critic if the estimator of the advantages has one.
        engine: the actor's rollout engine.
        reward_computer: scores responses with all sources of reward.
        normalizers: one per reward model.
        scorer: reads log-probs under actor and reference.
        evaluator: answers and scores held-out prompts.
        updater: takes the optimizer steps.
        kl_controller: holds the KL coefficient.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    prompts: EncodedDataset[Prompt]
    eval_prompts: Sequence[Prompt]
    prompt_sampler: PromptSampler
    ptx: BlendedDataset | None
    roles: dict[str, Role]
    engine: RolloutEngine
    reward_computer: RewardComputer
    normalizers: RunningScoreNormalizers
    scorer: LogprobScorer
    evaluator: Evaluator
    updater: Updater
    kl_controller: FixedKL

    @property
    def actor(self) -> TrainableRole:
        """The policy that is trained."""
        return self.roles["actor"]

    @property
    def reference(self) -> Role:
        """The frozen policy that the KL is measured against."""
        return self.roles["reference"]

    @property
    def critic(self) -> TrainableRole | None:
        """The value model; None if the estimator of the advantages has none."""
        return self.roles.get("critic")


def build_ppo(
    config: PPOConfig, inputs: PPOInputs, cluster: Cluster, resumed_chunk_rows: int | None = None
) -> PPOComponents:
    """Build all components of a run.

    Args:
        config: checked by `check_config`.
        inputs: models and data.
        cluster: the open cluster.
        resumed_chunk_rows: logit chunk size of the checkpoint to resume from.

    Raises:
        UserError: an input cannot be used. The cheapest checks come first.
    """
    # 1. The layout must divide the model, before workers start and data is encoded.
    pretrained = HFCheckpointReader(inputs.actor)
    architecture = pretrained.architecture
    check_parallelism(architecture, cluster)
    inputs.rewards.sources.start()

    # 2. Tokenizer and data.
    tokenizer = tokenizer_for(inputs.tokenizer, inputs.actor, architecture)
    stops = stop_ids(
        tokenizer,
        architecture.hf_config,
        pretrained.folder,
        config.sampling.stop_token_ids,
        architecture.generation_config,
    )
    context = architecture.context_length
    prompts = encode_run_prompts(config, "prompts", inputs.prompts, tokenizer, context)
    if config.prompts_per_iteration > len(prompts):
        warn(
            f"ppo.prompts_per_iteration is {config.prompts_per_iteration}, but there are {len(prompts)} prompts: an "
            f"iteration draws some of them several times. Add prompts, or lower it to {len(prompts)} and raise "
            "ppo.samples_per_prompt"
        )
    eval_prompts: Sequence[Prompt] = []
    if inputs.eval_prompts is not None:
        eval_prompts = encode_run_prompts(
            config, "eval_prompts", inputs.eval_prompts, tokenizer, context, config.eval_limit
        )
    ptx = None
    if config.ptx_coef:
        encoder = ExampleEncoder(tokenizer, min(context, config.token_budget), stop_ids=stops)
        ptx = BlendedDataset(encode_sources("ppo.ptx_data", config.ptx_data, None, encoder), config.run.seed)

    # 3. Reward normalizers, models and roles.
    specs = inputs.rewards.models
    normalizers = RunningScoreNormalizers(
        {spec.name: RunningScoreNormalizer(config, saved_statistics(spec.model)) for spec in specs.values()}
    )
    sources = role_sources(config, pretrained, inputs.reference, inputs.rewards, inputs.critic)
    architectures = {name: source.reader.architecture for name, source in sources.items()}
    check_lengths(config, [dataset for dataset in (prompts, eval_prompts) if dataset], architectures)
    head_scale = 1.0
    if config.has_critic and inputs.critic is None and config.critic.init == "reward":
        # The reward model's head returns raw scores; returns are on the scale of weighted, normalised scores.
        first = next(iter(specs.values()))
        head_scale = first.weight * normalizers[first.name].factor
    roles = build_roles(config, sources, cluster, head_scale)

    # 4. What works on the roles. Chunks depend on the memory that is free beside the actor and its optimizer.
    actor, reference, critic = roles["actor"], roles["reference"], roles.get("critic")
    with actor.placement.hold(*KINDS):
        chunk_rows = resolve_chunk_rows(config.chunk_rows, architecture, resumed_chunk_rows)
    scorer = LogprobScorer(config.sampling.temperature, chunk_rows)
    settings = RolloutSettings.of(config.rollout, config.max_batch)
    engine = RolloutEngine(actor.model, tokenizer, stop_token_ids=stops, settings=settings)
    reference.model.limit_vocabulary(len(tokenizer))  # as the engine limits the actor's
    reward_models = [RewardModel(spec.name, spec.weight, roles[role]) for role, spec in specs.items()]
    reward_computer = RewardComputer(reward_models, inputs.rewards.sources, tokenizer, cluster)
    return PPOComponents(
        tokenizer=tokenizer,
        sampling=Sampling.of(config.sampling, config.run.seed),
        prompts=prompts,
        eval_prompts=eval_prompts,
        prompt_sampler=PromptSampler(len(prompts), config.run.seed),
        ptx=ptx,
        roles=roles,
        engine=engine,
        reward_computer=reward_computer,
        normalizers=normalizers,
        scorer=scorer,
        evaluator=Evaluator(config, engine, reward_computer, normalizers, scorer, actor, reference, cluster),
        updater=Updater(config, actor, critic, scorer, cluster),
        kl_controller=kl_controller(config),
    )


def probe_reward_sources(components: PPOComponents) -> None:
    """Score a few short responses: a reward function that fails must fail before the first rollout. Collective."""
    sources = components.reward_computer.reward_sources
    if not sources:
        return
    prompts, sampling = components.prompts[:2], components.sampling
    sampling = dataclasses.replace(sampling, max_new_tokens=min(4, sampling.max_new_tokens))
    responses = components.engine.generate([p.tokens for p in prompts], 1, sampling)
    components.engine.release()
    sources.probe([sample_of(components.tokenizer, r, prompts[r.prompt_index]) for r in responses])


# -- checks ------------------------------------------------------------------------------------------------------------


def check_config(config: PPOConfig) -> None:
    """Raise `ConfigError` for keys that contradict each other; it names them."""
    sampling = config.sampling
    if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0:
        raise ConfigError(
            "ppo.sampling.top_k, ppo.sampling.top_p and ppo.sampling.min_p are for generate and sample: the log-probs "
            "that PPO trains on cannot mirror the truncation. Set top_k=0, top_p=1 and min_p=0"
        )
    if sampling.min_new_tokens:
        raise ConfigError(
            "ppo.sampling.min_new_tokens is for generate and sample: the log-probs that PPO trains on count the stop "
            "tokens that it excludes. Set it to 0"
        )
    if sampling.temperature <= 0:
        raise ConfigError("ppo.sampling.temperature must be above 0: a greedy policy explores nothing")
    check_freeze(config.critic.freeze, "ppo.critic.freeze")
    if config.sharing == "lora":
        AdapterSpec.of(config.lora, "ppo.lora")
        if config.offload.reference == "layers":
            raise ConfigError(
                "ppo.offload.reference=layers needs a reference with weights of its own: with ppo.sharing=lora they "
                "are also those that actor and critic train on. Set it to all or none, or ppo.sharing=full"
            )
    if config.reuse_update_logprob and (config.ppo_epochs, config.minibatches) != (1, 1):
        raise ConfigError("ppo.reuse_update_logprob needs ppo.ppo_epochs=1 and ppo.minibatches=1")
    if config.reuse_update_values and config.minibatches != 1:
        raise ConfigError(
            f"ppo.reuse_update_values needs ppo.minibatches=1, not {config.minibatches}: the critic has learned from "
            "the first minibatch before it reads the second. Set ppo.minibatches=1, or ppo.reuse_update_values=false"
        )
    check_losses(config)
    if config.ptx_coef and not config.ptx_data:
        raise ConfigError("ppo.ptx_coef is above 0, but ppo.ptx_data names no file")
    responses = config.prompts_per_iteration * config.samples_per_prompt
    if config.kl_control == "adaptive" and 0.2 * responses >= config.kl_horizon_responses:
        raise ConfigError(
            f"ppo.kl_horizon_responses is {config.kl_horizon_responses}, too short for {responses} responses an "
            f"iteration: the coefficient could fall to zero at once. Set it above {responses}"
        )
    check_estimator(config)
    warmup, iterations = config.critic_warmup, config.iterations
    if warmup >= iterations:
        warn(
            f"ppo.critic.warmup_iterations is {warmup} and ppo.iterations {iterations}: the actor takes no step. Lower "
            "the warm-up unless the critic alone is to train"
        )
    if responses < config.minibatches:
        raise ConfigError(f"ppo.minibatches is {config.minibatches}, but an iteration has only {responses} responses")
    if config.minibatch_by == "prompt" and config.prompts_per_iteration < config.minibatches:
        raise ConfigError(
            f"ppo.minibatches is {config.minibatches}, but ppo.minibatch_by is prompt and an iteration has only "
            f"{config.prompts_per_iteration} prompts (ppo.prompts_per_iteration). Lower ppo.minibatches, or set "
            "ppo.minibatch_by=response"
        )


def check_losses(config: PPOConfig) -> None:
    """Raise `ConfigError` for keys of corrections and losses that contradict each other; it names them."""
    if config.correction == "dis":
        if config.reuse_update_logprob:
            raise ConfigError(
                "ppo.correction=dis divides by the rollout's probabilities, ppo.reuse_update_logprob by the update's "
                "own. Set ppo.reuse_update_logprob=false"
            )
        if config.dual_clip is not None:
            raise ConfigError("ppo.dual_clip must be empty with ppo.correction=dis, which clips nothing")
    if config.kl_logprobs == "rollout" and (
        config.correction == "tis" or not (config.reuse_update_logprob or config.correction == "dis")
    ):
        raise ConfigError(
            "ppo.kl_logprobs=rollout saves the actor's inference pass, which ppo.correction=tis and several optimizer "
            "steps an iteration need. Set ppo.kl_logprobs=inference; or ppo.correction=dis; or "
            "ppo.reuse_update_logprob=true with ppo.ppo_epochs=1, ppo.minibatches=1 and ppo.correction=none"
        )
    limit = config.sampling.max_new_tokens
    if config.overlong_buffer > limit:
        raise ConfigError(
            f"ppo.overlong_buffer is {config.overlong_buffer}, longer than a response can be "
            f"(ppo.sampling.max_new_tokens={limit}). Set it to {limit} at most"
        )


def check_positive_nll(config: PPOConfig, composition: RewardComposition) -> None:
    """Raise `ConfigError` if the positive-example loss reads a task score that no source gives."""
    if config.positive_nll_coef and config.positive_nll_score == "function" and not composition.sources:
        raise ConfigError(
            "ppo.positive_nll_coef needs a reward function or HTTP scorer, whose score says which responses are right. "
            "Set ppo.positive_nll_score=total to use the total score"
        )


def check_critic(config: PPOConfig, composition: RewardComposition, critic: ModelSource | None) -> None:
    """Raise `ConfigError` if the critic has no weights to start from, a new head without a model, or no use."""
    if not config.has_critic:
        if critic is not None:
            raise ConfigError(
                f"a critic is given, but ppo.advantage is {config.advantage}, which has none; leave it out, or set "
                "ppo.advantage=gae"
            )
        return
    if critic is None and config.critic.new_head:
        raise ConfigError(
            "ppo.critic.new_head is true, but ppo.critic.model names no checkpoint; ppo.critic.init=actor alone gives "
            "the actor's weights a zero head"
        )
    if critic is None and config.critic.init == "reward" and not composition.models:
        raise ConfigError(
            "ppo.critic.init is 'reward', but there is no reward model to start from; set ppo.critic.init=actor "
            "(the actor's trunk with a zero head), or name a checkpoint in ppo.critic.model"
        )


def check_lengths(
    config: PPOConfig, prompts: Sequence[EncodedDataset[Prompt]], architectures: dict[str, Architecture]
) -> None:
    """Raise `ConfigError` if a sequence may exceed the token budget or the context of a role."""
    longest = max((dataset.longest() for dataset in prompts), key=len)
    total = len(longest) + config.sampling.max_new_tokens
    if total > config.token_budget:
        raise ConfigError(
            f"ppo.token_budget is {config.token_budget}, but {longest.where} may grow to {total} tokens "
            f"({len(longest)} + max_new_tokens {config.sampling.max_new_tokens}); raise it"
        )
    for name, architecture in architectures.items():
        context = architecture.context_length
        if total > context:
            raise ConfigError(
                f"{longest.where} may grow to {total} tokens, beyond the {name}'s context of {context}; "
                "lower ppo.sampling.max_new_tokens or shorten the prompt"
            )


# -- data --------------------------------------------------------------------------------------------------------------


def encode_run_prompts(
    config: PPOConfig, key: str, source: Rows, tokenizer: Tokenizer, context: int, limit: int = 0
) -> EncodedDataset[Prompt]:
    """Encode a run's prompts, and print their lengths.

    Args:
        config: of the run.
        key: "prompts" or "eval_prompts", as a name for rows from Python.
        source: path or rows.
        tokenizer: of the actor.
        context: tokens of the actor's context.
        limit: number of prompts to use; 0: all.
    """
    prompts = encode_prompts(
        open_rows(source, limit, input_key=config.input_key),
        tokenizer,
        context=context,
        max_new_tokens=config.sampling.max_new_tokens,
        key="ppo.sampling.max_new_tokens",
        truncation=config.truncation,
        name=str(source) if isinstance(source, (str, Path)) else key,
    )
    report_lengths([prompts])
    return prompts
