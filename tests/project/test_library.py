"""icegrt as a library: trainers and rollouts from Python, models in memory, torch left as it was, the README's word."""

import dataclasses
import gc
import inspect
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import icegrt
from icegrt.packing import pack
from icegrt.ppo.scoring import LogprobScorer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]


def torch_names():
    """What the engine stands in for where there is no CUDA device."""
    cuda = [getattr(torch.cuda, name) for name in ("current_device", "synchronize", "get_rng_state", "is_available")]
    return [*cuda, torch.Tensor.cuda, torch.Tensor.type, torch.zeros, torch.distributed.is_initialized()]


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    gc.collect()
    before = torch_names()
    yield
    gc.collect()  # a model of `load_actor` holds the process groups for as long as it lives
    assert all(one is other for one, other in zip(before, torch_names(), strict=True))
    assert not torch.distributed.is_initialized()


@pytest.fixture
def config(tmp_path):
    def made(name="run", *keys):
        size = (*cases.SMALL_PPO, "ppo.checkpoint_every=10", f"ppo.run.dir={tmp_path / name}")
        return icegrt.PPOConfig.load(None, [*size, *keys])

    return made


def python(code, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )


# -- names --------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_documented():
    assert set(icegrt.__all__) <= set(dir(icegrt))
    for name in icegrt.__all__:
        value = getattr(icegrt, name)
        assert name == "__version__" or value.__doc__, name
    assert re.match(r"\d+\.\d+", icegrt.__version__)
    for kind in ("Config", "Data", "Checkpoint", "Reward", "Run"):
        assert issubclass(getattr(icegrt, f"{kind}Error"), icegrt.UserError)
    with pytest.raises(AttributeError, match="no attribute 'PPO'"):
        icegrt.PPO  # noqa: B018


