"""A rehearsal with adapters: what is resident, and that no pass waits for the device."""

import math

import pytest
import torch

from icegrt.config import OptimizerConfig
from icegrt.distributed.layout import Layout
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_parallel_adapter, build_parallel_model
from icegrt.model.hf.mapping import source_shapes
from icegrt.model.lora.peft_format import write_adapter
from icegrt.model.lora.spec import TARGETS, AdapterSpec, adapter_mapping
from icegrt.model.lora.trunk_hash import TrunkIdentity
from icegrt.packing import pack
from icegrt.rehearsal.memory import GRADIENTS, OPTIMIZER, PARAMETERS
from icegrt.roles.micro_batch import MicroBatch
from icegrt.roles.role import TrainableRole
from icegrt.training.sft_loss import SFTLoss
from tests.helpers import tiny_models as tiny
from tests.helpers.rehearsals import copies_to_device, played_rank, rehearse_rank, small_config, write_model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32_000}
SPEC = AdapterSpec(16, 32.0, TARGETS)


def reward_adapter(folder, architecture):
    """Write an adapter with a scalar head."""
    folder.mkdir()
    tensors = (
        (name, torch.zeros(shape))
        for entry in adapter_mapping(architecture, SPEC, "scalar")
        for name, shape in zip(entry.sources, entry.shapes, strict=True)
    )
    write_adapter(folder, tensors, architecture, SPEC, "scalar", TrunkIdentity("", ""))
    return folder


def bytes_at_peak(counts):
    """Return the bytes of parameters, and of gradients and optimizer state."""
    parts = counts.watcher.device.peak().by_category
    return parts[PARAMETERS], parts.get(OPTIMIZER, 0) + parts.get(GRADIENTS, 0)


@pytest.mark.parametrize(("ranks", "layout"), [(1, ()), (2, ("ppo.parallel.tensor=2",))])
def test_parameters_of_all_roles_take_at_most_1_1_times_the_memory_of_one_model(ranks, layout, tmp_path):
    model = write_model(tmp_path / "model", **SIZES)
    architecture = Architecture.from_pretrained(model)
    adapter = reward_adapter(tmp_path / "reward", architecture)
    full = rehearse_rank(small_config(model, *layout), 0, ranks)
    lora = rehearse_rank(small_config(model, *layout, "ppo.sharing=lora", f"ppo.reward_model={adapter}"), 0, ranks)
    one_model = sum(math.prod(shape) for shape in source_shapes(architecture, "lm").values()) / ranks
    assert one_model < lora.parameters <= 1.1 * one_model < 0.4 * full.parameters
    (parameters, training), (_, training_of_full) = bytes_at_peak(lora), bytes_at_peak(full)
    assert 2 * one_model < parameters <= 1.1 * 2 * one_model  # bf16
    assert 0 < training < 0.1 * training_of_full


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:The next bucket's parameter all-gather")
def test_passes_and_steps_with_an_adapter_wait_as_without():
    architecture = Architecture.from_config(tiny.model_config("qwen2", num_hidden_layers=2).to_dict())
    batches = [pack([[1] * 20] * 4, [[2] * length] * 4) for length in (30, 31, 32)]
    with played_rank(Layout(tensor=2, pipeline=2), 3, 4) as (cluster, watcher):
        trunk = build_parallel_model(architecture, "lm", cluster, dtype=torch.bfloat16)
        role = TrainableRole("actor", build_parallel_adapter(trunk, SPEC, "lm"), OptimizerConfig(), 10)
        work = [MicroBatch(batch, SFTLoss(role, 64)) for batch in batches]
        with watcher.phase("passes") as watch:
            role.accumulate(work)
        assert watch.syncs == {} and copies_to_device(watch) == (0, len(batches))
        with watcher.phase("step") as watch:
            role.train_step(work)
        assert sum(watch.syncs.values()) == 2
