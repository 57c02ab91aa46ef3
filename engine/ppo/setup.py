"""What a PPO run is made of, checked before any time is spent: its keys, its roles, the lengths of its prompts."""

from __future__ import annotations

from typing import Any

from icegrt.config import PPOConfig
from icegrt.data import EncodedDataset, Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import DTYPES
from icegrt.model.build import build_model
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.rewards.sources import MODEL_NAME
from icegrt.roles.role import Role
from icegrt.utils.files import read_object


def check_config(config: PPOConfig) -> None:
    """Refuse keys that contradict each other. Raises `ConfigError` naming them."""
    sampling = config.sampling
    if sampling.top_k or sampling.top_p < 1.0:
        raise ConfigError(
            "ppo.sampling.top_k and ppo.sampling.top_p are for generate and sample: the log-probs that PPO trains on "
            "cannot mirror the truncation. Set top_k=0 and top_p=1"
        )
    if sampling.temperature <= 0:
        raise ConfigError("ppo.sampling.temperature must be above 0: a greedy policy explores nothing")
    if config.reuse_update_logprob and (config.ppo_epochs, config.minibatches) != (1, 1):
        raise ConfigError("ppo.reuse_update_logprob needs ppo.ppo_epochs=1 and ppo.minibatches=1")
    if config.ptx_coef and not config.ptx_data:
        raise ConfigError("ppo.ptx_coef is above 0, but ppo.ptx_data names no file")
    responses = config.prompts_per_iteration * config.samples_per_prompt
    if config.kl_control == "adaptive" and 0.2 * responses >= config.kl_horizon_responses:
        raise ConfigError(
            f"ppo.kl_horizon_responses is {config.kl_horizon_responses}, too short for {responses} responses an "
            f"iteration: the coefficient could fall to zero at once. Set it above {responses}"
        )
    if responses < config.minibatches:
        raise ConfigError(f"ppo.minibatches is {config.minibatches}, but an iteration has only {responses} responses")


def check_critic(config: PPOConfig, composition: RewardComposition, critic: Any) -> None:
    """Refuse a critic that has nothing to start from. Raises `ConfigError`."""
    if critic is None and config.critic.init == "reward" and not composition.models:
        raise ConfigError(
            "ppo.critic.init is 'reward', but there is no reward model to start from; set ppo.critic.init=actor "
            "(the actor's trunk with a zero head)"
        )


def build_roles(
    cluster: Cluster,
    config: PPOConfig,
    actor: HFCheckpointReader,
    reference: Any,
    composition: RewardComposition,
    critic: Any,
) -> dict[str, Role]:
    """Return the roles by name: actor, reference, one per reward model, critic. Actor and critic do not learn yet.

    All checkpoints are compared with the actor's before the first model is built.
    """
    frozen = HFCheckpointReader(reference) if reference is not None else actor
    _same_vocabulary(actor, frozen, "reference")
    rewards = {role: HFCheckpointReader(entry.model) for role, entry in composition.models.items()}
    for role, reward in rewards.items():
        name = composition.models[role].name
        _same_vocabulary(actor, reward, "reward model" if name == MODEL_NAME else f"reward model `{name}`")
    if critic is not None:
        start, new_head = HFCheckpointReader(critic), False
    elif config.critic.init == "reward":
        start, new_head = next(iter(rewards.values())), False
    else:
        start, new_head = actor, True
    _same_vocabulary(actor, start, "critic")
    dtype, recompute = DTYPES[config.run.dtype], config.run.recompute
    models = {"actor": build_model(actor, "lm", cluster, dtype=dtype, recompute=recompute)}
    models["reference"] = build_model(frozen, "lm", cluster, dtype=dtype)
    models |= {role: build_model(reward, "scalar", cluster, dtype=dtype) for role, reward in rewards.items()}
    models["critic"] = build_model(start, "scalar", cluster, dtype=dtype, new_head=new_head, recompute=recompute)
    return {name: Role(name, model) for name, model in models.items()}


def _same_vocabulary(actor: HFCheckpointReader, other: HFCheckpointReader, name: str) -> None:
    if other.architecture.vocab_size != actor.architecture.vocab_size:
        raise ConfigError(
            f"the {name} ({other.where}) has a vocabulary of {other.architecture.vocab_size} tokens, the actor "
            f"({actor.where}) one of {actor.architecture.vocab_size}: all roles must read the same tokens"
        )
    ours, theirs = _tokenizer_file(actor), _tokenizer_file(other)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(
            f"the {name} ({other.where}) and the actor ({actor.where}) map text to different token ids: "
            "all roles must share one tokenizer"
        )


def _tokenizer_file(source: HFCheckpointReader) -> Any:
    path = source.folder / "tokenizer.json" if source.folder is not None else None
    if path is None or not path.is_file():
        return None
    document = read_object(path)
    try:
        return document["model"].get("vocab"), [token.get("content") for token in document.get("added_tokens", [])]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a tokenizer's file; copy it again") from None


def check_lengths(config: PPOConfig, prompts: list[EncodedDataset[Prompt]], roles: dict[str, Role]) -> None:
    """Every sequence must fit every role's context and the token budget. Raises `ConfigError`."""
    longest = max((part.longest() for part in prompts), key=len)
    total = len(longest) + config.sampling.max_new_tokens
    if total > config.token_budget:
        raise ConfigError(
            f"ppo.token_budget is {config.token_budget}, but {longest.where} may grow to {total} tokens "
            f"({len(longest)} + max_new_tokens {config.sampling.max_new_tokens}); raise it"
        )
    for role in roles.values():
        context = role.model.architecture.context_length
        if total > context:
            raise ConfigError(
                f"{longest.where} may grow to {total} tokens, beyond the {role.name}'s context of {context}; "
                "lower ppo.sampling.max_new_tokens or shorten the prompt"
            )
