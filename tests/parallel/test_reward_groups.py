"""Groups of answers over data-parallel ranks: a reward function receives all answers to one prompt in one call."""

import json

from icegrt.config import CriticConfig
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config
from tests.helpers.ranks import launch

# Row 1 repeats the prompt of row 0: by row numbers, two ranks would share that prompt's answers.
ROWS = [{"prompt": word, "row": row} for row, word in enumerate(["say", "say", "name", "count", "sing"])]


def places_in_the_group(samples):
    """Score a response by the number of answers to its prompt in this call, and by its place among them."""
    answers = [sample.prompt for sample in samples]
    return [10.0 * answers.count(sample.prompt) + sample.index for sample in samples]


def scored(folder, layout):
    changes = {"iterations": 1, "ptx_coef": 0.0, "ptx_data": [], "critic": CriticConfig(init="actor")}
    settings = config(folder / layout, layout, prompts_per_iteration=5, **changes)
    with PPOTrainer(settings, tiny.causal_lm(0), tiny.tokenizer(), places_in_the_group, ROWS) as run:
        run.step()


def test_equal_prompts_of_several_rows_are_one_group_on_any_number_of_ranks(tmp_path):
    scores = {}
    for layout in ("one", "dp2"):
        launch(LAYOUTS[layout][0], scored, tmp_path, layout)
        lines = (tmp_path / layout / "rollouts" / "iteration_00001.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        scores[layout] = {row["sequence_id"]: (row["prompt"], row["function_score"]) for row in rows}
    assert scores["dp2"] == scores["one"]
    repeated = sorted(score for prompt, score in scores["dp2"].values() if prompt == "say")
    assert repeated == [40.0, 41.0, 42.0, 43.0]
    assert all(score in (20.0, 21.0) for prompt, score in scores["dp2"].values() if prompt != "say")
