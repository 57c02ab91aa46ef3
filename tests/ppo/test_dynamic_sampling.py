"""Dynamic sampling: prompts without a spread of scores are replaced before inference, in a resumable order."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icegrt.config import PPOConfig, RewardCallConfig
from icegrt.errors import ConfigError
from icegrt.ppo.dynamic_sampling import select_prompts
from icegrt.ppo.estimator_keys import check_estimator
from icegrt.ppo.rewards import RewardOutputs
from icegrt.rollout.types import Response
from tests.helpers.tied_scores import tied_config, tied_trainer


def selected(rounds, wanted=3, most=10, samples=2):
    """Select from prompts with given scores, in lists by prompt; None: the response was dropped."""
    prompts = iter([SimpleNamespace(name=n, scores=scores) for n, scores in enumerate(rounds)])
    calls = []

    def draw(count):
        return [next(prompts) for _ in range(count)]

    def roll_out(drawn, number):
        calls.append((number, [p.name for p in drawn]))
        return [
            Response(i, s, number * 100 + i * samples + s, [5, p.name], [7], [-1.0], "stop")
            for i, p in enumerate(drawn)
            for s in range(samples)
        ]

    def score(responses, drawn):
        scores = [drawn[r.prompt_index].scores[r.sample] for r in responses]
        dropped = [x is None for x in scores]
        samples = [SimpleNamespace(group=r.prompt_index, score=x) for r, x in zip(responses, scores, strict=True)]
        rewards = DroppedOutputs(samples, [], [], dropped=dropped)
        return rewards, torch.tensor([0.0 if x is None else x for x in scores])

    config = PPOConfig(
        prompts_per_iteration=wanted, samples_per_prompt=samples, dynamic_sampling=True,
        dynamic_sampling_max_rounds=most,
    )  # fmt: skip
    return select_prompts(config, draw, roll_out, score), calls


@dataclasses.dataclass(frozen=True)
class DroppedOutputs(RewardOutputs):
    """Rewards whose dropped responses are given."""

    dropped: list[bool] = dataclasses.field(default_factory=list)

    @property
    def dropped_N(self):
        return torch.tensor(self.dropped)


SPREAD, TIED = [0.0, 1.0], [1.0, 1.0]


def test_prompts_are_drawn_until_enough_have_a_spread():
    selection, calls = selected([SPREAD, TIED, SPREAD, TIED, SPREAD])
    assert calls == [(0, [0, 1, 2]), (1, [3]), (2, [4])]
    assert [p.name for p in selection.prompts] == [0, 2, 4]
    assert (selection.rounds, selection.skipped, selection.filled) == (3, 2, 0)
    assert [r.prompt_index for r in selection.responses] == [0, 0, 1, 1, 2, 2]
    assert [r.prompt[1] for r in selection.responses] == [0, 0, 2, 2, 4, 4]
    assert [r.sequence_id for r in selection.responses] == [0, 1, 4, 5, 200, 201]
    assert len(selection.rewards.samples) == 6


def test_after_the_last_round_the_prompts_that_were_left_out_first_fill_the_iteration():
    selection, calls = selected([TIED, SPREAD, TIED, TIED, TIED, TIED], most=2)
    assert len(calls) == 2 and [p.name for p in selection.prompts] == [1, 0, 2]
    assert (selection.rounds, selection.skipped, selection.filled) == (2, 2, 2)
    assert "draws 2 of 3 prompts" in selection.shortage(PPOConfig(prompts_per_iteration=3))


def test_a_dropped_response_makes_no_spread_and_rounding_neither():
    selection, _ = selected([[0.0, None], [None, None], [1e4, 1e4 + 1e-3], SPREAD], wanted=1, most=4)
    assert [p.name for p in selection.prompts] == [3] and selection.skipped == 3


SCORE = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.sampled_from([1.0, 1.0 + 1e-8, 2.0]))


@given(
    rounds=st.lists(st.lists(SCORE, min_size=3, max_size=3), min_size=20, max_size=20),
    wanted=st.integers(1, 4),
    most=st.integers(1, 5),
)
def test_selected_prompts_are_those_of_a_loop(rounds, wanted, most):
    chosen, left_out, draws, at = [], [], 0, 0
    while len(chosen) < wanted and draws < most:
        missing = wanted - len(chosen)
        for name in range(at, at + missing):
            counted = [x for x in rounds[name] if x is not None]
            spread = max(counted) - min(counted) > 1e-6 * max(map(abs, counted)) if counted else False
            (chosen if spread else left_out).append(name)
        draws, at = draws + 1, at + missing
    filled = wanted - len(chosen)
    selection, calls = selected(rounds, wanted, most, samples=3)
    assert [p.name for p in selection.prompts] == chosen + left_out[:filled]
    assert (selection.rounds, selection.filled, selection.skipped) == (draws, filled, len(left_out) - filled)
    assert [name for _, drawn in calls for name in drawn] == list(range(at))
    # Every response is one to its prompt, in the order of the prompts, with the rewards that it had.
    names = [name for name in chosen + left_out[:filled] for _ in range(3)]
    assert [r.prompt[1] for r in selection.responses] == names
    assert [r.prompt_index for r in selection.responses] == [n for n in range(wanted) for _ in range(3)]
    assert [sample.score for sample in selection.rewards.samples] == [x for n in names[::3] for x in rounds[n]]


# -- runs --------------------------------------------------------------------------------------------------------------


class Watch:
    """Sampled ids of all rounds, the responses that were kept, and those that the policies read."""

    def __init__(self):
        self.sampled, self.kept, self.read = [], [], []

    def attach(self, run):
        generate, scorer = run.components.engine.generate, run.components.scorer

        def sample(*args, **options):
            responses = generate(*args, **options)
            self.sampled += [r.sequence_id for r in responses]
            return responses

        run.components.engine.generate = sample

        def read(role, batches, **options):
            self.read.append((role.name, sum(b.n_sequences for b in batches)))
            return scorer(role, batches, **options)

        object.__setattr__(run.components, "scorer", read)

    def on_rollout(self, run, responses):
        self.kept.append(responses)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_run_replaces_prompts_before_inference_and_ids_stay_unique(tmp_path):
    watch = Watch()
    config = tied_config(tmp_path / "run", dynamic_sampling=True, prompts_per_iteration=3, iterations=3)
    with tied_trainer(config, [watch]) as run:
        watch.attach(run)
        steps = [run.step() for _ in range(3)]
    assert sum(s.skipped_prompts for s in steps) > 2 and max(s.sampling_rounds for s in steps) > 1
    assert all(s.filled_prompts == 0 and s.zero_advantage_fraction == 0.0 for s in steps)
    assert len(set(watch.sampled)) == len(watch.sampled) > sum(map(len, watch.kept)) == 3 * 9
    # Actor and reference read what was kept, and nothing else.
    assert watch.read == [("actor", 9), ("reference", 9)] * 3
    assert all([r.prompt_index for r in kept] == [0] * 3 + [1] * 3 + [2] * 3 for kept in watch.kept)


def test_a_resumed_run_selects_the_same_prompts(tmp_path):
    config = tied_config(
        tmp_path / "whole", dynamic_sampling=True, prompts_per_iteration=3, iterations=4, checkpoint_every=1
    )
    with tied_trainer(config) as run:
        run.train()
    part = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "part")))
    with tied_trainer(part) as run:
        run.step()
        run.step()
    part = dataclasses.replace(part, run=dataclasses.replace(part.run, resume=True))
    with tied_trainer(part) as run:
        run.train()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


def test_the_limit_is_reported_once_and_the_iteration_is_full(tmp_path, capsys):
    config = tied_config(tmp_path / "run", dynamic_sampling=True, dynamic_sampling_max_rounds=2, iterations=2)
    with tied_trainer(config, reward=lambda samples: [1.0] * len(samples)) as run:
        steps = [run.step() for _ in range(2)]
    assert [(s.sampling_rounds, s.skipped_prompts, s.filled_prompts) for s in steps] == [(2, 6, 6)] * 2
    assert capsys.readouterr().err.count("ppo.dynamic_sampling_max_rounds=2") == 1


def test_responses_that_were_dropped_leave_their_prompt_in(tmp_path):
    def failing(samples):
        # A first look before training has one response per prompt.
        alone = {s.group for s in samples} == {0, 1}
        return [math.nan if s.index == 0 and not alone else float(s.index) for s in samples]

    config = tied_config(
        tmp_path / "run", dynamic_sampling=True, iterations=1, reward=RewardCallConfig(on_error="drop", workers=0)
    )
    with tied_trainer(config, reward=failing) as run:
        step = run.step()
    assert step.dropped_responses == 6 and step.skipped_prompts == 0 and step.grad_norm_actor > 0


def test_one_sample_per_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"ppo.dynamic_sampling compares .* ppo.samples_per_prompt is 1"):
        check_estimator(PPOConfig(dynamic_sampling=True, samples_per_prompt=1))
