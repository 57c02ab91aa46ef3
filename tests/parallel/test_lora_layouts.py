"""The same PPO run with adapters on one trunk in every layout; a checkpoint of one layout is loaded in another."""

import pytest
import torch
import torch.distributed as dist

from icegrt.checkpoint.directory import list_checkpoints
from icegrt.config import CriticConfig, OptimizerConfig, ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.model.hf import loader
from icegrt.model.lora.initial import InitialAdapter
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import lora_cases as lora
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYERS, LAYOUTS, RunRecorder, config, results_by_layout, step_metrics, write_ptx
from tests.helpers.ranks import launch

ITERATIONS = 2
LAYOUTS_NOW = ["tp2_sp", "pp2_virtual", "dp2"]
LAYOUTS_LONG = ["tp2", "pp2", "pp2_uneven", "tp2_pp2", "tp2_dp2", "tp2_sp_dp2", "pp2_dp2"]
CASES = [*LAYOUTS_NOW, *(pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS_LONG)]


def models(tied):
    family, bias = ("qwen2", {}) if tied else ("llama", {"attention_bias": True})
    actor = tiny.causal_lm(0, family, num_hidden_layers=LAYERS, tie_word_embeddings=tied, **bias)
    return actor, tiny.scorer(1, family, num_hidden_layers=LAYERS, **bias)


def trainer(folder, layout, tied, name, callbacks=(), **changes):
    """Return a trainer whose reward model and critic start from one adapter of peft."""
    optimizer = OptimizerConfig(lr=changes.pop("lr", 1e-4), schedule="constant")
    changes = {
        "sharing": "lora",
        "lora": {"rank": 3},
        "iterations": ITERATIONS,
        "optimizer": optimizer,
        "critic": CriticConfig(init="reward", optimizer=optimizer),
    } | changes
    settings = config(folder / name, layout, **changes)
    reward = [str(folder / f"reward_{tied}"), tiny.count_letters]
    return PPOTrainer(settings, models(tied)[0], tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks)


class NoisyAdapter(InitialAdapter):
    """A new adapter whose B are not zero, so that A has a gradient."""

    def get(self, name, *slices):
        x = super().get(name.replace("lora_B", "lora_A") if "lora_B" in name else name)
        if "lora_B" in name:
            shape = self._shapes[name]
            x = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        return x[slices or (slice(None),)]


def fill(role, seed):
    """Give an adapter values that do not depend on the layout."""
    model = role.model
    noise = NoisyAdapter(model.architecture, model.adapter, "lm", seed=seed, name=role.name)
    if model.head_kind == "lm":
        loader.load(model, noise)


def weights(run):
    return {role.name: tiny.by_hugging_face_name(role, lambda p: p) for role in run.roles}


def parity(folder, layout):
    """Run iterations with one seed for all layouts, then one with lr=0; rank 0 writes the results."""
    tied, watch = LAYOUTS[layout][2], RunRecorder()
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        with trainer(folder, layout, tied, layout, [watch]) as run:
            fill(run.actor, 1)
            results = {
                "steps": [step_metrics(run.step()) for _ in range(ITERATIONS)],
                "tokens": watch.tokens,
                "gradients": watch.gradients,
                "weights": weights(run),
                "trunk": tiny.by_hugging_face_name(run.components.reference, lambda p: p),
            }
            run.save_pretrained(folder / f"model_{layout}")
        with trainer(folder, layout, tied, f"{layout}_rest", lr=0.0, ptx_coef=0.0, ppo_epochs=2) as run:
            results["rest"] = step_metrics(run.step())
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora_layouts")
    write_ptx(path)
    for tied in (False, True):
        lora.peft_folder(path / f"reward_{tied}", models(tied)[1], lora.SPEC)
    return path


@pytest.fixture(scope="module")
def parity_results(folder):
    """What a layout showed, run once."""
    return results_by_layout(folder, parity)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_layout_is_the_same_run_as_one_process(name, parity_results, folder):
    layout, one = parity_results(name), parity_results("one_tied" if LAYOUTS[name][2] else "one")
    assert layout["tokens"] == one["tokens"], "other tokens were sampled"
    for kind in ("gradients", "weights"):
        for role, expected in one[kind].items():
            total, worst = tiny.gap(layout[kind][role], expected)
            assert total <= 1e-5 and worst <= 1e-5, (kind, role, total, worst)
    assert tiny.same(layout["trunk"], one["trunk"])
    for step, expected_step in zip(layout["steps"], one["steps"], strict=True):
        for figure in ("policy_loss", "value_loss", "ptx_loss", "kl_nats_per_response", "score_mean", "kl_coef"):
            assert step[figure] == pytest.approx(expected_step[figure], abs=1e-4), figure
        for figure in ("grad_norm_actor", "grad_norm_critic"):
            assert step[figure] == pytest.approx(expected_step[figure], rel=1e-4), figure
    assert (layout["rest"]["ratio_min"], layout["rest"]["ratio_max"]) == (1.0, 1.0)
    assert layout["rest"]["kl_nats_per_response"] == 0.0 and layout["rest"]["grad_norm_actor"] > 0


def resharded(folder, layout):
    """Load the checkpoint of a run, and write what every rank holds, parameters and optimizer states."""
    with trainer(folder, layout, False, "saved", run={"resume": True}, iterations=3, checkpoint_every=9) as run:
        whole = weights(run)
        local = {role.name: tiny.parameters(role) for role in run.roles}
        states = [x for role in run.roles for x in optimizer_states(role)]
        run.step()
        after = weights(run)
        torch.save((whole, local, states, after), folder / f"{layout}_{dist.get_rank()}.loaded")


def optimizer_states(role):
    return [x.clone() for state in role.optimizer.optimizer.state.values() for x in state.values()]


def saved(folder, layout):
    with trainer(folder, layout, False, "saved", iterations=3, checkpoint_every=1) as run:
        fill(run.actor, 1)
        run.step()
        run.complete_checkpoint()
        local = {role.name: tiny.parameters(role) for role in run.roles}
        torch.save((weights(run), local), folder / f"saved_{dist.get_rank()}.pt")


@pytest.mark.timeout(600)
def test_a_checkpoint_of_two_tensor_parallel_ranks_is_loaded_on_one_and_on_two(folder):
    launch(2, saved, folder, "tp2")
    assert [path.name for path in list_checkpoints(folder / "saved")] == ["step_000001"]
    (expected, local_0), (_, local_1) = (torch.load(folder / f"saved_{rank}.pt") for rank in range(2))
    # Shards differ between ranks: a shard counted as replicated would be lost.
    name = "decoder.layers.0.self_attention.linear_qkv.lora_B_q_proj"
    assert not torch.equal(local_0["actor"][name], local_1["actor"][name])
    loaded = {}
    for layout, ranks in (("one", 1), ("tp2", 2)):
        launch(ranks, resharded, folder, layout)
        loaded[layout] = [torch.load(folder / f"{layout}_{rank}.loaded") for rank in range(ranks)]
        for role, tensors in expected.items():
            assert tiny.same(loaded[layout][0][0][role], tensors), (layout, role)
    for rank, local in enumerate((local_0, local_1)):
        assert all(tiny.same(loaded["tp2"][rank][1][role], local[role]) for role in local)
    # The optimizers' states were resharded too: the next step is the same one.
    for role, tensors in loaded["one"][0][3].items():
        total, _ = tiny.gap(loaded["tp2"][0][3][role], tensors)
        assert total <= 1e-5 and tiny.gap(tensors, expected[role])[0] > 1e-4
