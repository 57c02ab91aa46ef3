"""The engine keeps its budgets of launches, waits, copies and sockets at real sizes. budgets.yaml has the figures.

Measures, on the last pipeline stage, which does what the other stages do and the head:

    waits_per_micro_batch       waits of the host for the device that one more micro-batch adds to inference and update
    copies_per_micro_batch      blocking copies to the device that it adds
    waits_at_ends               waits of inference and of two optimizer steps, one of each learner
    forward_launches_per_layer  kernels of one layer's forward pass in the update
    optimizer_items             numbers that one optimizer step reads from the device
    sockets                     of one rank
    decode_launches, decode_waits, decode_copies   of one decode step; copies are the blocking ones, both ways
    decode_launches_per_layer   kernels and collectives of one layer in a decode step, over all micro-groups
    decode_allocations          storages of the device that a decode step allocates eagerly
"""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from icegrt.ppo.losses import CriticLoss
from icegrt.rehearsal.counts import TO_DEVICE
from icegrt.rehearsal.phases import ACTOR, CRITIC, DECODE, INFERENCE
from icegrt.rehearsal.process_groups import sockets_of
from tests.helpers.rehearsals import rehearse_rank, small_config, write_model

BUDGETS = yaml.safe_load((Path(__file__).parent / "budgets.yaml").read_text())
DECODE_STEPS = 3  # of small_workload
# Code of a layer: the trunk, attention and its norms. The embedding and the head are outside.
LAYER = (
    "icegrt/model/trunk.py",
    "icegrt/model/layer.py",
    "icegrt/model/attention.py",
    "icegrt/model/attention_parts.py",
    "icegrt/model/shared_prompts.py",
    "icegrt/rehearsal/",
    "icegrt/kernels/",
)
LAYER_OF_MEGATRON = ("transformer/", "tensor_parallel/layers.py", "models/common/embeddings/rope", "fusions/", "jit")
# Decoding: the stage with its embedding and rotation, and the kernels that only layers launch.
DECODE_LAYER = (
    "icegrt/rollout/stage.py",
    "icegrt/kernels/rms_norm/",
    "icegrt/kernels/rope_write_kv/",
    "icegrt/kernels/paged_attention/",
    "icegrt/kernels/swiglu/",
)
OPTIMIZER = ("icegrt/roles/optimizer.py", "megatron/core/optimizer/", "torch/optim/")


def waits_and_copies(counts):
    """Return waits and blocking copies to the device of inference and update, by line."""
    waits, copies = Counter(), Counter()
    for name in (INFERENCE, ACTOR, CRITIC):
        phase = counts.watcher.phases[name]
        waits.update(phase.syncs)
        for copy, total in phase.copies.items():
            if copy.direction == TO_DEVICE and copy.is_blocking:
                copies["copy", copy.site] += total.count
    return waits, copies


def measures(counts, doubled, layers, stages=1):
    """Return each measure with the lines that make it up, most frequent first.

    doubled: the counts with twice as many micro-batches.
    stages: pipeline ranks; decoding has as many micro-groups.
    """
    (waits, copies), (more_waits, more_copies) = waits_and_copies(counts), waits_and_copies(doubled)
    more = doubled.micro_batches - counts.micro_batches
    critic, decode = counts.watcher.phases[CRITIC], counts.watcher.phases[DECODE]
    forward = Counter(critic.launches) - Counter(critic.backward_launches)
    groups = [f"{group.name} of {len(group.ranks)} ranks" for group in counts.groups if group.is_used]
    decode_copies = Counter()
    for copy, total in decode.copies.items():
        decode_copies[copy.direction, copy.site] += total.count * copy.is_blocking
    in_layers = chosen(decode.launches, lambda site: site.file.startswith(DECODE_LAYER))
    in_layers["all-reduce", "of tensor-parallel ranks"] = sum(
        total.count for transfer, total in decode.transfers.items() if transfer.op == "all-reduce"
    )
    allocations = sum(counts.watcher.device.allocations(*span[:2]) for span in decode.spans)
    return {
        "waits_per_micro_batch": per(more_waits - waits, more),
        "copies_per_micro_batch": per(more_copies - copies, more),
        "waits_at_ends": per(waits, 1),
        "forward_launches_per_layer": per(chosen(forward, is_layer), counts.micro_batches * layers),
        "optimizer_items": per(chosen(waits, lambda site: site.file.startswith(OPTIMIZER)), 2),
        "sockets": (sockets_of(counts.groups), groups),
        "decode_launches": per(decode.launches, DECODE_STEPS),
        "decode_launches_per_layer": per(in_layers, DECODE_STEPS * layers * stages),
        "decode_allocations": (allocations / DECODE_STEPS, []),
        "decode_waits": per(decode.syncs, DECODE_STEPS),
        "decode_copies": per(decode_copies, DECODE_STEPS),
    }


def chosen(counter, condition):
    """Return the entries whose line fulfils a condition."""
    return Counter({key: count for key, count in counter.items() if condition(key[1])})


def is_layer(site):
    return site.file.startswith(LAYER) or any(f"megatron/core/{part}" in site.file for part in LAYER_OF_MEGATRON)


def per(counter, number):
    """Return (total / number, the lines)."""
    lines = [f"{count} x {what} {site}" for (what, site), count in counter.most_common(12)]
    return sum(counter.values()) / number, lines


def rehearsed(folder, case, factor):
    """Return the counts of the last stage, with `factor` times the prompts."""
    model = write_model(folder / "model", **case["model"])
    keys = {"token_budget": 1024, "samples_per_prompt": 4, "sampling.max_new_tokens": 128, **case["keys"]}
    keys["prompts_per_iteration"] *= factor
    config = small_config(model, *(f"ppo.{key}={value}" for key, value in keys.items()))
    last = case["gpus"] - case["gpus"] // case["keys"].get("parallel.pipeline", 1)
    return rehearse_rank(config, rank=last, world_size=case["gpus"])


@pytest.mark.parametrize("name", BUDGETS)
def test_the_engine_keeps_its_budgets(tmp_path, name):
    case = BUDGETS[name]
    stages = case["keys"].get("parallel.pipeline", 1)
    layers = case["model"]["num_hidden_layers"] // stages
    measured = measures(rehearsed(tmp_path, case, 1), rehearsed(tmp_path, case, 2), layers, stages)
    assert set(case["budgets"]) == set(measured)
    exceeded = [
        "\n  ".join([f"{measure} is {measured[measure][0]:g}, above its budget of {budget}:", *measured[measure][1]])
        for measure, budget in case["budgets"].items()
        if measured[measure][0] > budget
    ]
    assert not exceeded, f"{name}:\n" + "\n".join(exceeded)


def test_a_planted_wait_exceeds_the_budget_and_is_named(tmp_path, monkeypatch):
    case = BUDGETS["7b-tp4"] | {"model": {"num_hidden_layers": 2}}
    call = CriticLoss.__call__

    def with_wait(loss, hidden_TH, batch):
        hidden_TH.sum().item()
        return call(loss, hidden_TH, batch)

    monkeypatch.setattr(CriticLoss, "__call__", with_wait)
    counts, doubled = rehearsed(tmp_path, case, 1), rehearsed(tmp_path, case, 2)
    value, lines = measures(counts, doubled, 2)["waits_per_micro_batch"]
    assert value == BUDGETS["7b-tp4"]["budgets"]["waits_per_micro_batch"] + 1
    line = with_wait.__code__.co_firstlineno + 1
    assert any(text.endswith(f"test_budgets.py:{line}") for text in lines)
