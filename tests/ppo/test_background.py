"""What runs beside training: reward functions beside inference, and the files of responses beside everything."""

import threading
import time

import pytest

from icegrt.config import CriticConfig, RewardCallConfig
from icegrt.errors import RewardError
from icegrt.metrics import rollout_path
from icegrt.ppo import inference as inference_module
from icegrt.ppo.rollout_writer import RolloutWriter
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

LIMIT_S = 60.0  # a test that waits so long has failed


def trainer(folder, reward, callbacks=(), timeout_seconds=60.0, **changes):
    calls = RewardCallConfig(timeout_seconds=timeout_seconds)
    settings = {"iterations": 1, "critic": CriticConfig(init="actor"), "reward": calls} | changes
    config = tiny.ppo_config(folder, **settings)
    return PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks)


# -- reward functions beside inference ---------------------------------------------------------------------------------


def test_a_reward_function_runs_while_the_roles_compute(tmp_path, monkeypatch):
    began, has_values = threading.Event(), threading.Event()
    overlapped, is_probe = [], [True]
    score_values = inference_module.score_values

    def values(*args):
        assert began.wait(LIMIT_S)  # the function runs already ...
        result = score_values(*args)
        has_values.set()
        return result

    def reward(samples):
        if not is_probe.pop():
            began.set()
            overlapped.append(has_values.wait(LIMIT_S))  # ... and goes on until the critic has computed
        return tiny.count_letters(samples)

    with trainer(tmp_path / "run", reward) as run:
        is_probe.append(False)
        monkeypatch.setattr(inference_module, "score_values", values)
        step = run.step()
    assert overlapped == [True]
    assert 0 <= step.reward_wait_seconds <= step.seconds_by_phase["score"]
    assert step.reward_source_seconds > 0


def test_a_function_without_a_limit_keeps_the_main_thread(tmp_path):
    threads = set()

    def reward(samples):
        threads.add(threading.current_thread())
        return tiny.count_letters(samples)

    with trainer(tmp_path / "run", reward, timeout_seconds=0) as run:
        run.step()
    assert threads == {threading.main_thread()}


def test_scores_and_weights_do_not_depend_on_where_the_function_runs(tmp_path):
    results = []
    for name, timeout in (("beside", 60.0), ("main", 0.0)):
        with trainer(tmp_path / name, tiny.count_letters, timeout_seconds=timeout) as run:
            step = run.step()
            results.append((tiny.parameters(run.actor), step.score_mean, step.policy_loss))
    assert tiny.same(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_an_error_beside_inference_names_iteration_and_function(tmp_path):
    calls = []

    def broken_later(samples):
        calls.append(len(samples))
        if len(calls) > 1:  # the first call is the probe before training
            raise ValueError("no verdict")
        return tiny.count_letters(samples)

    with trainer(tmp_path / "run", broken_later) as run:
        with pytest.raises(RewardError, match=r"iteration 1: .*broken_later.*no verdict"):
            run.step()


# -- responses ---------------------------------------------------------------------------------------------------------


def test_files_are_written_in_order_and_the_queue_has_an_end(tmp_path):
    gate, written = threading.Event(), []

    def rows(n):
        assert gate.wait(LIMIT_S)
        written.append(n)
        yield {"n": n}

    writer = RolloutWriter()
    for n in range(3):
        writer.submit(tmp_path / f"{n}.jsonl", rows(n))  # one is being written, two wait
    fourth = threading.Thread(target=writer.submit, args=(tmp_path / "3.jsonl", rows(3)))
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive() and not written
    gate.set()
    fourth.join(LIMIT_S)
    writer.flush()
    assert written == [0, 1, 2, 3]
    assert [cases.read_jsonl(tmp_path / f"{n}.jsonl") for n in range(4)] == [[{"n": n}] for n in range(4)]
    writer.close()
    writer.close()


def test_files_that_cannot_be_written_are_one_warning(tmp_path, capsys):
    (tmp_path / "blocked").write_text("a file, no folder")
    writer = RolloutWriter()
    for n in range(3):
        writer.submit(tmp_path / "blocked" / f"{n}.jsonl", [{"n": n}])
    writer.submit(tmp_path / "good.jsonl", [{"n": 3}])
    writer.close()
    assert capsys.readouterr().err.count("warning:") == 1
    assert cases.read_jsonl(tmp_path / "good.jsonl") == [{"n": 3}]


def slow(monkeypatch):
    """Delay every file of responses, so that whoever does not wait finds none."""
    write = RolloutWriter._write

    def delayed(self, *item):
        time.sleep(0.3)
        write(self, *item)

    monkeypatch.setattr(RolloutWriter, "_write", delayed)


def test_a_checkpoint_comes_after_the_responses_of_its_iterations(tmp_path, monkeypatch):
    slow(monkeypatch)
    at_checkpoint = []

    class Watch:
        def on_checkpoint(self, run, path):
            at_checkpoint.append([rollout_path(run.dir, n).exists() for n in (1, 2)])

    changes = {"iterations": 2, "checkpoint_every": 2, "run": {"checkpoint_in_background": False}}
    with trainer(tmp_path / "run", tiny.count_letters, [Watch()], **changes) as run:
        run.train()
    assert at_checkpoint == [[True, True]]


@pytest.mark.parametrize("failure", [None, RuntimeError("stop here")])
def test_the_end_of_a_run_waits_for_its_responses(failure, tmp_path, monkeypatch):
    slow(monkeypatch)

    class Fail:
        def on_update(self, run, step):
            if failure is not None:
                raise failure

    run = trainer(tmp_path / "run", tiny.count_letters, [Fail()])
    try:
        run.step()
    except RuntimeError as error:
        run.close(error)
    else:
        run.close()
    assert len(cases.read_jsonl(rollout_path(tmp_path / "run", 1))) == 8
