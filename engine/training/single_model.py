"""What the trainers of one model on examples share: what they start from, and encoded data that fits a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icegrt.config import DataSource
from icegrt.data import EncodedDataset, stop_ids
from icegrt.data.examples import Encoder
from icegrt.data.training_data import encode_sources
from icegrt.errors import ConfigError, DataError
from icegrt.model.build import check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.roles.role import Role
from icegrt.training.trainer import Trainer, tokenizer_for

# Encoded files or rows, each with its weight in the blend.
EncodedSources = list[tuple[EncodedDataset, float]]


class OneModelTrainer(Trainer):
    """Trains one role on data that is known before training.

    model: path of a Hugging Face checkpoint, or a `transformers` model (default: `config.model`).
    data, heldout: an iterable of dicts or a `datasets.Dataset` (default: the files of the configuration).
    """

    role: Role

    def __init__(
        self,
        config: Any,
        model: Any = None,
        tokenizer: Any = None,
        data: Any = None,
        heldout: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        source = model if model is not None else config.model
        if not source:
            raise ConfigError(f"{config.section}.model is empty; name the checkpoint to start from")
        super().__init__(config, callbacks)
        try:
            pretrained = HFCheckpointReader(source)
            architecture = pretrained.architecture
            check_parallelism(architecture, self.cluster)  # before data is encoded, which may take long
            self.tokenizer = tokenizer_for(tokenizer, source, architecture)
            self.stop_ids = stop_ids(self.tokenizer, architecture.hf_config, pretrained.folder)
            self.max_length = min(config.max_length or architecture.context_length, architecture.context_length)
            self._set_up(pretrained, data, heldout)
        except BaseException:
            self.close()
            raise

    def _set_up(self, pretrained: HFCheckpointReader, data: Any, heldout: Any) -> None:
        """Encode the data, build the role, and begin."""
        raise NotImplementedError

    def _encoder(self) -> Encoder:
        """What makes items of this stage out of rows."""
        raise NotImplementedError

    def _too_long(self, item: Any) -> str:
        """What to say of an item that is longer than a micro-batch may be."""
        raise NotImplementedError

    def _training_data(self, given: Any) -> EncodedSources:
        encoded = self._encode("data", self.config.data, given)
        if not encoded:
            raise ConfigError(f"{self.config.section}.data names no file; give at least one source")
        return encoded

    def _heldout_data(self, given: Any) -> list[EncodedDataset]:
        return [items for items, _ in self._encode("heldout", self.config.heldout, given)]

    def _encode(self, key: str, files: list[DataSource], given: Any) -> EncodedSources:
        encoded = encode_sources(f"{self.config.section}.{key}", files, given, self._encoder())
        for items, _ in encoded:
            longest = items.longest()
            if len(longest) > self.config.token_budget:
                raise DataError(f"{longest.where}: {self._too_long(longest)}")
        return encoded
