"""The layouts under test, and what a PPO run in one of them has to show: run on every rank, told by rank 0."""

import dataclasses
import json

import torch
import torch.distributed as dist

from icegrt.config import CriticConfig, DataSource, OptimizerConfig, ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny

# name: ranks, keys of `parallel`, whether the model is one with an embedding tied to the output and biases to QKV
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
    """A run in which every statistic that spans ranks matters: adaptive KL, shifted scores, whitening, ptx."""
    optimizer = OptimizerConfig(lr=lr, schedule="constant")
    settings = {
        "iterations": ITERATIONS,
        "checkpoint_every": ITERATIONS,
        "prompts_per_iteration": 5,
        "samples_per_prompt": 2,
        "token_budget": 40,
        "ppo_epochs": 1,
        "kl_control": "adaptive",
        # So that the last step of the controller is not clipped, but says what the KL of all ranks is.
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


def write_ptx(folder):
    rows = [{"prompt": word, "response": tiny.WORDS[-n]} for n, word in enumerate(tiny.WORDS)]
    (folder / "ptx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trainer(config, tied, callbacks=(), **changes):
    # Qwen2 has biases on queries, keys and values. Llama has one on the output projection too: it is added once, not by
    # every tensor-parallel rank.
    family, bias = ("qwen2", {}) if tied else ("llama", {"attention_bias": True})
    reward = [tiny.scorer(1, family, num_hidden_layers=LAYERS, **bias), tiny.count_letters]
    actor = tiny.causal_lm(0, family, num_hidden_layers=LAYERS, tie_word_embeddings=tied, **bias)
    return PPOTrainer(config, actor, tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks, **changes)


class Watch:
    """What was sampled; and, of the first iteration, the gradients at the weights that every layout starts from."""

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
    """Whole gradients under Hugging Face's names, on rank 0."""
    role.zero_gradients()
    role.accumulate(work)
    for bucket in (b for ddp in role.ddps for buffer in ddp.buffers for b in buffer.buckets):
        group = role.ddps[0].dp_cp_group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        shards = list(bucket.grad_data.chunk(ranks))
        dist.all_gather(shards, shards[rank].clone(), group=group)
    return tiny.by_hugging_face_name(role, lambda p: p.main_grad)


def figures(step):
    row = dataclasses.asdict(step)
    return {n: x for n, x in row.items() if "second" not in n and isinstance(x, (int, float)) and "padding" not in n}


def parity(folder, layout):
    """Three iterations from a seed that all layouts share, then one at rest; rank 0 keeps what came of them."""
    tied, watch = LAYOUTS[layout][2], Watch()
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        with trainer(config(folder / layout, layout), tied, [watch]) as run:
            told = {
                "steps": [figures(run.step()) for _ in range(ITERATIONS)],
                "tokens": watch.tokens,
                "gradients": watch.gradients,
                "weights": {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles},
                "state": run.state(),
                "chunks": len(run.actor.model.chunks),
                "held": {r.name: held(r) for r in run.components.roles.values()},
            }
        resting = config(folder / f"{layout}_rest", layout, lr=0.0, ptx_coef=0.0, ppo_epochs=2)
        with trainer(resting, tied) as run:
            told["rest"] = figures(run.step())
        if cluster.is_main:
            torch.save(told, folder / f"{layout}.pt")


def held(role):
    """Every rank's parameters: [(name, elements)] in the order of ranks."""
    mine = [(n, p.numel()) for n, p in role.model.named_parameters()]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones
