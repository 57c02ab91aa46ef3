"""Two reward models in a layout: each is cut like the others, and says what it says in one process."""

import pytest
import torch

from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYERS, LAYOUTS, Watch, config, held
from tests.helpers.ranks import launch

NAMES = ["reward_model", "reward_model_2"]


class Said(Watch):
    """What was sampled, and what each model said of every response, in their order."""

    def __init__(self):
        super().__init__()
        self.gradients = {"not": "wanted"}
        self.scores = []

    def on_scores(self, run, experience):
        plan = experience.plan
        raw = {m.name: plan.all_gather_sequences(m.score_N) for m in experience.scores.models}
        self.scores.append(raw | {"total": plan.all_gather_sequences(experience.scores.total_N)})


def scored(folder, layout):
    watch, shape = Said(), {"num_hidden_layers": LAYERS}
    settings = config(folder / layout, layout, iterations=2, checkpoint_every=2, ptx_coef=0.0, ptx_data=[])
    reward = [tiny.scorer(1, **shape), (tiny.scorer(2, hidden_size=16, **shape), -0.7), tiny.count_letters]
    actor = tiny.causal_lm(0, **shape)
    with PPOTrainer(settings, actor, tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=[watch]) as run:
        sources = [step.sources for step in run]
        sizes = {n: [sum(x for _, x in rank) for rank in held(r)] for n, r in run.components.roles.items()}
        if run.cluster.is_main:
            told = {"tokens": watch.tokens, "scores": watch.scores, "sources": sources, "sizes": sizes}
            torch.save(told | {"state": run.state()["scalings"]}, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for layout in ("one", "tp2_sp", "pp2_uneven", "dp2"):
        launch(LAYOUTS[layout][0], scored, folder, layout)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_uneven", "dp2"])
def test_two_models_say_in_a_layout_what_they_say_in_one_process(layout, ran):
    ours, one = ran[layout], ran["one"]
    assert ours["tokens"] == one["tokens"]
    for told, expected in zip(ours["scores"], one["scores"], strict=True):
        assert list(told) == [*NAMES, "total"] and not torch.equal(told[NAMES[0]], told[NAMES[1]])
        for name, score_N in expected.items():
            torch.testing.assert_close(told[name], score_N, atol=1e-4, rtol=0)
    for told, expected in zip(ours["sources"], one["sources"], strict=True):
        assert list(told) == list(expected) == [*NAMES, "count_letters"]
        for name in told:
            assert told[name] == pytest.approx(expected[name], abs=1e-4)
    for name in NAMES:
        assert ours["state"][name] == pytest.approx(one["state"][name], rel=1e-4)
        assert ours["state"][name]["count"] == 2 * 10
    for role, (whole,) in one["sizes"].items():
        cut = 1 if layout == "dp2" else 2
        assert all(size < 1.6 * whole / cut for size in ours["sizes"][role]) and len(ours["sizes"]) == 5
