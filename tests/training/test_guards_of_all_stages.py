"""Guards that all stages share, from checkpoint folders and from models in memory."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import icegrt
from icegrt import cli
from icegrt.checkpoint.directory import checkpoints_dir
from icegrt.config import CriticConfig, PPOConfig, RewardConfig, SFTConfig
from icegrt.errors import RunError
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from icegrt.utils.files import JsonlWriter
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

STAGES = ("sft", "reward", "ppo")
FORMS = ("folder", "memory")
EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def build(stage, form, home, folder, *keys, callbacks=(), tokenizer=None):
    """Return a trainer of two steps; the models, data and reward are files of `home`, or the same objects in memory."""
    kind, config, base, rows = {
        "sft": (SFTTrainer, SFTConfig, cases.sft_keys, cases.sft_rows),
        "reward": (RewardTrainer, RewardConfig, cases.reward_keys, cases.ranking_rows),
        "ppo": (PPOTrainer, PPOConfig, cases.ppo_keys, cases.prompt_rows),
    }[stage]
    if stage == "reward":
        keys = ("epochs=1", *keys)
    settings = config.load(None, base(home, folder, *(f"{stage}.{key}" for key in keys)))
    inputs = {"callbacks": callbacks}
    if form == "memory":
        inputs |= {"tokenizer": tokenizer or tiny.tokenizer(), ("prompts" if stage == "ppo" else "data"): rows()}
        if stage == "ppo":
            inputs |= {"actor": tiny.causal_lm(), "reward": [tiny.scorer(), cases.share_of_a]}
        else:
            inputs |= {"model": tiny.causal_lm()}
    return kind(settings, **inputs)


def weights(run):
    return {name: p.detach().clone() for role in run.roles for name, p in tiny.parameters(role).items()}


def assert_same_bits(results):
    first, *others = results
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in first.items())


@EVERY_STAGE
def test_a_model_in_memory_trains_to_the_bits_of_its_folder_with_autograd_left_off_by_others(stage, home, tmp_path):
    class LeavesAutogradOff:
        def on_update(self, run, *figures):
            torch.set_grad_enabled(False)

    results = []
    for form in FORMS:
        for enabled, callbacks in ((True, ()), (False, ()), (True, [LeavesAutogradOff()])):
            try:
                with torch.set_grad_enabled(enabled):
                    with build(stage, form, home, tmp_path / str(len(results)), callbacks=callbacks) as run:
                        list(run)
                        results.append(weights(run))
            finally:
                torch.set_grad_enabled(True)
    assert_same_bits(results)


@EVERY_STAGE
@EVERY_FORM
def test_inference_mode_is_refused_by_name(stage, form, home, tmp_path):
    with torch.inference_mode(), pytest.raises(RunError, match="inference_mode is on"):
        build(stage, form, home, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@EVERY_STAGE
@EVERY_FORM
def test_seeds_beyond_32_bits_train_and_differ(stage, form, home, tmp_path):
    losses = []
    for seed in (1, 1 + 2**32):
        with build(stage, form, home, tmp_path / str(seed), f"run.seed={seed}") as run:
            losses.append([step.score_mean if stage == "ppo" else step.loss for step in run])
    assert losses[0] != losses[1]


@EVERY_FORM
def test_the_engine_takes_seeds_beyond_32_bits_with_autograd_left_on_or_off(form, home):
    model = icegrt.load_actor(home.actor if form == "folder" else tiny.causal_lm())
    engine = icegrt.RolloutEngine(model, tiny.tokenizer())
    answers = {}
    for seed in (1, 1 + 2**32, 20261128123456, 2**64 + 2):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                responses = engine.generate([[5, 6]], 4, icegrt.Sampling(max_new_tokens=8, seed=seed))
            answers.setdefault(seed, []).append([r.tokens for r in responses])
    assert all(on == off for on, off in answers.values())
    assert len({str(x) for x in answers.values()}) == 4


@EVERY_STAGE
@EVERY_FORM
def test_a_callback_that_changes_the_working_directory_moves_no_file(stage, form, home, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Leaves:
        def on_update(self, run, *figures):
            os.chdir(tmp_path / "elsewhere")

    with build(stage, form, home, "run", "run.checkpoint_in_background=false", callbacks=[Leaves()]) as run:
        run.train()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "run" / "model").is_dir() and (tmp_path / "run" / "report.html").is_file()


@EVERY_STAGE
@EVERY_FORM
def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(stage, form, home, tmp_path, monkeypatch, capsys):
    rename = os.replace

    def busy(source, target):
        if Path(source).name == "step_000001":
            raise OSError(16, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "replace", busy)
    every = {"sft": "checkpoint_every=1", "reward": "eval_every=1", "ppo": "checkpoint_every=1"}[stage]
    with build(stage, form, home, tmp_path / "run", every, "keep_checkpoints=1") as run:
        assert len(list(run)) == 2
        run.finish()
    assert (tmp_path / "run" / "model").is_dir()
    assert {"step_000001", "step_000002"} <= {path.name for path in checkpoints_dir(tmp_path / "run").iterdir()}
    assert "step_000001: cannot be deleted (Device or resource busy)" in capsys.readouterr().err


@EVERY_STAGE
@EVERY_FORM
def test_two_runs_do_not_write_one_folder(stage, form, home, tmp_path):
    with build(stage, form, home, tmp_path / "run") as run:
        with pytest.raises(RunError, match="run"):
            build(stage, form, home, tmp_path / "run", "run.resume=auto")
        assert len(list(run)) == 2


@EVERY_STAGE
@EVERY_FORM
def test_weights_that_are_not_finite_are_written_nowhere(stage, form, home, tmp_path, capsys):
    with build(stage, form, home, tmp_path / "run") as run:
        run.step()
        next(run.roles[0].model.parameters()).data.view(-1)[3] = float("-inf")
        with pytest.raises(RunError, match=rf"{tmp_path}/python: not written, .* weights of the .* not finite"):
            run.save_pretrained(tmp_path / "python")
        with pytest.raises(RunError, match=r"run/model: not written, .* weights of the .* not finite"):
            run.write_model()
        run.save_checkpoint()
        run.complete_checkpoint()
        role = run.roles[0].name
    argv = ["export", f"export.run={tmp_path}/run", f"export.out={tmp_path}/command", f"export.role={role}"]
    assert cli.main(argv) == 2
    assert "holds NaN or infinity; export a checkpoint from before" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("python", "run/model", "command"))


@EVERY_STAGE
@EVERY_FORM
def test_a_warm_up_of_nearly_the_whole_run_trains_from_the_first_step(stage, form, home, tmp_path):
    with build(stage, form, home, tmp_path / "run", "optimizer.warmup_fraction=0.99") as run:
        before = weights(run)
        step = run.step()
        after = weights(run)
    assert (step.lr_actor if stage == "ppo" else step.lr) > 0
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


@EVERY_STAGE
@EVERY_FORM
def test_a_run_that_diverges_ends_with_its_cause_and_writes_no_model(stage, form, home, tmp_path):
    keys = ["optimizer.lr=1e19", "optimizer.clip_grad=0", "optimizer.warmup_fraction=0"]
    keys += ["iterations=6", "kl_coef=0"] if stage == "ppo" else ["epochs=8"]
    keys += ["patience=0"] if stage == "reward" else []
    with pytest.raises(RunError, match=r"steps in a row of the \w+ had a loss or gradient that .* not finite"):
        with build(stage, form, home, tmp_path / "run", *keys) as run:
            run.train()
    assert not (tmp_path / "run" / "model").exists()


@EVERY_FORM
@pytest.mark.parametrize("entry", ["ppo", "engine"])
def test_ids_beyond_the_tokenizer_are_sampled_nowhere(entry, form, home, tmp_path):
    """A model of 80 ids whose probability lies on those that the tokenizer of 61 lacks."""
    model, tokenizer = tiny.causal_lm(vocab_size=80), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight[61:] = 3 * model.lm_head.weight[5]
    source = cases.save_model(tmp_path / "padded", model, tokenizer) if form == "folder" else model
    if entry == "engine":
        engine = icegrt.RolloutEngine(icegrt.load_actor(source), tokenizer)
        responses = [r.tokens for r in engine.generate([[5, 6]], 16, icegrt.Sampling(max_new_tokens=8))]
    else:
        config = tiny.ppo_config(tmp_path / "run", iterations=1, critic=CriticConfig(init="actor"))
        with PPOTrainer(config, source, tokenizer, cases.share_of_a, cases.prompt_rows()) as run:
            step = run.step()
        assert step.rollout_logprob_gap_max < 1e-4 and abs(step.kl_nats_per_response) < 1e-6
        rows = cases.read_jsonl(tmp_path / "run" / "rollouts" / "iteration_00001.jsonl")
        responses = [row["response_ids"] for row in rows]
    sampled = torch.tensor([token for tokens in responses for token in tokens])
    assert len(sampled) > 8 and sampled.max() < 61


@EVERY_STAGE
@EVERY_FORM
def test_a_disk_that_is_full_while_the_tokenizer_is_written_is_one_system_error(stage, form, home, tmp_path):
    tokenizer = tiny.tokenizer()
    rules = [normalizers.Replace("#" * 300 + str(i), "") for i in range(400)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(rules)
    if form == "folder":
        home = cases.make_home(tmp_path / "home")
        tokenizer.save_pretrained(home.actor)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # room for the configuration, not for the tokenizer
    try:
        with pytest.raises(OSError, match="File too large") as error:
            build(stage, form, home, tmp_path / "run", tokenizer=tokenizer if form == "memory" else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "run" / "tokenizer")


@pytest.mark.parametrize("command", ["sample", "generate"])
def test_a_file_that_is_written_or_read_by_others_is_no_output(command, home, tmp_path, capsys):
    prompts = Path(cases.write_jsonl(tmp_path / "prompts.jsonl", cases.prompt_rows()))
    text = prompts.read_text()
    keys = [f"{command}.model={home.actor}", f"{command}.prompts={prompts}", f"{command}.sampling.max_new_tokens=4"]
    with JsonlWriter(tmp_path / "rows.jsonl") as other:
        other.write({"a": 1})
        assert cli.main([command, *keys, f"{command}.out={tmp_path}/rows.jsonl"]) == 2
        assert "rows.jsonl: another process is writing it" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'
    assert cli.main([command, *keys, f"{command}.out={prompts}"]) == 2
    assert "this command reads it and would replace it" in capsys.readouterr().err and prompts.read_text() == text


@EVERY_FORM
def test_models_and_exports_keep_the_eos_ids_of_the_generation_config(form, home, tmp_path):
    model, tokenizer = tiny.causal_lm(), tiny.tokenizer()
    model.generation_config.eos_token_id = [tiny.EOS, 40]
    source = cases.save_model(tmp_path / "start", model, tokenizer) if form == "folder" else model
    config = SFTConfig.load(None, cases.sft_keys(home, tmp_path / "run"))
    with SFTTrainer(config, source, tokenizer) as run:
        run.train()
    assert cli.main(["export", f"export.run={tmp_path}/run", f"export.out={tmp_path}/out"]) == 0
    for folder in (tmp_path / "run" / "model", tmp_path / "out"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert written["eos_token_id"] == [tiny.EOS, 40]
        assert icegrt.RolloutEngine(icegrt.load_actor(folder), tokenizer).decoder.stop_ids == {tiny.EOS, 40}


def test_an_export_replaces_no_folder(home, tmp_path, capsys):
    with build("sft", "folder", home, tmp_path / "run") as run:
        run.step()
        run.save_checkpoint()
        run.complete_checkpoint()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for out in ("out", "run"):
        assert cli.main(["export", f"export.run={tmp_path}/run", f"export.out={tmp_path}/{out}"]) == 2
        assert "already there, and not an empty folder" in capsys.readouterr().err
    assert cases.files_under(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize(("stage", "role"), [("sft", "actor"), ("reward", "reward"), ("ppo", "critic")])
def test_an_export_on_a_full_disk_leaves_nothing(stage, role, home, tmp_path, capsys):
    with build(stage, "folder", home, tmp_path / "run") as run:
        run.step()
        run.save_checkpoint()
        run.complete_checkpoint()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        keys = [f"export.run={tmp_path}/run", f"export.out={tmp_path}/out", f"export.role={role}"]
        assert cli.main(["export", *keys]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out: cannot be written (File too large)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
