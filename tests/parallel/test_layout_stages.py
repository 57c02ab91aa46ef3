"""Every command in a layout; checkpoints and exports that outlive it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icegrt import cli
from icegrt.model.architecture import DTYPES
from icegrt.roles.optimizer import inner_optimizers
from icegrt.rollout.types import Sampling
from tests.helpers import stage_cases as stages
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, trainer, write_ptx
from tests.helpers.ranks import launch

FOUR = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true")


def command(*args):
    assert cli.main([str(a) for a in args]) == 0


def keys(section, layout):
    return [f"{section}.{key}" for key in layout]


def everything(home, out, layout):
    """The whole recipe, one command after the other."""
    sampling = ["temperature=1.0", "max_new_tokens=6"]
    command("sft", *stages.sft_keys(home, out / "sft"), *keys("sft", layout))
    command("reward", *stages.reward_keys(home, out / "reward"), *keys("reward", layout))
    command("ppo", *stages.ppo_keys(home, out / "ppo", "ppo.iterations=1"), *keys("ppo", layout))
    for name in ("sample", "generate"):
        given = [f"{name}.model={home.actor}", f"{name}.prompts={home.prompts}", f"{name}.out={out / name}.jsonl"]
        command(name, *given, *(f"{name}.sampling.{key}" for key in sampling), *keys(name, layout))
    for role in ("actor", "critic"):
        given = [f"export.run={out / 'ppo'}", f"export.role={role}", f"export.out={out / role}"]
        command("export", *given)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_command_writes_in_a_layout_what_one_process_writes(world, tmp_path):
    home = stages.make_home(tmp_path)
    for ranks, layout, out in ((1, (), "one"), (world, FOUR if world == 4 else FOUR[:1], "cut")):
        (tmp_path / out).mkdir()
        launch(ranks, everything, home, tmp_path / out, layout)
    one, cut = stages.files_under(tmp_path / "one"), stages.files_under(tmp_path / "cut")

    def plain(names):  # dist_checkpointing writes a file per rank
        return [n for n in names if ".distcp" not in n and "events.out" not in n]

    assert plain(cut) == plain(one)
    for name in ("sample.jsonl", "generate.jsonl"):
        assert stages.read_jsonl(tmp_path / "cut" / name) == stages.read_jsonl(tmp_path / "one" / name)
    assert len(stages.read_jsonl(tmp_path / "cut" / "ppo" / "metrics.jsonl")) == 1
    rows = [stages.read_jsonl(tmp_path / o / "ppo" / "rollouts" / "iteration_00001.jsonl") for o in ("cut", "one")]
    assert [r["response_ids"] for r in rows[0]] == [r["response_ids"] for r in rows[1]]
    # What `ppo` wrote at its end and what `export` makes of the checkpoint are one and the same.
    ours, exported = (load_file(tmp_path / "cut" / f / "model.safetensors") for f in ("ppo/model", "actor"))
    assert tiny.same(ours, exported)


# -- save in one layout, resume in others -----------------------------------------------------------------------------

SAVED_IN, RESUMED_IN = "tp2_pp2", ("dp2", "one_tied", "pp2_virtual")


def save(folder):
    with trainer(config(folder / "run", SAVED_IN, iterations=2, checkpoint_every=1), True) as run:
        run.step()
        run.step()
        tell(folder, SAVED_IN, run, None)


def resume(folder, layout):
    settings = config(folder / "run", layout, iterations=4, checkpoint_every=4, run={"resume": True})
    with trainer(settings, True) as run:
        before = tiny.by_hugging_face_name(run.actor, lambda p: p)
        run.save_checkpoint()  # what came out of one layout, written by another
        told = [run.step() for _ in range(2)]
        tell(folder, layout, run, {"before": before, "steps": [(s.policy_loss, s.value_loss) for s in told]})


def adam_steps(role):
    """The distinct step counts of a role's optimizer states."""
    inner = inner_optimizers(role.optimizer)
    return sorted({float(state["step"]) for optimizer in inner for state in optimizer.optimizer.state.values()})


def tell(folder, name, run, more):
    held = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
    adam = {r.name: adam_steps(r) for r in run.roles}
    if run.cluster.is_main:
        torch.save({"weights": held, "adam": adam, **(more or {})}, folder / f"{name}.pt")


