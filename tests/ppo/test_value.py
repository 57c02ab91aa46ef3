"""`icegrt value`: a critic learns recorded or sampled returns, stops by held-out ones, and PPO takes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icegrt.config import PPOConfig, ValueConfig
from icegrt.data import Row
from icegrt.data.rollouts import RolloutEncoder, monte_carlo_returns, open_rollouts
from icegrt.errors import ConfigError, DataError
from icegrt.metrics import read_metrics
from icegrt.metrics.statistics import explained_variance
from icegrt.ppo.trainer import PPOTrainer
from icegrt.ppo.value import ValueTrainer
from icegrt.training.value_loss import ValueQuality, pack_value_examples
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny
from tests.helpers.kernel_cases import naive_gae

LETTERS = 5  # the id of the letter a is the first after the special tokens and <unk>


def rows(count=24):
    """Return rollouts whose score is the share of the letter a in the response, of prompts of one letter."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for n in range(count):
        response = torch.randint(LETTERS, LETTERS + 3, (2 + n % 5,), generator=draw).tolist()
        score = sum(token == LETTERS for token in response) / len(response)
        made.append({"prompt_ids": [LETTERS + n % 8, 3], "response_ids": response, "score": score, "dropped": False})
    return made


def keys(home, run, *overrides):
    return [
        f"value.model={home.actor}",
        "value.batch_sequences=8",
        "value.token_budget=64",
        "value.optimizer.lr=1e-2",
        f"value.run.dir={run}",
        *overrides,
    ]


def trainer(home, run, *overrides, **inputs):
    return ValueTrainer(ValueConfig.load(None, keys(home, run, *overrides)), **inputs)


