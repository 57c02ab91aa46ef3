"""The bytes that docs/scaling.md derives are the bytes that gloo sends, within 2%."""

import pytest
import torch
import torch.distributed as dist

from icegrt.config import ParallelConfig
from icegrt.distributed.layout import Layout
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import config
from tests.helpers.ranks import launch
from tests.helpers.traffic import Work, counted, derived

# Wide enough that the few numbers which the derivation leaves out (sizes, flags, statistics) are below its tolerance.
SHAPE = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
LAYOUTS = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2_virtual": {"pipeline": 2, "virtual_pipeline": 2},
}


class Count:
    """What the iteration computed, noted where it is known."""

    def on_rollout(self, run, responses):
        prompts = {r.prompt_index: len(r.prompt) for r in responses}
        self.draws = sum(len(r.tokens) for r in responses)
        self.rows = sum(prompts.values()) + sum(len(r.tokens) - 1 for r in responses)
        self.sequences = len(responses)

    def on_scores(self, run, experience):
        self.tokens = run.cluster.all_reduce_sum([experience.plan.n_tokens])[0]


def measure(folder):
    watch = Count()
    results = {}
    for name, keys in LAYOUTS.items():
        settings = config(folder / name, "one", ptx_coef=0.0, minibatches=1, prompts_per_iteration=8,
                          max_new_tokens=12, token_budget=96, checkpoint_every=50, iterations=50,
                          parallel=ParallelConfig(**keys))  # fmt: skip
        reward = [tiny.scorer(1, **SHAPE), tiny.count_letters]
        with PPOTrainer(settings, tiny.causal_lm(0, **SHAPE), tiny.tokenizer(), reward, tiny.PROMPTS,
                        callbacks=[watch]) as run:  # fmt: skip
            with counted() as sent_bytes:
                run.step()
            work = Work(watch.tokens, watch.draws, watch.sequences, watch.rows, watch.draws)
            layout = Layout.of(ParallelConfig(**keys))
            sizes = {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "data": 2 // layout.model,
                "virtual_pipeline": layout.virtual_pipeline,
                "sequence_parallel": layout.sequence_parallel,
            }
            parameters = sum(p.numel() for role in run.roles for p in role.model.parameters()) / 2
            derived_bytes = derived(sizes, work, layers=4, hidden=128, parameters=parameters, epochs=1, steps=1)
            names = sorted({"tensor", "pipeline", "data", "all", *sent_bytes})
            totals = torch.tensor([sent_bytes[n] for n in names], dtype=torch.float64)
            dist.all_reduce(totals)
            results[name] = (dict(zip(names, totals.tolist())), derived_bytes)
            main = run.cluster.is_main
    if main:
        torch.save(results, folder / "traffic.pt")


@pytest.mark.timeout(600)
def test_what_travels_is_what_was_derived(tmp_path):
    launch(2, measure, tmp_path)
    results = torch.load(tmp_path / "traffic.pt")
    lines = [
        f"{name}: sent {sent_bytes}, derived {derived_bytes}" for name, (sent_bytes, derived_bytes) in results.items()
    ]
    for name, (sent_bytes, derived_bytes) in results.items():
        ((dimension, expected),) = derived_bytes.items()
        assert sum(sent_bytes.values()) == pytest.approx(expected, rel=0.02), "\n".join(
            [f"{name} ({dimension})", *lines]
        )