def export(folder, ranks):
    for role in ("actor", "critic"):
        given = [f"export.run={folder / 'saved'}", f"export.role={role}", f"export.out={folder / f'{role}_{ranks}'}"]
        command("export", *given)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_goes_on_in_another_layout_and_is_exported_alike_from_each(tmp_path):
    import shutil

    write_ptx(tmp_path)
    launch(LAYOUTS[SAVED_IN][0], save, tmp_path)
    saved = torch.load(tmp_path / f"{SAVED_IN}.pt")
    shutil.copytree(tmp_path / "run", tmp_path / "saved")
    told = {}
    for layout in RESUMED_IN:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "saved", tmp_path / "run")
        launch(LAYOUTS[layout][0], resume, tmp_path, layout)
        told[layout] = torch.load(tmp_path / f"{layout}.pt")
        assert tiny.same(told[layout]["before"], saved["weights"]["actor"])
        for role in ("actor", "critic"):
            out = tmp_path / f"{role}_{layout}"
            given = [f"export.run={tmp_path / 'run'}", f"export.role={role}", f"export.out={out}"]
            command("export", *given, "export.checkpoint=step_000002")
            assert tiny.same(load_file(out / "model.safetensors"), saved["weights"][role])
    one = told["one_tied"]
    # Two steps later the optimizers' states have been used: a lost moment or step count would show by now.
    for cut in (told[layout] for layout in RESUMED_IN):
        for ours, theirs in zip(cut["steps"], one["steps"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        for role in saved["weights"]:
            assert tiny.gap(cut["weights"][role], one["weights"][role])[0] <= 1e-5
        assert cut["adam"] == one["adam"] and all(len(steps) == 1 for steps in cut["adam"].values())
    for ranks in (1, 2, 4):
        launch(ranks, export, tmp_path, ranks)
    for role in ("actor", "critic"):
        files = [load_file(tmp_path / f"{role}_{ranks}" / "model.safetensors") for ranks in (1, 2, 4)]
        assert tiny.same(files[0], files[1]) and tiny.same(files[0], files[2])
        assert tiny.same(files[0], saved["weights"][role])


# -- nothing as wide as the vocabulary --------------------------------------------------------------------------------


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """Every tensor that is made inside: those with a dimension of the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.found = vocabulary, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and self.vocabulary & set(x.shape):
                self.found.add((str(function), tuple(x.shape)))
        return out


def nothing_wide(folder):
    settings = config(folder / "run", "tp2", chunk_rows=16, ptx_coef=0.0)
    with trainer(settings, False) as run:
        # 61 tokens, padded to 62 and cut into 31; no other dimension has these sizes.
        with Widest({tiny.VOCAB, tiny.VOCAB + 1}) as watch:
            run.step()
            run.components.engine.generate([[5, 6, 7]], 2, Sampling(temperature=0.0, max_new_tokens=3))
        assert watch.found == set(), watch.found
        with Widest({31}) as control:
            run.components.engine.generate([[5, 6, 7]], 1, Sampling(max_new_tokens=2))
        assert control.found


@pytest.mark.timeout(400)
def test_neither_training_nor_rollout_makes_a_tensor_as_wide_as_the_vocabulary(tmp_path):
    write_ptx(tmp_path)
    launch(2, nothing_wide, tmp_path)


# -- recomputation ----------------------------------------------------------------------------------------------------


def recomputed(folder, layout, dtype):
    found = []
    for how in ("none", "selective", "full"):
        settings = config(folder / how, layout, ptx_coef=0.0, minibatches=1, run={"recompute": how, "dtype": dtype})
        with trainer(settings, LAYOUTS[layout][2]) as run:
            step = run.step()
            found.append((step, tiny.by_hugging_face_name(run.actor, lambda p: p)))
            assert (step.ratio_min, step.ratio_max) == (1.0, 1.0)
            for p in run.actor.model.parameters():
                assert p.dtype == DTYPES[dtype] and p.main_grad.dtype == torch.float32
            masters = [
                master
                for optimizer in inner_optimizers(run.actor.optimizer)
                for group in optimizer.optimizer.param_groups
                for master in group["params"]
            ]
            assert {master.dtype for master in masters} <= {torch.float32}
    for step, after in found[1:]:
        assert step.policy_loss == found[0][0].policy_loss and step.value_loss == found[0][0].value_loss
        assert tiny.same(after, found[0][1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("one", "fp32"), ("one", "bf16"), pytest.param("tp2_pp2", "bf16", marks=pytest.mark.long)],
)
def test_activations_formed_again_change_nothing_and_sums_are_fp32(layout, dtype, tmp_path):
    write_ptx(tmp_path)
    launch(LAYOUTS[layout][0], recomputed, tmp_path, layout, dtype)


def test_a_layout_is_read_from_the_configuration(tmp_path, capsys):
    path = Path(tmp_path / "recipe.yaml")
    path.write_text(json.dumps({"ppo": {"parallel": {"tensor": 2, "pipeline_split": [3, 1], "pipeline": 2}}}))
    command("ppo", path, "--print-config")
    assert "pipeline_split: [3, 1]" in capsys.readouterr().out.replace("\n    - 3\n    - 1", " [3, 1]")
