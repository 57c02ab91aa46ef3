"""Build the roles of a PPO run: actor, reference, reward models and critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icegrt.config import OffloadConfig, PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import DTYPES, HeadKind
from icegrt.model.build import build_adapter, build_model, check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader, ModelSource
from icegrt.model.lora.initial import InitialAdapter
from icegrt.model.lora.peft_format import AdapterReader, is_adapter
from icegrt.model.lora.spec import AdapterSpec
from icegrt.model.lora.trunk_hash import identity_of
from icegrt.model.pipeline_model import PipelineModel
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.residency import GRADIENTS, KINDS, OPTIMIZER, HostMemory, Kind, Residency
from icegrt.rewards.sources import MODEL_NAME
from icegrt.roles.freezing import freeze
from icegrt.roles.layer_stream import stream_layers
from icegrt.roles.offload import place
from icegrt.roles.role import Role, TrainableRole
from icegrt.utils.files import read_object

TRUNK = "reference"  # the role whose model is the trunk alone


@dataclass(frozen=True)
class RoleSource:
    """What a role is built from.

    Attributes:
        reader: the checkpoint; of an adapter, that of its trunk.
        head: of the model.
        new_head: the checkpoint may lack the scalar head, which is then zero.
        is_adapter: the role is an adapter on the actor's checkpoint; the reference is that checkpoint itself.
        adapter: where its adapter comes from; None: it is new.
    """

    reader: HFCheckpointReader
    head: HeadKind
    new_head: bool = False
    is_adapter: bool = False
    adapter: AdapterReader | None = None


def role_sources(
    config: PPOConfig,
    actor: HFCheckpointReader,
    reference: ModelSource | None,
    rewards: RewardComposition,
    critic: ModelSource | None,
) -> dict[str, RoleSource]:
    """Return the sources by the name of their role: actor, reference, one per reward model, critic if there is one.

    Args:
        config: `advantage`, `critic.init` and `sharing` are read.
        actor: the actor's checkpoint.
        reference: None: the actor's checkpoint.
        rewards: its reward models become roles.
        critic: a model of any size, also beside adapters; None: as `critic.init` names it.

    Raises:
        ConfigError: a checkpoint has another vocabulary than the actor's, or cannot be on the actor's weights as
            `sharing` asks. No model is allocated yet.
    """
    shares = config.sharing == "lora"
    sources = {"actor": RoleSource(actor, "lm", is_adapter=shares)}
    reader = HFCheckpointReader(reference) if reference is not None else actor
    if shares and reference is not None and not _is_same_folder(reader, actor):
        raise ConfigError(
            f"ppo.reference is {reader.where}, but with ppo.sharing=lora the reference is the actor's checkpoint "
            f"({actor.where}) without an adapter; leave ppo.reference empty, or set ppo.sharing=full"
        )
    _check_same_vocabulary(actor, reader, "reference")
    sources["reference"] = RoleSource(actor if shares else reader, "lm")
    sources |= _reward_model_sources(actor, rewards, shares)
    if not config.has_critic:
        return sources
    if critic is not None:
        sources["critic"] = _scalar_source(actor, critic, "critic", shares, config.critic.new_head)
    elif config.critic.init == "reward":
        sources["critic"] = sources[next(iter(rewards.models))]
    else:
        sources["critic"] = RoleSource(actor, "scalar", new_head=True, is_adapter=shares)
    if shares and critic is None and not sources["critic"].is_adapter:
        raise ConfigError(
            f"ppo.sharing=lora: the critic cannot start from {sources['critic'].reader.where}, which is a model of its "
            f"own: it is an adapter on the actor's checkpoint ({actor.where}). Set ppo.critic.init=actor, or train the "
            "reward model as an adapter on that checkpoint (reward.sharing=lora) and name its `adapter` folder, or set "
            "ppo.critic.model to train a whole model beside the adapters"
        )
    return sources


def policy_sources(config: PPOConfig, actor: HFCheckpointReader, rewards: RewardComposition) -> dict[str, RoleSource]:
    """Return the sources of the actor and the reward models, which sample and score; arguments as above."""
    shares = config.sharing == "lora"
    return {"actor": RoleSource(actor, "lm", is_adapter=shares), **_reward_model_sources(actor, rewards, shares)}


def _reward_model_sources(actor: HFCheckpointReader, rewards: RewardComposition, shares: bool) -> dict[str, RoleSource]:
    sources = {}
    for role, spec in rewards.models.items():
        name = "reward model" if spec.name == MODEL_NAME else f"reward model `{spec.name}`"
        sources[role] = _scalar_source(actor, spec.model, name, shares)
    return sources


def _is_same_folder(one: HFCheckpointReader, other: HFCheckpointReader) -> bool:
    return one.folder is not None and other.folder is not None and one.folder.resolve() == other.folder.resolve()


def _scalar_source(
    actor: HFCheckpointReader, model: ModelSource, name: str, shares: bool, new_head: bool = False
) -> RoleSource:
    """Return the source of a reward model or critic: a model of its own, or an adapter on the actor's checkpoint."""
    if not is_adapter(model):
        reader = HFCheckpointReader(model)
        _check_same_vocabulary(actor, reader, name)
        return RoleSource(reader, "scalar", new_head)
    adapter = AdapterReader(model)
    if not shares:
        raise ConfigError(
            f"the {name} ({adapter.where}) is an adapter, and ppo.sharing is full: set ppo.sharing=lora, or name the "
            "merged model (`model` in the folder of the run that trained it)"
        )
    if adapter.head != "scalar":
        raise ConfigError(f"the {name} ({adapter.where}) is an adapter without a `score` head: it scores nothing")
    return RoleSource(actor, "scalar", is_adapter=True, adapter=adapter)


