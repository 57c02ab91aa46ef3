"""Small rehearsals: a model of four layers as its config.json alone, and one iteration of one rank."""

import contextlib
import json

from icegrt.config import PPOConfig
from icegrt.rehearsal.counts import TO_DEVICE
from icegrt.rehearsal.device import rehearsed_gpu, rehearsed_world
from icegrt.rehearsal.driver import layout_of, run_iteration
from icegrt.rehearsal.watcher import Watcher
from icegrt.rehearsal.workload import Workload

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
GIB = 1 << 30


def write_model(folder, **changes):
    """Write a config.json; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def small_config(folder, *overrides):
    """Return the configuration of one small iteration."""
    keys = {
        "actor": folder,
        "reward_model": folder,
        "prompts_per_iteration": 8,
        "samples_per_prompt": 2,
        "ppo_epochs": 1,
        "minibatches": 1,
        "token_budget": 512,
        "sampling.max_new_tokens": 32,
        "run.dtype": "bf16",
        "run.dir": folder / "run",
    }
    return PPOConfig.load(None, [*(f"ppo.{name}={value}" for name, value in keys.items()), *overrides])


def small_workload(config, prompt=48, steps=3):
    """Return prompts of one length, with responses of the longest length."""
    count, samples = config.prompts_per_iteration, config.samples_per_prompt
    return Workload([prompt] * count, [config.sampling.max_new_tokens] * (count * samples), samples, steps, "fixed")


def rehearse_rank(config, rank=0, world_size=2, watcher=None):
    """Rehearse one rank; return its counts."""
    watcher = watcher or Watcher()
    with (
        rehearsed_gpu(watcher, 80 * GIB),
        rehearsed_world(layout_of(config), rank, world_size, 8) as cluster,
        watcher,
    ):
        return run_iteration(config, cluster, watcher, small_workload(config), lambda phase: None)


@contextlib.contextmanager
def played_gpu():
    """Let the meta device play a GPU, watched; yield the counts of the block."""
    watcher = Watcher()
    with rehearsed_gpu(watcher, 80 * GIB), watcher, watcher.phase("block") as counts:
        yield counts


@contextlib.contextmanager
def played_rank(layout, rank, world_size):
    """Let the meta device play the GPU of one rank; yield its cluster and the watcher."""
    watcher = Watcher()
    with rehearsed_gpu(watcher, 80 * GIB), rehearsed_world(layout, rank, world_size, 8) as cluster, watcher:
        yield cluster, watcher


def copies_to_device(counts):
    """Return the numbers of copies to the device that make the host wait, and of those that do not."""
    copies = [(copy.is_blocking, total.count) for copy, total in counts.copies.items() if copy.direction == TO_DEVICE]
    return tuple(sum(count for is_blocking, count in copies if is_blocking == kind) for kind in (True, False))