def test_the_light_part_stays_light(tmp_path):
    code = (
        "import sys, icegrt\n"
        "assert 'torch' not in sys.modules\n"
        "icegrt.kernels.linear_ppo_loss, icegrt.packing.balance, icegrt.PPOConfig, icegrt.Sampling, icegrt.UserError\n"
        "print([m for m in ('megatron', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    result = python(["-c", code], tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


# -- trainers -----------------------------------------------------------------------------------------------------


def test_models_in_memory_for_every_role(config):
    roles = {"reference": tiny_models.causal_lm(3), "critic": tiny_models.scorer(4)}
    trainer = icegrt.PPOTrainer(
        config(),
        actor=tiny_models.causal_lm(),
        tokenizer=tiny_models.tokenizer(),
        reward=[tiny_models.scorer(), cases.share_of_a],
        prompts=cases.prompt_rows(),
        eval_prompts=cases.prompt_rows()[:2],
        **roles,
    )
    with trainer:
        assert isinstance(trainer.evaluate(), icegrt.Evaluation)
        steps = list(trainer)
    assert [type(step) for step in steps] == [icegrt.PPOStep] * 2
    assert steps[0].reward_model_score_mean is not None and steps[0].function_score_mean is not None
    assert steps[0].kl_nats_per_response != 0.0  # another reference than the actor


def as_dataset(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


@pytest.mark.parametrize("kind", [list, iter, as_dataset], ids=["list", "generator", "dataset"])
def test_rows_may_come_as_any_iterable(config, kind):
    topics = []

    def score(samples):
        topics.extend(sample.row["topic"] for sample in samples)
        return [0.0] * len(samples)

    components = {"actor": tiny_models.causal_lm(), "tokenizer": tiny_models.tokenizer(), "reward": score}
    keys = ["ppo.critic.init=actor", "ppo.iterations=1", "ppo.prompts_per_iteration=8"]
    with icegrt.PPOTrainer(config("run", *keys), prompts=kind(cases.prompt_rows()), **components) as trainer:
        trainer.step()
    assert set(topics) == set(range(8))


def test_an_exported_actor_says_in_transformers_what_it_says_here(config, tmp_path):
    components = {"actor": tiny_models.causal_lm(), "tokenizer": tiny_models.tokenizer(), "reward": cases.share_of_a}
    with icegrt.PPOTrainer(
        config("run", "ppo.critic.init=actor"), prompts=cases.prompt_rows(), **components
    ) as trainer:
        for _ in trainer:
            pass
        trainer.save_pretrained(tmp_path / "out")
        engine_logprobs, _ = LogprobScorer(1.0, None)(trainer.actor, [pack([[2, 7, 9]], [[20, 21, 22, 23]])])
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logprobs = hf_model(torch.tensor([[2, 7, 9, 20, 21, 22, 23]])).logits.log_softmax(-1)[0, 2:6]
    torch.testing.assert_close(
        engine_logprobs, logprobs.gather(1, torch.tensor([[20], [21], [22], [23]]))[:, 0], atol=2e-5, rtol=0
    )
    assert not torch.equal(hf_model.lm_head.weight, components["actor"].lm_head.weight)


def test_weights_that_do_not_move_come_out_to_the_bit(config, tmp_path):
    actor = tiny_models.causal_lm()
    keys = ["ppo.critic.init=actor", "ppo.optimizer.lr=0", "ppo.iterations=1"]
    components = {"actor": actor, "tokenizer": tiny_models.tokenizer(), "reward": cases.share_of_a}
    with icegrt.PPOTrainer(config("run", *keys), prompts=cases.prompt_rows(), **components) as trainer:
        trainer.step()
        trainer.save_pretrained(tmp_path / "out")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.tensor([[2, 7, 9, 20]])
    assert torch.equal(hf_model(ids).logits, actor(ids).logits)


def test_sft_then_reward_then_ppo_in_one_process(config, tmp_path):
    tokenizer = tiny_models.tokenizer()
    sft_config = icegrt.SFTConfig(epochs=1, batch_sequences=4, run={"dir": str(tmp_path / "sft")})
    with icegrt.SFTTrainer(sft_config, tiny_models.causal_lm(), tokenizer, cases.sft_rows()) as sft:
        assert all(isinstance(step, icegrt.SFTStep) for step in sft)
        sft.save_pretrained(tmp_path / "instruct")
    reward_config = icegrt.RewardConfig(batch_prompts=4, run={"dir": str(tmp_path / "rm")})
    rows = cases.ranking_rows()
    with icegrt.RewardTrainer(reward_config, str(tmp_path / "instruct"), data=rows, heldout=rows) as reward:
        assert all(isinstance(step, icegrt.RewardStep) for step in reward)
        reward.save_pretrained(tmp_path / "judge")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert scorer.config.num_labels == 1
    parts = {"actor": tmp_path / "instruct", "reward": str(tmp_path / "judge"), "prompts": cases.prompt_rows()}
    with icegrt.PPOTrainer(config(), **parts) as ppo:
        assert len(list(ppo)) == 2


def test_a_second_trainer_in_the_same_process_repeats_the_first(config):
    runs = []
    for name in ("first", "second"):
        components = {
            "actor": tiny_models.causal_lm(),
            "tokenizer": tiny_models.tokenizer(),
            "reward": tiny_models.scorer(),
        }
        with icegrt.PPOTrainer(config(name), prompts=cases.prompt_rows(), **components) as trainer:
            runs.append([(s.score_mean, s.kl_nats_per_response, s.policy_loss, s.grad_norm_critic) for s in trainer])
    assert runs[0] == runs[1]


def test_a_model_in_memory_needs_a_tokenizer_and_a_score_needs_a_critic(config, tmp_path):
    model, rows = tiny_models.causal_lm(), cases.prompt_rows()
    with pytest.raises(icegrt.ConfigError, match="pass tokenizer="):
        icegrt.PPOTrainer(config(), model, reward=tiny_models.scorer(), prompts=rows)
    with pytest.raises(icegrt.ConfigError, match=r"ppo\.critic\.init=actor"):
        icegrt.PPOTrainer(config(), model, tiny_models.tokenizer(), cases.share_of_a, rows)
    with pytest.raises(icegrt.CheckpointError, match="got dict"):
        icegrt.PPOTrainer(config(), {}, tiny_models.tokenizer(), tiny_models.scorer(), rows)
    assert cases.files_under(tmp_path) == []


# -- notebooks and scripts ----------------------------------------------------------------------------------------


def test_training_in_a_thread_as_notebooks_do(config):
    has_report = []

    def work():
        components = {
            "actor": tiny_models.causal_lm(),
            "tokenizer": tiny_models.tokenizer(),
            "reward": tiny_models.scorer(),
        }
        with icegrt.PPOTrainer(config(), prompts=cases.prompt_rows(), **components) as trainer:
            trainer.train()
            has_report.append((trainer.dir / "report.html").is_file())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert has_report == [True]


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    (tmp_path / "script.py").write_text(
        "import icegrt\nfrom tests.helpers import tiny_models, stage_cases as cases\n"
        "print('started')\n"
        "config = icegrt.PPOConfig.load(None, [*cases.SMALL_PPO, 'ppo.run.dir=run'])\n"
        "trainer = icegrt.PPOTrainer(config, tiny_models.causal_lm(), tiny_models.tokenizer(), tiny_models.scorer(),\n"
        "                            cases.prompt_rows())\n"
        "print([step.iteration for step in trainer])\n"
        "trainer.close()\n"
    )
    result = python(["script.py"], tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line == "started" or line.startswith("[")]
    assert lines == ["started", "[1, 2]"]
    checkpoint_names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoint_names == ["latest", "step_000001", "step_000002"]


# -- rollouts -----------------------------------------------------------------------------------------------------


def test_rollouts_without_a_trainer():
    tokenizer = tiny_models.tokenizer()
    engine = icegrt.RolloutEngine(icegrt.load_actor(tiny_models.causal_lm()), tokenizer)
    sampling = icegrt.Sampling(temperature=1.0, max_new_tokens=6, seed=5)
    prompts = ["say a", tokenizer("why 7?")["input_ids"]]
    responses = list(engine.stream(prompts, n=4, sampling=sampling))
    assert sorted((r.prompt_index, r.sample) for r in responses) == [(p, s) for p in range(2) for s in range(4)]
    assert all(isinstance(r, icegrt.Response) and len(r.tokens) == len(r.logprobs) for r in responses)
    repeated = engine.generate(prompts, 4, sampling)
    assert repeated == sorted(responses, key=lambda r: (r.prompt_index, r.sample))
    model = engine.decoder.model
    assert not any(chunk.training for chunk in model.chunks) and not any(p.requires_grad for p in model.parameters())


def test_load_actor_refuses_and_leaves_nothing_open(tmp_path):
    with pytest.raises(icegrt.CheckpointError, match=r"no config\.json"):
        icegrt.load_actor(tmp_path)
    with pytest.raises(icegrt.ConfigError, match="fp32, bf16"):
        icegrt.load_actor(tmp_path, dtype="fp8")
    assert not torch.distributed.is_initialized()


# -- the README ---------------------------------------------------------------------------------------------------


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_readme_opens_with_the_commands_that_show_most():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    title, sentence, block = text.split("\n\n")[:3]
    assert title.startswith("# ") and sentence.count(". ") == 0 and "\n" not in sentence
    assert block == "```sh\nmake learn\nmake ppo\nmake test\n```"


def test_the_readmes_library_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    score_file, example = blocks("python")
    monkeypatch.chdir(tmp_path)
    cases.save_model(tmp_path / "path" / "to" / "hf", tiny_models.causal_lm(), tiny_models.tokenizer())
    keys = [*cases.SMALL_PPO, "ppo.critic.init=actor", "ppo.run.dir=runs/mine"]
    icegrt.PPOConfig.load(None, keys).save(tmp_path / "ppo.yaml")
    namespace = {"tokenizer": tiny_models.tokenizer(), "dataset": as_dataset(cases.prompt_rows())}
    exec(compile(score_file, "score.py", "exec"), namespace)
    exec(compile(example, "README.md", "exec"), namespace)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert len(re.findall(r"^[12] -?\d", capsys.readouterr().out, re.MULTILINE)) == 2


def test_the_readmes_commands_and_links_exist():
    from icegrt.cli import COMMANDS, parse
    from icegrt.commands import migrate, plan, rehearse
    from icegrt.config import SECTIONS

    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("icegrt ")]
    assert {words[0] for words in commands} == set(COMMANDS)
    for words in commands:
        if words[0] == "data":  # its own words, not keys of a configuration: tests/test_data_preview.py runs it
            assert words[1] == "preview"
            continue
        if words[0] == "report":  # its word is a folder
            assert words[1:] == ["runs/ppo"]
            continue
        if words[0] == "migrate":  # it has options: tests/commands/test_migrate.py runs it
            assert migrate.parser().parse_args(words[1:]).out == Path("ppo.yaml")
            continue
        if words[0] in ("rehearse", "plan"):  # they have options: tests/commands/ runs them
            parser = {"rehearse": rehearse, "plan": plan}[words[0]].parser()
            assert parser.parse_intermixed_args(words[1:]).config == "runs/ppo/config.yaml"
            continue
        args = parse(words)
        if args.command in SECTIONS and args.config is None:
            SECTIONS[args.command].load(None, args.overrides)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_hooks_and_fields_that_the_pages_name_are_the_real_ones():
    library, data = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("library.md", "data.md"))
    hooks = re.findall(r"def (on_\w+)\(self, (.*)\)", library)
    assert {name for name, _ in hooks} == {name for name in vars(icegrt.Callback) if name.startswith("on_")}
    for name, arguments in hooks:
        assert list(inspect.signature(getattr(icegrt.Callback, name)).parameters) == ["self", *arguments.split(", ")]
    table = data.split("| field of a sample")[1].split("\n\n")[0]
    fields = {field.name for field in dataclasses.fields(icegrt.Sample)}
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == fields | {"messages"}
    for kind, signature in re.findall(r"`(\w+Trainer)\(config, ([^)]*)\)`", library):
        names = [name for name in signature.split(", ") if name != "*"]
        assert list(inspect.signature(getattr(icegrt, kind)).parameters) == ["config", *names]