def build_roles(
    config: PPOConfig, sources: dict[str, RoleSource], cluster: Cluster, critic_head_scale: float = 1.0
) -> dict[str, Role]:
    """Build the roles one after another; actor and critic train.

    Args:
        config: of the run.
        sources: by name.
        cluster: the open process groups.
        critic_head_scale: multiplies the outputs of the critic's head.

    Raises:
        CheckpointError: a tensor is not finite, or an adapter belongs to another trunk.
        ConfigError: the layout does not divide a model.
    """
    _check_layouts(sources, cluster)
    critic, iterations = config.critic, config.iterations
    actor_steps = (iterations - config.critic_warmup) * config.ppo_epochs * config.minibatches
    critic_steps = iterations * config.critic_epochs * config.minibatches
    trainable = {"actor": (config.optimizer, max(1, actor_steps)), "critic": (critic.optimizer, critic_steps)}
    kinds_by_role = {name: _offloaded_kinds(config.offload, name) for name in sources}
    residency, host = Residency(prefetch=config.offload.prefetch), HostMemory(cluster.device)
    models = _Models(config, cluster, sources)
    roles: dict[str, Role] = {}
    for name, source in sources.items():
        model = models.build(name, source, learns=name in trainable)
        if name == "critic":
            model.scale_head(critic_head_scale)
        model.requires_grad_(name in trainable)
        if name == "critic":
            freeze(model, critic.freeze, "ppo.critic.freeze")
        roles[name] = TrainableRole(name, model, *trainable[name]) if name in trainable else Role(name, model)
        if any(kinds_by_role.values()):
            if _offload_choice(config.offload, name) == "layers" and not source.is_adapter:
                stream_layers(roles[name], residency, host)
            else:
                place(roles[name], residency, host, kinds_by_role[name], TRUNK if source.is_adapter else None)
            residency.move()  # makes room for the next role
    return roles


def build_policy_roles(config: PPOConfig, sources: dict[str, RoleSource], cluster: Cluster) -> dict[str, Role]:
    """Build roles that only read: the actor as it starts, and reward models. Arguments as above."""
    _check_layouts(sources, cluster)
    models = _Models(config, cluster, sources)
    roles = {}
    for name, source in sources.items():
        # A new adapter changes nothing, so the actor is the trunk.
        is_trunk = name == "actor" and models.trunk is not None
        model = models.build(TRUNK if is_trunk else name, source, learns=False)
        roles[name] = Role(name, model.requires_grad_(False))
    return roles


def _check_layouts(sources: dict[str, RoleSource], cluster: Cluster) -> None:
    """Raise `ConfigError` if the layout does not divide the model of a role; it names the role."""
    actor = sources["actor"].reader.architecture
    for name, source in sources.items():
        architecture = source.reader.architecture
        try:
            check_parallelism(architecture, cluster, None if name == "actor" else actor)
        except ConfigError as error:
            raise ConfigError(f"the {name} ({source.reader.where}): {error}") from None


class _Models:
    """Builds the models of a run: each on weights of its own, or adapters on the weights of the reference."""

    def __init__(self, config: PPOConfig, cluster: Cluster, sources: dict[str, RoleSource]) -> None:
        self.config, self.cluster = config, cluster
        self.trunk: PipelineModel | None = None
        if config.sharing == "lora":
            self.spec = AdapterSpec.of(config.lora, "ppo.lora")
            actor = sources["actor"].reader
            self.identity = identity_of(actor, cluster)
            for source in sources.values():
                if source.adapter is not None:
                    source.adapter.check(actor.architecture, self.identity)
            self.trunk = self._whole(sources["actor"], learns=True)

    def build(self, name: str, source: RoleSource, *, learns: bool) -> PipelineModel:
        """Return the model of a role."""
        if self.trunk is None:
            return self._whole(source, learns)
        if name == TRUNK:
            return self.trunk
        if not source.is_adapter:
            return self._whole(source, learns)
        if source.adapter is not None:
            return build_adapter(self.trunk, source.adapter.spec, source.head, source.adapter, self.identity)
        seed = self.config.run.seed
        new = InitialAdapter(self.trunk.architecture, self.spec, source.head, seed=seed, name=name)
        return build_adapter(self.trunk, self.spec, source.head, new, self.identity)

    def _whole(self, source: RoleSource, learns: bool) -> PipelineModel:
        # Activations are recomputed in the models that train.
        recompute = self.config.run.recompute if learns else "none"
        return build_model(
            source.reader,
            source.head,
            self.cluster,
            dtype=DTYPES[self.config.run.dtype],
            new_head=source.new_head,
            recompute=recompute,
        )


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
