"""Many host tensors travel to a device in one copy, and arrive with their bits."""

import dataclasses

import pytest
import torch

from icegrt.packing import pack
from icegrt.packing.transfer import copy_to_device, join, split
from tests.helpers.rehearsals import copies_to_device, played_gpu

META = torch.device("meta")

TENSORS = [
    torch.arange(7),
    torch.tensor([True, False, True]),
    torch.tensor([], dtype=torch.int32),
    torch.tensor(2.5, dtype=torch.float64),
    torch.randn(3, 5, dtype=torch.bfloat16).t(),
    torch.tensor([float("nan"), -0.0, 1e-45]),
]


def test_joined_tensors_are_split_into_the_same_bits():
    buffer, starts = join(TENSORS)
    assert all(start % 16 == 0 for start in starts)
    for part, tensor in zip(split(buffer, TENSORS, starts), TENSORS, strict=True):
        assert (part.dtype, part.shape) == (tensor.dtype, tensor.shape)
        assert part.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)) if part.dim() else True
        assert part.is_contiguous() and torch.equal(part.nan_to_num(), tensor.nan_to_num())


def test_tensors_of_the_host_share_a_copy_and_others_stay():
    there = torch.empty(4, device=META)
    with played_gpu() as counts:
        moved = copy_to_device({"a": TENSORS[0], "there": there, "b": TENSORS[1]}, META, non_blocking=True)
    assert list(moved) == ["a", "there", "b"] and moved["there"] is there
    assert copies_to_device(counts) == (0, 1)
    with played_gpu() as counts:
        assert copy_to_device({"there": there}, META) == {"there": there}
    assert copies_to_device(counts) == (0, 0)


def test_a_batch_without_a_device_is_not_copied():
    batch = pack([[1, 2]], [[3, 4]])
    moved = batch.to("cpu", non_blocking=True)
    assert all(getattr(moved, f.name) is getattr(batch, f.name) for f in dataclasses.fields(batch))


def test_counted_rows_follow_a_new_mask():
    batch = pack([[1, 2], [3]], [[4, 5], [6]], action_masks=[[1, 0], [1]])
    assert batch.counted_rows_R.tolist() == [0, 2] and batch.n_counted_actions == 2
    remasked = dataclasses.replace(batch, action_mask_A=torch.tensor([False, True, False]))
    assert remasked.counted_rows_R.tolist() == [1] and remasked.n_counted_actions == 1
    unmasked = dataclasses.replace(batch, action_mask_A=None)
    assert unmasked.counted_rows_R is None and unmasked.counted_index == slice(None)


@pytest.mark.parametrize("tail", [1, 4])
def test_lengths_on_the_host_are_the_offsets(tail):
    batch = pack([[1, 2], [3]], [[4, 5], []], tail_multiple=tail)
    assert batch.lengths == batch.cu_seqlens.diff().tolist()
    assert batch.response_lengths == batch.cu_actions.diff().tolist() == [2, 0]
