"""The base of the trainers of one model on examples: its inputs, and encoded data that fits a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from icegrt.config import DataSource, RewardConfig, SFTConfig, ValueConfig
from icegrt.data import EncodedDataset, stop_ids
from icegrt.data.blend import Pair
from icegrt.data.examples import Encoder
from icegrt.data.training_data import encode_sources
from icegrt.data.types import Rows, TokenizerSource
from icegrt.errors import ConfigError, DataError, RunError
from icegrt.metrics import RewardStep, SFTStep, ValueStep
from icegrt.model.architecture import HeadKind
from icegrt.model.build import build_adapter, build_model, check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader, ModelSource
from icegrt.model.lora.initial import InitialAdapter
from icegrt.model.lora.spec import AdapterSpec
from icegrt.model.lora.trunk_hash import identity_of
from icegrt.model.pipeline_model import PipelineModel
from icegrt.roles.role import TrainableRole
from icegrt.training.inputs import tokenizer_for
from icegrt.training.trainer import Trainer

# Encoded files or rows, each with its weight in the mix.
EncodedSources = list[tuple[EncodedDataset, float]]

ConfigT = TypeVar("ConfigT", bound=SFTConfig | RewardConfig | ValueConfig)
StepT = TypeVar("StepT", bound=SFTStep | RewardStep | ValueStep)


@dataclass(frozen=True)
class OneModelInputs:
    """Model and data of a run, as `OneModelTrainer` receives them; nothing is loaded yet."""

    model: ModelSource
    tokenizer: TokenizerSource | None
    data: Rows | None
    heldout: Rows | None


class OneModelTrainer(Trainer[ConfigT, StepT]):
    """Trains one role on data that is known before training.

    Args:
        config: keys of the stage.
        model: path of a Hugging Face checkpoint, or a `transformers` model. Default: `config.model`.
        tokenizer: default: the one in the model's folder.
        data: an iterable of dicts or a `datasets.Dataset`. Default: the files of the configuration.
        heldout: held-out rows, in the form of `data`.
        callbacks: objects with any of the hooks of `Callback`.
    """

    role: TrainableRole
    _batches: Iterator[list[Pair]]

    def __init__(
        self,
        config: ConfigT,
        model: ModelSource | None = None,
        tokenizer: TokenizerSource | None = None,
        data: Rows | None = None,
        heldout: Rows | None = None,
        callbacks: Sequence[object] = (),
    ) -> None:
        model = model if model is not None else config.model
        if not model:
            raise ConfigError(f"{config.section}.model is empty; name the checkpoint to start from")
        if config.sharing == "lora":
            AdapterSpec.of(config.lora, f"{config.section}.lora")  # an unknown target is refused before data is read
        super().__init__(config, callbacks, inputs=OneModelInputs(model, tokenizer, data, heldout))

    def _set_up(self, inputs: OneModelInputs) -> None:
        pretrained = HFCheckpointReader(inputs.model)
        architecture = pretrained.architecture
        check_parallelism(architecture, self.cluster)  # before data is encoded, which may take long
        self.tokenizer = tokenizer_for(inputs.tokenizer, inputs.model, architecture)
        self.stop_ids = stop_ids(
            self.tokenizer,
            architecture.hf_config,
            pretrained.folder,
            generation_config=architecture.generation_config,
        )
        self.max_length = min(self.config.max_length or architecture.context_length, architecture.context_length)
        self.role = self._build(pretrained, inputs.data, inputs.heldout)
        self.roles = [self.role]

    def _build_model(self, pretrained: HFCheckpointReader, head: HeadKind, role: str) -> PipelineModel:
        """Build the model that trains: a whole model, or an adapter on a frozen one.

        Args:
            pretrained: the checkpoint; it may lack a scalar head, which is then zero.
            head: 'lm' or 'scalar'.
            role: its name.
        """
        model = build_model(
            pretrained, head, self.cluster, dtype=self.dtype, new_head=True, recompute=self.run.recompute
        )
        if self.config.sharing == "full":
            return model
        spec = AdapterSpec.of(self.config.lora, f"{self.config.section}.lora")
        seed, architecture = self.run.seed, pretrained.architecture
        new = InitialAdapter(architecture, spec, head, seed=seed, name=role, base=pretrained)
        identity = identity_of(pretrained, self.cluster)
        return build_adapter(model, spec, head, new, identity).requires_grad_(True)

    def _build(self, pretrained: HFCheckpointReader, data: Rows | None, heldout: Rows | None) -> TrainableRole:
        """Encode the data, set `total_steps`, and build the role."""
        raise NotImplementedError

    def _encoder(self) -> Encoder:
        """Return the encoder that turns rows into items of this stage."""
        raise NotImplementedError

    def _too_long(self, item: Any) -> str:
        """Return the message for an item that exceeds the token budget."""
        raise NotImplementedError

    def describe(self, step: StepT) -> dict[str, float]:
        """Return the figures of a step for the progress line."""
        return {"loss": step.loss}

    def _next_batch(self) -> list[Pair]:
        """Return the rows of the next step. Raises `RunError` beyond the last one."""
        batch = next(self._batches, None)
        if batch is None:
            raise RunError(f"all {self.total_steps} steps are done; raise {self.config.section}.epochs to train on")
        return batch

    def _training_data(self, rows: Rows | None) -> EncodedSources:
        sources = self._encode("data", self.config.data, rows)
        if not sources:
            raise ConfigError(f"{self.config.section}.data names no file; give at least one source")
        return sources

    def _heldout_data(self, rows: Rows | None) -> list[EncodedDataset]:
        return [items for items, _ in self._encode("heldout", self.config.heldout, rows)]

    def _encode(self, key: str, files: list[DataSource], rows: Rows | None) -> EncodedSources:
        sources = encode_sources(f"{self.config.section}.{key}", files, rows, self._encoder())
        for items, _ in sources:
            longest = items.longest()
            if len(longest) > self.config.token_budget:
                raise DataError(f"{longest.where}: {self._too_long(longest)}")
        return sources
