"""A rehearsed iteration has the launches, collective bytes and peak memory of the same iteration on real tensors.

The real one runs on the CPU, watched by the same watcher, on two gloo ranks; the rehearsal is of its rank 0, on the
meta device in the role of that CPU, with the same backends. torch's profiler is a witness of the memory: it records
every allocation, and knows nothing of the watcher.
"""

import contextlib
import gc
import pickle
from collections import Counter, defaultdict
from unittest import mock

import pytest
import torch
from triton.runtime import interpreter

from icegrt.distributed.cluster import Cluster
from icegrt.kernels.dispatch import play_device
from icegrt.kernels.packed_attention import reference
from icegrt.model.build import build_parallel_model
from icegrt.rehearsal import stand_ins
from icegrt.rehearsal.device import rehearsed_device, rehearsed_world
from icegrt.rehearsal.driver import layout_of, run_iteration
from icegrt.rehearsal.phases import BUILD
from icegrt.rehearsal.watcher import Watcher
from icegrt.roles import optimizer
from tests.helpers.profiles import profiled_peak, released_by_gloo
from tests.helpers.ranks import launch
from tests.helpers.rehearsals import small_config, small_workload, write_model

# What asks for the device of its tensors: checks of values on a CPU, rows that a CPU drops, copies that it does not
# need; and gloo, which copies the shard of a reduce-scatter.
DEVICE_DEPENDENT = {
    ("icegrt/kernels/linear/chunked.py", "_active_rows"),
    ("megatron/core/distributed/param_and_grad_buffer.py", "start_grad_sync"),
    ("icegrt/kernels/validate.py", None),
    ("icegrt/kernels/linear/products.py", "hidden"),
    ("icegrt/kernels/shaped_gae/interface.py", None),
    ("icegrt/distributed/pipeline.py", "take"),
    ("icegrt/distributed/pipeline.py", "fetch"),
    ("icegrt/distributed/pipeline.py", "<listcomp>"),
    ("icegrt/kernels/linear/inputs.py", "_check_rows"),
    ("icegrt/packing/transfer.py", None),
    ("icegrt/rollout/step_arrays.py", None),
}


def plain_attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    """torch's formula, of the same operators on every device."""
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, 0.0, is_causal, None, enable_gqa=enable_gqa
    )[0]


def multi_tensor_kernels(megatron_optimizer):
    """Megatron's Adam in multi-tensor operators, as a GPU takes them."""
    for group in megatron_optimizer.optimizer.param_groups:
        group["foreach"] = True


def without_cycles(launch):
    """A launch in Triton's interpreter that leaves no reference cycles, which would keep its arguments alive."""

    def launch_and_collect(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect(1)  # the cycle is young; a full collection per launch would take most of the test

    return launch_and_collect


@contextlib.contextmanager
def same_backends(device_type):
    executor = interpreter.GridExecutor
    with (
        play_device(device_type, "cuda"),  # Triton, in its interpreter
        mock.patch.object(reference, "scaled_dot_product_attention", plain_attention),
        mock.patch.object(optimizer, "_use_multi_tensor_kernels", multi_tensor_kernels),
        mock.patch.object(executor, "__call__", without_cycles(executor.__call__)),
    ):
        yield


def filled_model(architecture, head, cluster, **options):
    """A model whose weights are finite."""
    model = build_parallel_model(architecture, head, cluster, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.normal_(0, 0.02)
    return model


def is_dependent(site):
    return (site.file, None) in DEVICE_DEPENDENT or (site.file, site.function) in DEVICE_DEPENDENT


def summary(watcher):
    """What is compared, by phase: launches by line, and bytes by collective and ranks."""
    phases = {}
    for name, counts in watcher.phases.items():
        launches, bytes_of, dependent = Counter(), defaultdict(int), 0
        # A CPU's host operators are the device's too: every operator of the run is one of both in the rehearsal.
        for (_, site), count in (*counts.launches.items(), *counts.host_operations.items()):
            if is_dependent(site):
                dependent += count
            else:
                launches[str(site)] += count
        for transfer, total in counts.transfers.items():
            bytes_of[transfer.op, transfer.ranks] += total.bytes
        peak = max(watcher.device.peak(*span[:2]).bytes for span in counts.spans)
        phases[name] = (launches, dict(bytes_of), dependent, peak)
    return phases


def watched(config, cluster, device_type):
    watcher = Watcher(device_type, rounding=1)
    with same_backends(device_type), mock.patch.object(stand_ins, "build_parallel_model", filled_model), watcher:
        run_iteration(config, cluster, watcher, small_workload(config), lambda phase: None)
    return watcher


def real_rank(config, path):
    with Cluster.open(layout_of(config)) as cluster:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with released_by_gloo(), profiler as profile:
            watcher = watched(config, cluster, "cpu")
        if cluster.rank == 0:
            path.write_bytes(pickle.dumps((summary(watcher), watcher.device.peak().bytes, profiled_peak(profile))))


def parity_config(folder, tensor):
    """A configuration whose gradients are clipped, whatever they are."""
    clip = [f"ppo.{owner}optimizer.clip_grad=1e-12" for owner in ("", "critic.")]
    model = write_model(folder, num_hidden_layers=2, vocab_size=256)
    size = ["ppo.prompts_per_iteration=4", "ppo.run.dtype=fp32", "ppo.token_budget=256"]
    return small_config(model, f"ppo.parallel.tensor={tensor}", *size, *clip)


def differences(rehearsed, real):
    """Lines with another number of launches: (rehearsed, real)."""
    return {line: (rehearsed[line], real[line]) for line in {*rehearsed, *real} if rehearsed[line] != real[line]}


@pytest.mark.timeout(900)  # Triton's interpreter runs a whole iteration
@pytest.mark.parametrize("tensor", [1, 2])
def test_counts_of_a_rehearsal_are_those_of_the_run(tmp_path, tensor):
    config = parity_config(tmp_path / "model", tensor)
    launch(2, real_rank, config, tmp_path / "real.pickle")
    real, real_peak, profiled = pickle.loads((tmp_path / "real.pickle").read_bytes())
    stub = Watcher()
    with rehearsed_device(stub), rehearsed_world(layout_of(config), 0, 2, 8) as cluster:
        watcher = watched(config, cluster, "meta")
    rehearsed = summary(watcher)
    for phase, (launches, transfers, *_) in real.items():
        if phase == BUILD:  # weights are filled on the CPU alone
            continue
        assert differences(rehearsed[phase][0], launches) == {}, phase
        assert rehearsed[phase][1] == transfers, phase
    assert sum(phase[2] for phase in real.values()) < 0.06 * sum(sum(phase[0].values()) for phase in real.values())
    # On a CPU the host's two copies of sampled tokens (int64) and log-probs (fp32) are the device's too.
    host_results = 2 * config.max_batch * (8 + 4)
    assert watcher.device.peak().bytes == pytest.approx(real_peak - host_results, rel=0.001)
    assert watcher.device.peak().bytes == pytest.approx(profiled, rel=0.03)
