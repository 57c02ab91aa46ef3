"""The watcher counts what a GPU would do, names the line, and refuses what CUDA refuses."""

import inspect

import pytest
import torch

from icegrt.ppo.losses import PolicyLoss
from icegrt.ppo.scoring import LogprobScorer
from icegrt.rehearsal.collectives import DeviceMismatch
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST
from icegrt.rehearsal.phases import ACTOR, DECODE, INFERENCE
from icegrt.rollout import model_runner
from tests.helpers.rehearsals import GIB, played_gpu, rehearse_rank, small_config, write_model

META = torch.device("meta")


def line_of(function, text):
    """The place of the line of a function that contains a text, as reports show it."""
    lines, first = inspect.getsourcelines(function)
    return f"{inspect.getsourcefile(function)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def planted(value):
    """Wait twice for a tensor of the device, and hold a GiB beside it."""
    value.sum().item()
    value.cpu()
    return torch.empty(GIB // 4, dtype=torch.float32, device=value.device)


STAGES = {
    DECODE: (model_runner, "sample", 3),
    INFERENCE: (LogprobScorer, "__call__", None),
    ACTOR: (PolicyLoss, "__call__", 1),
}


@pytest.mark.parametrize("phase", STAGES)
def test_planted_waits_and_bytes_are_reported_with_their_line(tmp_path, monkeypatch, phase):
    owner, name, argument = STAGES[phase]
    original = getattr(owner, name)

    def with_plant(*args, **kwargs):
        held = planted(args[argument] if argument else next(args[1].model.parameters()))
        result = original(*args, **kwargs)
        del held
        return result

    monkeypatch.setattr(owner, name, with_plant)
    watcher = rehearse_rank(small_config(write_model(tmp_path / "model"))).watcher
    counts = watcher.phases[phase]
    syncs = {(reason, str(site)) for reason, site in counts.syncs}
    assert ("item", line_of(planted, ".item()")) in syncs
    assert ("copy to the host", line_of(planted, ".cpu()")) in syncs
    copied = {str(copy.site): total for copy, total in counts.copies.items() if copy.direction == TO_HOST}
    assert copied[line_of(planted, ".cpu()")].bytes > 0
    peaks = [watcher.device.peak(*span[:2]) for span in counts.spans]
    largest = max(peaks, key=lambda peak: peak.bytes).largest[0]
    assert (largest.bytes, str(largest.site)) == (GIB, line_of(planted, "torch.empty"))
    unplanted = rehearse_rank_without(monkeypatch, owner, name, original, tmp_path)
    assert unplanted.bytes + GIB == pytest.approx(max(peak.bytes for peak in peaks), rel=0.01)


def rehearse_rank_without(monkeypatch, owner, name, original, tmp_path):
    """The peak of the phase without the plant."""
    monkeypatch.setattr(owner, name, original)
    watcher = rehearse_rank(small_config(tmp_path / "model")).watcher
    phase = next(phase for phase, stage in STAGES.items() if stage[0] is owner)
    return max((watcher.device.peak(*span[:2]) for span in watcher.phases[phase].spans), key=lambda peak: peak.bytes)


def test_host_tensors_beside_device_tensors_are_refused():
    with played_gpu(), pytest.raises(DeviceMismatch, match=r"test_watcher\.py:\d+.*\(3,\) of the host"):
        torch.ones(3, device=META) + torch.ones(3)


def test_numbers_of_the_host_are_operands_and_no_copies():
    with played_gpu() as counts:
        torch.ones(3, device=META) * torch.tensor(2.0)
    assert not counts.copies and not counts.syncs


def test_host_indices_are_copies_that_block():
    with played_gpu() as counts:
        rows = torch.ones(5, 2, device=META)[torch.tensor([0, 3])]
    assert rows.shape == (2, 2)
    ((copy, total),) = counts.copies.items()
    assert (copy.direction, copy.is_blocking, total.bytes) == (TO_DEVICE, True, 16)


def test_a_mask_makes_the_host_wait_and_keeps_its_rows():
    with played_gpu() as counts:
        mask = torch.tensor([True, False, True]).cuda()
        assert torch.ones(3, 2, device=META)[mask].shape == (2, 2)
        assert mask.nonzero().tolist() == [[0], [2]]
        values = torch.zeros(3, device=META)
        values[mask] = 1.0  # CUDA fills where the mask is set, without a wait
    assert {reason for reason, _ in counts.syncs} == {"nonzero", "copy to the host"}
    assert sum(count for (reason, _), count in counts.syncs.items() if reason == "nonzero") == 2


def test_integers_of_the_host_keep_their_values_on_the_device():
    with played_gpu():
        lengths = torch.tensor([2, 5, 3], device=META)
        ends = lengths.cumsum(0)
        ends[1:] += 1
        assert ends.tolist() == [2, 8, 11] and int(lengths.max()) == 5


def test_pinned_copies_do_not_block():
    with played_gpu() as counts:
        torch.ones(4).pin_memory().to(META, non_blocking=True)
        torch.empty(4, pin_memory=True).to(META, non_blocking=True)
        torch.ones(4).to(META, non_blocking=True)  # from pageable memory the copy blocks
    kinds = [(copy.is_pinned, copy.is_blocking) for copy in counts.copies]
    assert sorted(kinds) == [(False, True), (True, False), (True, False)]


def test_products_count_flops_and_launches():
    with played_gpu() as counts:
        a = torch.ones(4, 8, device=META, dtype=torch.bfloat16, requires_grad=True)
        (a @ torch.ones(8, 16, device=META, dtype=torch.bfloat16)).sum().backward()
    assert counts.product_flops == {"bfloat16": 2 * (2 * 4 * 8 * 16)}
    assert sum(n for (name, _), n in counts.launches.items() if name == "mm") == 2


def test_recomputed_products_are_not_useful(tmp_path):
    model = write_model(tmp_path / "model")
    plain = rehearse_rank(small_config(model)).watcher.phases[ACTOR]
    again = rehearse_rank(small_config(model, "ppo.run.recompute=full")).watcher.phases[ACTOR]
    extra = sum(again.product_flops.values()) - sum(plain.product_flops.values())
    assert sum(plain.recomputed_flops.values()) == 0 < extra == sum(again.recomputed_flops.values())


def test_nothing_is_patched_outside(tmp_path):
    names = ("is_available", "synchronize", "current_device", "Stream", "device_of", "mem_get_info")
    before = [getattr(torch.cuda, name) for name in names] + [torch.tensor, torch.Tensor.cuda, torch.Tensor.type]
    rehearse_rank(small_config(write_model(tmp_path / "model")))
    after = [getattr(torch.cuda, name) for name in names] + [torch.tensor, torch.Tensor.cuda, torch.Tensor.type]
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert not torch.ones(1, device=META).is_cuda and not torch.distributed.is_initialized()
