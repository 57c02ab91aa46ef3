"""Live bytes, their peak and their categories."""

import torch

from icegrt.rehearsal import memory
from icegrt.rehearsal.memory import Ledger
from icegrt.rehearsal.phases import ACTOR, DECODE, INFERENCE
from icegrt.rehearsal.sites import current_site
from tests.helpers.rehearsals import played_gpu, rehearse_rank, small_config, write_model

META = torch.device("meta")


def add(ledger, x):
    ledger.add(x.untyped_storage(), current_site, False, lambda: False)


def test_the_peak_is_the_largest_sum_within_a_span():
    ledger, tensors = Ledger(), []
    for size in (100, 50):
        tensors.append(torch.empty(size, dtype=torch.uint8))
        add(ledger, tensors[-1])
    middle = ledger.mark()
    tensors.pop(0)
    tensors.append(torch.empty(60, dtype=torch.uint8))
    add(ledger, tensors[-1])
    assert (ledger.peak().bytes, ledger.peak(middle).bytes, ledger.bytes) == (150, 150, 110)
    tensors.clear()
    end = ledger.mark()
    assert ledger.peak(end).bytes == ledger.bytes == 0 and ledger.peak().by_category[memory.TEMPORARY] == 150


def test_views_count_once_and_live_as_long_as_their_last_tensor():
    ledger, x = Ledger(rounding=512), torch.empty(100, dtype=torch.uint8)
    add(ledger, x)
    view = x[10:]
    add(ledger, view)
    del x
    assert ledger.bytes == 512
    del view
    assert ledger.bytes == 0


def test_activations_are_what_a_backward_pass_frees():
    with played_gpu():
        weight = torch.ones(64, 64, device=META, requires_grad=True)
        loss = (torch.ones(64, 64, device=META) @ weight).sigmoid().sum()
        loss.backward()
        from icegrt.rehearsal.watcher import Watcher

        peak = Watcher.current().device.peak()
    # The input and the output of the sigmoid; the product is freed in the forward pass.
    assert peak.by_category[memory.ACTIVATIONS] == 2 * 64 * 64 * 4


def test_every_category_has_its_bytes(tmp_path):
    config = small_config(write_model(tmp_path / "model"))
    counts = rehearse_rank(config, world_size=2)
    watcher = counts.watcher

    def peak(phase):
        spans = [span[:2] for span in watcher.phases[phase].spans]
        return max((watcher.device.peak(*span) for span in spans), key=lambda peak: peak.bytes).by_category

    # bf16 weights; fp32 gradients of the two learners; fp32 weights and Adam's two moments on one of two ranks each.
    learned = counts.parameters // 2
    assert abs(peak(INFERENCE)[memory.PARAMETERS] / (2 * counts.parameters) - 1) < 0.02
    assert abs(peak(ACTOR)[memory.GRADIENTS] / (4 * learned) - 1) < 0.3
    assert peak(ACTOR)[memory.OPTIMIZER] > 0 and peak(ACTOR)[memory.ACTIVATIONS] > 0
    assert peak(ACTOR)[memory.LOGITS] > 0
    # layers x sequences x tokens x heads x head size, keys and values, bf16. 79 tokens take five blocks of 16.
    assert peak(DECODE)[memory.KV_CACHE] == 4 * counts.sequences * 80 * 4 * 8 * 2 * 2
