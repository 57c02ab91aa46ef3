"""A critic of another size with frozen attention, its pretraining, and `icegrt value`: the same in every layout."""

import pytest
import torch

from icegrt.config import CriticConfig, OptimizerConfig, ParallelConfig, ValueConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError
from icegrt.ppo.value import ValueTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, step_metrics, trainer
from tests.helpers.ranks import launch

NAMES = ["tp2_sp", "pp2_uneven", "dp2"]
# The actor has four layers of width 32, which `pipeline_split` divides as [3, 1].
OTHER_SIZE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ATTENTION = ".self_attn."


def ppo_run(folder, layout):
    optimizer = OptimizerConfig(lr=1e-3, schedule="constant")
    critic = CriticConfig(freeze=["attention"], pretrain={"iterations": 1}, optimizer=optimizer)
    settings = config(folder / f"ppo_{layout}", layout, critic=critic, ptx_coef=0.0, iterations=1, checkpoint_every=1)
    with trainer(settings, False, critic=tiny.scorer(4, **OTHER_SIZE)) as run:
        initial = tiny.by_hugging_face_name(run.critic, lambda p: p)
        steps = [step_metrics(run.step()) for _ in range(2)]
        return {"steps": steps, "initial": initial, "weights": tiny.by_hugging_face_name(run.critic, lambda p: p)}


def value_rows():
    draw = torch.Generator().manual_seed(1)
    responses = [torch.randint(5, 9, (2 + n % 6,), generator=draw).tolist() for n in range(20)]
    return [
        {"prompt_ids": [5 + n % 7, 3], "response_ids": r, "score": r.count(5) - 0.3 * r[-1]}
        for n, r in enumerate(responses)
    ]


def value_run(folder, layout):
    keys = ["value.batch_sequences=6", "value.token_budget=24", "value.epochs=1", "value.eval_every=1"]
    # The model has two layers, which are split evenly.
    parallel = {name: size for name, size in LAYOUTS[layout][1].items() if name != "pipeline_split"}
    keys += ["value.freeze=[embedding]", f"value.run.dir={folder / f'value_{layout}'}"]
    keys += [f"value.parallel.{name}={str(size).lower()}" for name, size in parallel.items()]
    settings = ValueConfig.load(None, keys)
    with ValueTrainer(settings, tiny.causal_lm(4, **OTHER_SIZE), tiny.tokenizer(), value_rows()) as run:
        steps = [step_metrics(step) for step in run]
        return {"steps": steps, "weights": tiny.by_hugging_face_name(run.role, lambda p: p)}


def run_both(folder, layout):
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        ppo = ppo_run(folder, layout)
    value = value_run(folder, layout)
    if cluster.is_main:
        torch.save({"ppo": ppo, "value": value}, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    for layout in ["one", *NAMES]:
        launch(LAYOUTS[layout][0], run_both, folder, layout)
    return folder


def result(runs, layout):
    return torch.load(runs / f"{layout}.pt", weights_only=False)


@pytest.mark.parametrize("kind", ["ppo", "value"])
@pytest.mark.parametrize("layout", NAMES)
def test_steps_and_weights_are_those_of_one_process(runs, layout, kind):
    found, expected = result(runs, layout)[kind], result(runs, "one")[kind]
    for step, reference in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(reference, rel=2e-4, abs=2e-5)
    total, _ = tiny.gap(found["weights"], expected["weights"])
    assert total < 1e-4


@pytest.mark.parametrize("layout", ["one", *NAMES])
def test_frozen_attention_keeps_its_bits(runs, layout):
    found = result(runs, layout)["ppo"]
    changed = {name for name, x in found["weights"].items() if not torch.equal(x, found["initial"][name])}
    assert changed == {name for name in found["weights"] if ATTENTION not in name}


def resume(folder, layout, expected):
    optimizer = OptimizerConfig(lr=1e-3, schedule="constant")
    critic = CriticConfig(freeze=["attention"], pretrain={"iterations": 1}, optimizer=optimizer)
    settings = config(
        folder / "ppo_pp2_uneven", layout, critic=critic, ptx_coef=0.0, iterations=1, run={"resume": True}
    )
    with (
        Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))),
        trainer(settings, False, critic=tiny.scorer(4, **OTHER_SIZE)) as run,
    ):
        assert run.done_steps == 2 and run.pretraining.is_over
        weights = tiny.by_hugging_face_name(run.critic, lambda p: p)
        if run.cluster.is_main:
            assert tiny.same(weights, expected)


def test_a_checkpoint_is_read_in_another_layout(runs):
    launch(2, resume, runs, "tp2_sp", result(runs, "pp2_uneven")["ppo"]["weights"])


def too_many_stages(folder):
    with pytest.raises(ConfigError, match=r"the critic \(the given Llama.*\): the model's 3 layers cannot be divided"):
        ppo_critic = tiny.scorer(4, **(OTHER_SIZE | {"num_hidden_layers": 3}))
        trainer(config(folder / "three", "pp2_uneven", ptx_coef=0.0), False, critic=ppo_critic)
    with pytest.raises(ConfigError, match=r"ppo\.critic\.freeze is .* leaves a pipeline stage without a parameter"):
        critic = CriticConfig(freeze=["attention", "mlp", "norm", "embedding"])
        trainer(config(folder / "frozen", "pp2_uneven", critic=critic, ptx_coef=0.0), False)


def test_a_layout_that_a_critic_does_not_fit_is_refused_by_name(tmp_path):
    launch(2, too_many_stages, tmp_path)
