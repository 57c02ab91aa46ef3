"""Build the roles of a PPO run: actor, reference, reward models and critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icegrt.config import OffloadConfig, PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import DTYPES, HeadKind
from icegrt.model.build import build_model
from icegrt.model.hf.reader import HFCheckpointReader, ModelSource
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.residency import GRADIENTS, KINDS, OPTIMIZER, HostMemory, Kind, Residency
from icegrt.rewards.sources import MODEL_NAME
from icegrt.roles.layer_stream import stream_layers
from icegrt.roles.offload import place
from icegrt.roles.role import Role, TrainableRole
from icegrt.utils.files import read_object


@dataclass(frozen=True)
class RoleSource:
    """What a role is built from.

    Attributes:
        reader: the checkpoint.
        head: of the model.
        new_head: the checkpoint may lack the scalar head, which is then zero.
    """

    reader: HFCheckpointReader
    head: HeadKind
    new_head: bool = False


def role_sources(
    config: PPOConfig,
    actor: HFCheckpointReader,
    reference: ModelSource | None,
    rewards: RewardComposition,
    critic: ModelSource | None,
) -> dict[str, RoleSource]:
    """Return the sources by the name of their role: actor, reference, one per reward model, critic.

    Args:
        config: `critic.init` is read.
        actor: the actor's checkpoint.
        reference: None: the actor's checkpoint.
        rewards: its reward models become roles.
        critic: None: as `critic.init` names it.

    Raises:
        ConfigError: a checkpoint has another vocabulary than the actor's. No model is allocated yet.
    """
    sources = {"actor": RoleSource(actor, "lm")}
    reader = HFCheckpointReader(reference) if reference is not None else actor
    _check_same_vocabulary(actor, reader, "reference")
    sources["reference"] = RoleSource(reader, "lm")
    for role, spec in rewards.models.items():
        reader = HFCheckpointReader(spec.model)
        _check_same_vocabulary(
            actor, reader, "reward model" if spec.name == MODEL_NAME else f"reward model `{spec.name}`"
        )
        sources[role] = RoleSource(reader, "scalar")
    if critic is not None:
        sources["critic"] = RoleSource(HFCheckpointReader(critic), "scalar")
    elif config.critic.init == "reward":
        sources["critic"] = sources[next(iter(rewards.models))]
    else:
        sources["critic"] = RoleSource(actor, "scalar", new_head=True)
    _check_same_vocabulary(actor, sources["critic"].reader, "critic")
    return sources


def build_roles(
    config: PPOConfig, sources: dict[str, RoleSource], cluster: Cluster, critic_head_scale: float = 1.0
) -> dict[str, Role]:
    """Build the roles one after another; actor and critic train.

    Args:
        config: of the run.
        sources: by name.
        cluster: the open process groups.
        critic_head_scale: multiplies the outputs of the critic's head.
    """
    critic, iterations = config.critic, config.iterations
    actor_steps = (iterations - critic.warmup_iterations) * config.ppo_epochs * config.minibatches
    critic_steps = iterations * config.critic_epochs * config.minibatches
    trainable = {"actor": (config.optimizer, max(1, actor_steps)), "critic": (critic.optimizer, critic_steps)}
    kinds_by_role = {name: _offloaded_kinds(config.offload, name) for name in sources}
    residency, host = Residency(prefetch=config.offload.prefetch), HostMemory(cluster.device)
    roles: dict[str, Role] = {}
    for name, source in sources.items():
        # Activations are recomputed in the models that train.
        recompute = config.run.recompute if name in trainable else "none"
        dtype = DTYPES[config.run.dtype]
        model = build_model(
            source.reader, source.head, cluster, dtype=dtype, new_head=source.new_head, recompute=recompute
        )
        if name == "critic":
            model.scale_head(critic_head_scale)
        model.requires_grad_(name in trainable)
        roles[name] = TrainableRole(name, model, *trainable[name]) if name in trainable else Role(name, model)
        if any(kinds_by_role.values()):
            if _offload_choice(config.offload, name) == "layers":
                stream_layers(roles[name], residency, host)
            else:
                place(roles[name], residency, host, kinds_by_role[name])
            residency.move()  # makes room for the next role
    return roles


def _offloaded_kinds(config: OffloadConfig, role: str) -> tuple[Kind, ...]:
    """Return what of a role leaves the device while the role is not in use."""
    choices: dict[str, tuple[Kind, ...]] = {"none": (), "optimizer": (GRADIENTS, OPTIMIZER), "all": KINDS}
    return choices.get(_offload_choice(config, role), KINDS)


def _offload_choice(config: OffloadConfig, role: str) -> str:
    own = getattr(config, role if role in ("actor", "critic", "reference") else "reward")
    choice: str = own if own is not None else config.roles
    return choice


def _check_same_vocabulary(actor: HFCheckpointReader, other: HFCheckpointReader, name: str) -> None:
    """Raise `ConfigError` if two checkpoints read other tokens."""
    if other.architecture.vocab_size != actor.architecture.vocab_size:
        raise ConfigError(
            f"the {name} ({other.where}) has a vocabulary of {other.architecture.vocab_size} tokens, the actor "
            f"({actor.where}) one of {actor.architecture.vocab_size}: all roles must read the same tokens"
        )
    actor_tokens, other_tokens = _tokenizer_tables(actor), _tokenizer_tables(other)
    if actor_tokens is not None and other_tokens is not None and actor_tokens != other_tokens:
        raise ConfigError(
            f"the {name} ({other.where}) and the actor ({actor.where}) map text to different token ids: "
            "all roles must share one tokenizer"
        )


def _tokenizer_tables(source: HFCheckpointReader) -> Any:
    """Return the vocabulary and the added tokens of `tokenizer.json`; None without such a file."""
    path = source.folder / "tokenizer.json" if source.folder is not None else None
    if path is None or not path.is_file():
        return None
    document = read_object(path)
    try:
        return document["model"].get("vocab"), [token.get("content") for token in document.get("added_tokens", [])]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a tokenizer's file; copy it again") from None
