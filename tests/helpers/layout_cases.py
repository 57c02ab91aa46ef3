"""Parallel layouts under test, and a PPO run of each whose results rank 0 writes to a file."""

import dataclasses
import functools
import json

import torch
import torch.distributed as dist

from icegrt.config import CriticConfig, DataSource, OptimizerConfig, ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch

# name: number of ranks, keys of `parallel`, whether the model has a tied embedding and QKV biases
LAYOUTS = {
    "one": (1, {}, False),
    "one_tied": (1, {}, True),
    "tp2": (2, {"tensor": 2}, True),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}, False),
    "pp2": (2, {"pipeline": 2}, True),
    "pp2_uneven": (2, {"pipeline": 2, "pipeline_split": [3, 1]}, False),
    "pp2_virtual": (2, {"pipeline": 2, "virtual_pipeline": 2}, True),
    "dp2": (2, {}, False),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, True),
    "tp2_dp2": (4, {"tensor": 2}, False),
    "tp2_sp_dp2": (4, {"tensor": 2, "sequence_parallel": True}, False),
    "pp2_dp2": (4, {"pipeline": 2}, True),
}
ITERATIONS = 3
KL_TARGET = 0.03
LAYERS = 4


def config(folder, layout, *, lr=1e-4, **changes):
    """Configure a run that uses every cross-rank statistic: adaptive KL, score shift, whitening, ptx."""
    optimizer = OptimizerConfig(lr=lr, schedule="constant")
    settings = {
        "iterations": ITERATIONS,
        "checkpoint_every": ITERATIONS,
        "prompts_per_iteration": 5,
        "samples_per_prompt": 2,
        "token_budget": 40,
        "ppo_epochs": 1,
        "kl_control": "adaptive",
        # The last step of the controller is then not clipped: it depends on the KL of all ranks.
        "kl_horizon_responses": 10,
        "kl_target_nats_per_response": KL_TARGET,
        "score_shift": True,
        "missing_eos_penalty": 0.5,
        "bootstrap_truncated": True,
        "ptx_coef": 0.1,
        "ptx_data": [DataSource(path=str(folder.parent / "ptx.jsonl"))],
        "ptx_sequences": 3,
        "optimizer": optimizer,
        "critic": CriticConfig(optimizer=optimizer),
        "parallel": ParallelConfig(**LAYOUTS[layout][1]),
    }
    return tiny.ppo_config(folder, **(settings | changes))


def results_by_layout(folder, work):
    """Return a function from a layout to what `work(folder, layout)` wrote to <layout>.pt on its ranks, run once."""

    @functools.cache
    def results(layout):
        launch(LAYOUTS[layout][0], work, folder, layout)
        return torch.load(folder / f"{layout}.pt", weights_only=False)

    return results


def write_ptx(folder):
    """Write the file of `ptx_data`."""
    rows = [{"prompt": word, "response": tiny.WORDS[-n]} for n, word in enumerate(tiny.WORDS)]
    (folder / "ptx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trainer(config, tied, callbacks=(), **changes):
    """Return a trainer with a reward model and a reward function. tied: Qwen2 with a tied embedding; else Llama."""
    # Qwen2 has biases on queries, keys and values. Llama has one on the output projection too: it is added once, not by
    # every tensor-parallel rank.
    family, bias = ("qwen2", {}) if tied else ("llama", {"attention_bias": True})
    reward = [tiny.scorer(1, family, num_hidden_layers=LAYERS, **bias), tiny.count_letters]
    actor = tiny.causal_lm(0, family, num_hidden_layers=LAYERS, tie_word_embeddings=tied, **bias)
    return PPOTrainer(config, actor, tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks, **changes)


class RunRecorder:
    """A callback that records sampled tokens, and the gradients of the first iteration, at the initial weights."""

    def __init__(self):
        self.tokens, self.gradients = [], {}

    def on_rollout(self, run, responses):
        self.tokens.append([(r.prompt_index, r.sample, r.sequence_id, r.tokens) for r in responses])

    def on_scores(self, run, experience):
        if not self.gradients:
            members, updater = list(range(len(experience.plan.batches))), run.components.updater
            self.gradients = {
                "actor": gradients(run.actor, updater.policy_work(experience, members, 0.1)),
                "critic": gradients(run.critic, updater.critic_work(experience, members)),
            }


def gradients(role, work):
    """Return the unsharded gradients under Hugging Face names, on rank 0."""
    role.zero_gradients()
    role.accumulate(work)
    for bucket in (b for ddp in role.ddps for buffer in ddp.buffers for b in buffer.buckets):
        group = role.ddps[0].dp_cp_group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        shards = list(bucket.grad_data.chunk(ranks))
        dist.all_gather(shards, shards[rank].clone(), group=group)
    return tiny.by_hugging_face_name(role, lambda p: p.main_grad)


def step_metrics(step):
    """Return the numbers of a step that are equal in every layout: without times and padding."""
    row = dataclasses.asdict(step)
    return {n: x for n, x in row.items() if "second" not in n and isinstance(x, (int, float)) and "padding" not in n}


def parity(folder, layout):
    """Run three iterations with one seed for all layouts, then one with lr=0; rank 0 writes the results."""
    tied, watch = LAYOUTS[layout][2], RunRecorder()
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        with trainer(config(folder / layout, layout), tied, [watch]) as run:
            results = {
                "steps": [step_metrics(run.step()) for _ in range(ITERATIONS)],
                "tokens": watch.tokens,
                "gradients": watch.gradients,
                "weights": {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles},
                "state": run.state(),
                "chunks": len(run.actor.model.chunks),
                "parameter_sizes": {r.name: parameter_sizes(r) for r in run.components.roles.values()},
            }
        resting = config(folder / f"{layout}_rest", layout, lr=0.0, ptx_coef=0.0, ppo_epochs=2)
        with trainer(resting, tied) as run:
            results["rest"] = step_metrics(run.step())
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


def parameter_sizes(role):
    """Return [(name, elements)] of the parameters of each rank, in rank order."""
    local_sizes = [(n, p.numel()) for n, p in role.model.named_parameters()]
    sizes_by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(sizes_by_rank, local_sizes)
    return sizes_by_rank
