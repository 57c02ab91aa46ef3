"""Layouts that cannot be are refused with the nearest that can; arithmetic only, no ranks."""

import pytest

from icegrt.config import ParallelConfig
from icegrt.distributed.layout import Layout, check_model, check_world_size
from icegrt.errors import ConfigError

MODEL = {"layers": 6, "heads": 8, "kv_heads": 2, "ffn": 48}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
def test_a_layout_that_divides_the_ranks_is_taken(world):
    for tensor in (1, 2):
        for pipeline in (1, 2, 3):
            layout = Layout(tensor, pipeline)
            if world % layout.model == 0:
                check_world_size(layout, world)
                check_model(layout, world, **MODEL)
            else:
                with pytest.raises(ConfigError, match=f"{world} rank" if world > 1 else "the only one"):
                    check_world_size(layout, world)


def test_a_process_without_torchrun_does_not_blame_torchrun():
    with pytest.raises(ConfigError) as refused:
        check_world_size(Layout(2), 1)
    text = str(refused.value)
    assert text.startswith("tensor 2 x pipeline 1 needs 2 ranks, and this process is the only one")
    assert "torchrun started" not in text and "--nproc-per-node 2 -m icegrt" in text


def test_the_nearest_layouts_of_a_world_size_are_named():
    with pytest.raises(ConfigError) as refused:
        check_world_size(Layout(3, 2), 8)
    text = str(refused.value)
    assert "torchrun started 8 ranks" in text and "Start 12 ranks" in text
    # By the distance of sizes in powers of two: 4 x 2 and 2 x 2 are nearer to 3 x 2 than anything else is.
    assert "parallel.tensor=4 parallel.pipeline=2, or parallel.tensor=2 parallel.pipeline=2" in text


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(tensor=4), "2 key/value heads cannot be divided"),
        (Layout(tensor=3), "8 attention heads cannot be divided"),
        (Layout(pipeline=4), "6 layers cannot be divided by parallel.pipeline 4"),
        (
            Layout(pipeline=2, virtual_pipeline=2),
            "layers cannot be divided by parallel.pipeline 2 x parallel.virtual",
        ),
        (Layout(pipeline=2, pipeline_split=(3, 4)), r"pipeline_split \[3, 4\] has 7 layers, but the model has 6"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_layouts_that_can(layout, says):
    world = 12
    with pytest.raises(ConfigError, match=says) as refused:
        check_model(layout, world, **MODEL)
    named = str(refused.value).rsplit(" set ", 1)[1].split(", or ")
    assert named
    for layout_keys in named:
        keys = dict(part.removeprefix("parallel.").split("=") for part in layout_keys.split())
        proposed = Layout(int(keys["tensor"]), int(keys["pipeline"]))
        check_world_size(proposed, world)
        check_model(proposed, world, **MODEL)


def test_fewer_key_value_heads_than_tensor_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 8, but the model's 4 key/value heads"):
        check_model(Layout(tensor=8), 8, layers=2, heads=16, kv_heads=4, ffn=64)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"virtual_pipeline": 2}, "parallel.pipeline is 1"),
        ({"pipeline": 2, "pipeline_split": [1, 2, 3]}, "3 entries for 2 stages"),
        ({"pipeline": 2, "pipeline_split": [4, 0]}, "every stage needs a layer"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, says):
    with pytest.raises(ConfigError, match=says):
        Layout.of(ParallelConfig(**keys))


def test_sequence_parallel_without_tensor_ranks_is_no_different():
    assert Layout.of(ParallelConfig(sequence_parallel=True)) == Layout()