@pytest.fixture(scope="module")
def recorded(home, tmp_path_factory):
    """The folder of a PPO run with token rewards, without a KL penalty."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "tokens.py"
    path.write_text(
        "from icegrt import RewardResult\n"
        "def score(samples):\n"
        "    return [RewardResult(len(s.tokens) / 8, token_rewards_A=[t / 61 for t in s.tokens]) for s in samples]\n"
    )
    keys = ("ppo.kl_coef=0", f"ppo.reward_function={path}:score", "ppo.reward_function_weight=0.5")
    with PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, folder / "run", *keys))) as run:
        run.train()
    return folder / "run"


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    gamma=st.floats(0.1, 1.0),
)
def test_returns_are_those_of_gae_at_lambda_1(rewards, gamma):
    size = len(rewards)
    zeros, reward = torch.zeros(size), torch.tensor(rewards, dtype=torch.float64)
    cu = torch.tensor([0, size])
    options = {"kl_coef": 0.0, "gamma": gamma, "lam": 1.0, "token_reward": reward}
    _, expected, _, _ = naive_gae(torch.zeros(1), zeros, zeros, zeros, cu, **options)
    found = torch.tensor(monte_carlo_returns(rewards, gamma), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(2, 40), st.integers(0, 2**16), st.integers(1, 5))
def test_explained_variance_does_not_depend_on_the_micro_batches(size, seed, parts):
    draw = torch.Generator().manual_seed(seed)
    value_A, return_A = torch.randn(2, size, generator=draw, dtype=torch.float64) + 3.0
    pieces = [ValueQuality.of(*pair) for pair in zip(value_A.chunk(parts), return_A.chunk(parts), strict=True)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    assert merged.explained_variance == pytest.approx(explained_variance(value_A.numpy(), return_A.numpy()), abs=1e-9)
    assert merged.loss == pytest.approx(float(0.5 * (return_A - value_A).square().mean()), rel=1e-9)


def test_rollouts_of_a_run_have_the_returns_of_its_rewards(recorded):
    encoder = RolloutEncoder(tiny.VOCAB, 64, gamma=0.9)
    lines = cases.read_jsonl(recorded / "rollouts" / "iteration_00001.jsonl")
    examples = encoder([Row(line, f"line {n}") for n, line in enumerate(lines)])
    for line, example in zip(lines, examples, strict=True):
        assert example.prompt == line["prompt_ids"] and example.response == line["response_ids"]
        rewards = [0.5 * token / 61 for token in line["response_ids"]]
        rewards[-1] += line["score"]
        expected = [sum(0.9 ** (s - t) * r for s, r in enumerate(rewards) if s >= t) for t in range(len(rewards))]
        assert example.returns == pytest.approx(expected, abs=1e-5)
    batches = pack_value_examples(examples, 40)
    assert sum(batch.n_actions for batch in batches) == sum(len(line["response_ids"]) for line in lines)


def test_a_critic_learns_recorded_rollouts_and_ppo_starts_from_it(home, recorded, tmp_path):
    data = f"value.data=[{{path: {recorded}}}]"
    with trainer(home, tmp_path / "run", data, "value.epochs=6", "value.heldout_fraction=0.25") as run:
        assert not run.role.model.head.weight.any()
        summary = run.train()
        trained = tiny.parameters(run.role)
    assert summary["heldout_explained_variance_before"] == pytest.approx(0.0, abs=1e-9)
    steps = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "value"]
    evaluated = [x for row in steps if (x := row["heldout_explained_variance"]) is not None]
    assert summary["heldout_explained_variance_after"] == pytest.approx(max(evaluated), abs=1e-9)
    assert steps[-1]["loss"] < steps[0]["loss"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Explained variance" in page and "Value-pretraining run" in page
    model = tmp_path / "run" / "model"
    config = PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "ppo", f"ppo.critic.model={model}"))
    with PPOTrainer(config) as ppo:
        assert tiny.same(tiny.parameters(ppo.critic), trained)
        ppo.step()


def test_held_out_explained_variance_stops_the_run_and_chooses_the_weights(home, tmp_path):
    upside_down = [{**row, "score": -3 * row["score"]} for row in rows()]
    for row in upside_down:
        row["prompt_ids"] = [*row["prompt_ids"], 4]
    settings = ("value.epochs=50", "value.eval_every=1", "value.patience=2", "value.keep_checkpoints=1")
    with trainer(home, tmp_path / "run", *settings, data=rows(), heldout=upside_down) as run:
        summary = run.train()
        figures = [row["heldout_explained_variance"] for row in read_metrics(tmp_path / "run")]
        best = max(range(len(figures)), key=figures.__getitem__)
        assert summary["steps"] == len(figures) == best + 3 < run.blend.count(50) / 8
        assert run.evaluate().explained_variance == pytest.approx(figures[best], abs=1e-9)


def test_value_pretraining_resumes_to_the_bit(home, tmp_path):
    settings = ("value.epochs=3", "value.eval_every=2", "value.freeze=[attention]")
    with trainer(home, tmp_path / "whole", *settings, data=rows()) as run:
        run.train()
        expected, total = tiny.parameters(run.role), run.done_steps
    for stop in (1, 4):
        with trainer(home, tmp_path / f"at_{stop}", *settings, data=rows()) as run:
            for _ in range(stop):
                run.step()
            run.save_checkpoint()
        with trainer(home, tmp_path / f"at_{stop}", *settings, "value.run.resume=true", data=rows()) as run:
            assert run.done_steps == stop
            run.train()
            assert run.done_steps == total and tiny.same(tiny.parameters(run.role), expected)


def test_sampled_rollouts_are_those_of_the_first_ppo_iteration(home, tmp_path):
    with PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "ppo"))) as run:
        run.step()
    expected = cases.read_jsonl(tmp_path / "ppo" / "rollouts" / "iteration_00001.jsonl")
    file = tmp_path / "ppo.yaml"
    PPOConfig.load(None, cases.ppo_keys(home, "never")).save(file)
    settings = (f"value.ppo={file}", "value.iterations=2", "value.heldout_fraction=0.3")
    with trainer(home, tmp_path / "run", *settings) as run:
        run.step()
        run.save_checkpoint()
    path = tmp_path / "run" / "rollouts" / "sampled.jsonl"
    sampled = cases.read_jsonl(path)
    assert len(sampled) == 16
    names = ("prompt_ids", "response_ids", "score", "finish_reason", "where", "sequence_id", "sources")
    assert [[row[name] for name in names] for row in sampled[:8]] == [[row[name] for name in names] for row in expected]
    stamp = path.stat().st_mtime_ns
    with trainer(home, tmp_path / "run", *settings, "value.run.resume=true") as run:
        assert run.done_steps == 1 and path.stat().st_mtime_ns == stamp  # not sampled again


GOOD = {"prompt_ids": [5, 3], "response_ids": [6, 1], "score": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"score": float("nan")}, r"row 1: `score` is nan, not a finite number"),
        (GOOD | {"score": None}, r"row 1: `score` is 'null', not a finite number"),
        (GOOD | {"response_ids": "ab"}, r"row 1: `response_ids` is a string; expected a list of token ids"),
        ({"prompt": "a", "response": "b"}, r"row 1: `prompt_ids` is missing; expected a list of token ids"),
        (GOOD | {"response_ids": [6, 61]}, r"row 1: `response_ids` has the token 61, .* vocabulary has 61 tokens"),
        (GOOD | {"prompt_ids": []}, r"row 1: `prompt_ids` is empty"),
        (GOOD | {"response_ids": [6] * 70}, r"row 1: 72 tokens .* context is 64"),
        (
            GOOD | {"sources": {"f": {"weight": 1.0, "token_rewards": [0.1]}}},
            r"row 1: `sources\.f\.token_rewards` must be a list of 2 numbers",
        ),
        (
            GOOD | {"sources": {"f": {"weight": 1.0, "token_rewards": [0.1, float("inf")]}}},
            r"row 1: `sources\.f\.token_rewards\[1\]` is inf, not a finite number",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_is_one_clear_error(row, message):
    with pytest.raises(DataError, match=message):
        RolloutEncoder(tiny.VOCAB, 64)([Row(GOOD, "row 0"), Row(row, "row 1")])


def test_what_is_skipped_is_said():
    skipped = RolloutEncoder(tiny.VOCAB, 64)(
        [Row(GOOD | {"dropped": True, "score": None}, "row 0"), Row(GOOD | {"response_ids": []}, "row 1")]
    )
    assert [item.reason for item in skipped] == ["dropped by a reward source", "without a response token"]


def test_without_rollouts_or_with_two_sources_of_them_nothing_starts(home, tmp_path):
    with pytest.raises(ConfigError, match=r"value\.data and value\.ppo are both empty"):
        trainer(home, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"value\.data and value\.ppo are both set"):
        trainer(home, tmp_path / "run", f"value.data=[{{path: {tmp_path}}}]", "value.ppo=ppo.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no `rollouts/\*\.jsonl`"):
        trainer(home, tmp_path / "run", f"value.data=[{{path: {tmp_path / 'empty'}}}]")
    assert not (tmp_path / "run").exists()


def test_rollouts_of_another_tokenizer_are_refused(home, recorded, tmp_path):
    other = cases.save_model(tmp_path / "other", tiny.causal_lm(), tiny.tokenizer())
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"@":'))
    with pytest.raises(ConfigError, match=r"value\.data: the run .*run and value\.model .*other\) map text to diff"):
        trainer(home, tmp_path / "run", f"value.model={other}", f"value.data=[{{path: {recorded}}}]")
    file = tmp_path / "ppo.yaml"
    PPOConfig.load(None, cases.ppo_keys(home, "never")).save(file)
    with pytest.raises(ConfigError, match=r"ppo\.actor .* and value\.model .*other\) map text to different"):
        trainer(home, tmp_path / "run", f"value.model={other}", f"value.ppo={file}")
    assert not (tmp_path / "run").exists()


def test_files_of_a_run_are_one_source_in_their_order(recorded):
    whole = [line for path in sorted((recorded / "rollouts").glob("*.jsonl")) for line in cases.read_jsonl(path)]
    for path in (recorded, recorded / "rollouts"):
        rows = open_rollouts(str(path))
        assert [row.data for row in rows] == whole and rows[-1].data == whole[-1] and len(rows) == 16
    assert rows[8].where.endswith("iteration_00002.jsonl:1")
