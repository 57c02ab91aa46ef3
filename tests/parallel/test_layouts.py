"""The same PPO run in every layout: tokens, gradients, weights, losses; nothing held twice that could be cut."""

from collections import Counter

import pytest
import torch

from icegrt.config import ParallelConfig
from icegrt.errors import ConfigError
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import (
    KL_TARGET,
    LAYOUTS,
    RunRecorder,
    config,
    parity,
    results_by_layout,
    step_metrics,
    trainer,
    write_ptx,
)
from tests.helpers.ranks import launch

# Two ranks share two cores; four take a turn longer.
CASES = [
    pytest.param(name, marks=pytest.mark.long if ranks > 2 and name != "tp2_pp2" else ())
    for name, (ranks, _, _) in LAYOUTS.items()
    if ranks > 1
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("layouts")
    write_ptx(path)
    return path


@pytest.fixture(scope="module")
def parity_results(folder):
    """What a layout showed, run once."""
    return results_by_layout(folder, parity)


@pytest.fixture(params=CASES)
def compared(request, parity_results):
    """A layout, and one process with the same model."""
    return (
        parity_results(request.param),
        parity_results("one_tied" if LAYOUTS[request.param][2] else "one"),
        request.param,
    )


@pytest.mark.timeout(600)
def test_a_layout_is_the_same_run_as_one_process(compared):
    layout, one, name = compared
    assert layout["tokens"] == one["tokens"], "other tokens were sampled"
    for role, expected in one["gradients"].items():
        errors = {n: float((layout["gradients"][role][n] - g).norm() / g.norm()) for n, g in expected.items()}
        assert {n: x for n, x in errors.items() if not x <= 1e-5} == {}, f"gradients of the {role}"
    for role, expected in one["weights"].items():
        square = sum(float((x.double() ** 2).sum()) for x in expected.values())
        off = sum(float(((layout["weights"][role][n] - x).double() ** 2).sum()) for n, x in expected.items())
        assert (off / square) ** 0.5 <= 1e-5, f"weights of the {role}"
    for step, expected_step in zip(layout["steps"], one["steps"], strict=True):
        assert step.keys() == expected_step.keys()
        for figure in ("policy_loss", "value_loss", "ptx_loss", "kl_nats_per_response", "score_mean", "kl_coef"):
            assert step[figure] == pytest.approx(expected_step[figure], abs=1e-4), figure
        for figure in ("grad_norm_actor", "grad_norm_critic"):
            assert step[figure] == pytest.approx(expected_step[figure], rel=1e-4), figure
    steered, expected = layout["state"]["kl"]["coef"], one["state"]["kl"]["coef"]
    last = expected / one["steps"][-1]["kl_coef"]
    # What a KL within 1e-4 nats makes of the coefficient.
    assert steered == pytest.approx(expected, rel=1e-4 / KL_TARGET)
    assert LAYOUTS[name][2] or abs(last - 1.0) < 0.199, "a clipped step would not show whose KL it was"
    assert layout["state"]["order"] == one["state"]["order"] and layout["state"]["ptx"] == one["state"]["ptx"]
    assert_at_rest(layout["rest"])
    assert_partitioned(layout["parameter_sizes"], one["parameter_sizes"], LAYOUTS[name][1])


def assert_at_rest(step):
    # Old and new log-probs come from equal shapes and one routine, on every rank.
    assert (step["ratio_min"], step["ratio_max"]) == (1.0, 1.0)
    assert step["kl_nats_per_response"] == 0.0 and step["grad_norm_actor"] > 0


def assert_partitioned(layout, one, keys):
    """Each rank holds its share of what can be cut, and whole only the norms and the one row of a scalar head."""
    tensor = keys.get("tensor", 1)
    for role, ranks in layout.items():
        full_sizes = dict(one[role][0])
        for rank_sizes in ranks:
            names = dict(rank_sizes)
            replicated = {n for n in names if "norm" in n or (n == "head.weight" and role in ("critic", "reward"))}
            # A tied head on the last stage is a copy of the embedding.
            size = {n: full_sizes.get(n, full_sizes["embedding.word_embeddings.weight"]) for n in names}
            assert sum(x for n, x in names.items() if n in replicated) == sum(size[n] for n in replicated)
            partitioned = sum(x for n, x in names.items() if n not in replicated)
            assert partitioned <= 1.05 * sum(x for n, x in size.items() if n not in replicated) / tensor
        # Over a pipeline each name is on one stage; only the copy of a tied head is on two, under a name of its own.
        holders = Counter(n for rank_sizes in ranks for n, _ in rank_sizes)
        assert set(holders) - {"head.weight"} == full_sizes.keys() - {"head.weight"}
        assert set(holders.values()) == {len(ranks) // keys.get("pipeline", 1)}, holders


def one_step(folder, layout):
    """A minibatch for every response: of several data-parallel ranks all but one have none."""
    settings = config(folder / layout, layout, iterations=1, minibatches=10, ptx_coef=0.0, checkpoint_every=9)
    with trainer(settings, LAYOUTS[layout][2]) as run:
        step = run.step()
        weights = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
        if run.cluster.is_main:
            torch.save((step.policy_loss, step.value_loss, weights), folder / f"{layout}.pt")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2_sp_dp2", marks=pytest.mark.long)])
def test_a_rank_without_a_response_joins_every_collective(layout, tmp_path):
    write_ptx(tmp_path)
    for name in ("one", layout):
        launch(LAYOUTS[name][0], one_step, tmp_path, name)
    (*losses, weights), (*expected, expected_weights) = (
        torch.load(tmp_path / f"{name}.pt") for name in (layout, "one")
    )
    assert losses == pytest.approx(expected, abs=1e-4)
    assert all(tiny.gap(weights[role], expected_weights[role])[0] <= 1e-5 for role in expected_weights)


def at_rest_over(folder, ranks):
    """Four key/value heads, so that four tensor-parallel ranks can share them."""
    sizes = {"num_key_value_heads": 4, "num_hidden_layers": 2}
    settings = config(folder / str(ranks), "one", lr=0.0, ptx_coef=0.0, parallel=ParallelConfig(tensor=ranks))
    watch = RunRecorder()
    models = tiny.causal_lm(0, **sizes), tiny.tokenizer(), tiny.scorer(1, **sizes), tiny.PROMPTS
    with PPOTrainer(settings, *models, callbacks=[watch]) as run:
        step = step_metrics(run.step())
        if run.cluster.is_main:
            torch.save((watch.tokens, step), folder / f"{ranks}.pt")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_policy_and_reference_are_one_at_the_start_under_tensor_4(tmp_path):
    for ranks in (1, 4):
        launch(ranks, at_rest_over, tmp_path, ranks)
    (expected_tokens, _), (tokens, step) = (
        torch.load(tmp_path / f"{ranks}.pt", weights_only=False) for ranks in (1, 4)
    )
    assert tokens == expected_tokens
    assert_at_rest(step)


def uncut(folder, layout):
    """A model that cannot be cut into this layout, and data that nobody gets to see."""
    rows = (pytest.fail("data was read first") for _ in range(1))
    settings = config(folder / layout, layout, ptx_coef=0.0, parallel=ParallelConfig(pipeline=2, pipeline_split=[4, 1]))
    actor, reward = (make(0, num_hidden_layers=4) for make in (tiny.causal_lm, tiny.scorer))
    with pytest.raises(ConfigError, match=r"pipeline_split \[4, 1\] has 5 layers, but the model has 4"):
        PPOTrainer(settings, actor, tiny.tokenizer(), reward, rows)


def test_a_model_that_cannot_be_cut_is_refused_before_data_is_read(tmp_path):
    launch(2, uncut, tmp_path, "pp2")
