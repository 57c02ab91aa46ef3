"""Record what a refactoring must not change, and compare two records.

    python tools/freeze.py record before.json --work runs/freeze-before
    python tools/freeze.py record after.json --work runs/freeze-after
    python tools/freeze.py compare before.json after.json
    python tools/freeze.py resume runs/freeze-before after     # after: `before` or another name for the report

A record holds the public names with their signatures, every configuration key with its default, the fields of every
metrics record, the names of all tests, import times, and for SFT, reward and PPO runs of a tiny model (fp32, one
thread; one process, TP2 and DP2): the rows of `metrics.jsonl` without times, the files of the run, and a digest of the
exported weights. `resume` takes the PPO runs that `record` left in a work folder, deletes everything after their middle
checkpoint, continues them with the installed code and requires the same rows and weights.

Only public names and the command line are used, so one copy of this file serves any commit. Bits depend on the
processor and on torch: compare records of one machine. Import times are printed and never compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYOUTS = {"one": (1, {}), "tp2": (2, {"tensor": 2}), "dp2": (2, {})}
CONFIGS = ("SFTConfig", "RewardConfig", "PPOConfig", "SampleConfig", "GenerateConfig", "ExportConfig")
RECORDS = ("PPOStep", "SFTStep", "RewardStep", "Evaluation")
IMPORTS = ("icegrt", "icegrt.kernels", "icegrt.packing", "icegrt.cli")
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWARD = 'def share_of_a(samples):\n    return [s.text.count("a") / max(len(s.tokens), 1) for s in samples]\n'


def record(output: Path, work: Path) -> None:
    """Write a record of the installed icegrt to `output`; runs and checkpoints stay under `work`."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    inputs = make_inputs(work / "inputs")
    frozen = {
        "format": 2,
        "names": public_names(),
        "keys": {name: configuration_keys(name) for name in CONFIGS},
        "fields": {name: metric_fields(name) for name in RECORDS},
        "tests": test_names(),
        "runs": {},
        "import_seconds": {module: import_seconds(module) for module in IMPORTS},
    }
    for layout in LAYOUTS:
        for stage in ("sft", "reward", "ppo"):
            run = work / f"{stage}_{layout}"
            execute(layout, stage, keys(stage, inputs, run, layout))
            frozen["runs"][run.name] = outcome(run)
            print(f"freeze: {run.name} done", flush=True)
    output.write_text(json.dumps(frozen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """Print every difference of two records. Returns 0 if there is none beside tests and times, else 1."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    reduce_to_format(old, new)
    differences = [line for part in ("names", "keys", "fields", "runs") for line in differ(part, old[part], new[part])]
    print(*differences, sep="\n")
    gone, added = (sorted(set(a) - set(b)) for a, b in ((old["tests"], new["tests"]), (new["tests"], old["tests"])))
    print(f"tests: {len(old['tests'])} before, {len(new['tests'])} after; names gone {len(gone)}, added {len(added)}")
    print(*(f"  gone: {name}" for name in gone), sep="\n")
    for module, seconds in old["import_seconds"].items():
        print(f"import {module}: {seconds:.2f} s before, {new['import_seconds'][module]:.2f} s after")
    print("frozen parts are " + (f"different in {len(differences)} places" if differences else "identical"))
    return bool(differences)


def reduce_to_format(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Reduce both records to what an old record of format 1 holds: no inherited members, and keys as pydantic's repr.

    Format 1 shows the default between `default=` and `, description=`, and no default that a factory makes.
    """
    if old.get("format", 1) == new.get("format", 1):
        return
    known = set(old["names"])
    new["names"] = {n: text for n, text in new["names"].items() if n in known or n.rpartition(".")[0] not in known}
    for stage, keys in old["keys"].items():
        for key, text in keys.items():
            default = re.search(r"[(, ]default=(.*?), description=", text)
            keys[key] = default[1] if default else new["keys"].get(stage, {}).get(key, text)


def resume(work: Path, label: str) -> int:
    """Continue the PPO runs of `work` from their middle checkpoints; returns 1 if a row or a weight differs."""
    failed = 0
    for layout in LAYOUTS:
        original, copy = work / f"ppo_{layout}", work / f"ppo_{layout}_resumed_{label}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy, symlinks=True)
        for name in ("model", "summary.json", "report.html", "curves.png"):
            remove(copy / name)
        steps = sorted(p for p in (copy / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink())
        remove(steps[-1])
        execute(layout, "ppo", [*keys("ppo", work / "inputs", copy, layout), "ppo.run.resume=true"])
        old, new = outcome(original), outcome(copy)
        same = old["metrics"] == new["metrics"] and old["weights"] == new["weights"]
        print(f"resume {layout} from {steps[0].name}: {'identical' if same else 'DIFFERENT'}")
        failed |= not same
    return int(failed)


def differ(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [line for n in names for line in differ(f"{path}.{n}", old.get(n, "absent"), new.get(n, "absent"))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differ(f"{path}[{i}]", *pair)]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def public_names() -> dict[str, str]:
    """Each public name with its signature, as `inspect` prints it; for classes also their public members."""
    import icegrt
    from icegrt import kernels, packing

    names = {}
    for module in (icegrt, kernels, packing):
        for name in module.__all__:
            value = getattr(module, name)
            names[f"{module.__name__}.{name}"] = signature(value)
            for member in public_members(value) if inspect.isclass(value) else ():
                names[f"{module.__name__}.{name}.{member}"] = signature(inspect.getattr_static(value, member))
    return names


def public_members(cls: type) -> set[str]:
    """The public members of a class, with those that it inherits from other classes of the package."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("icegrt")]
    return {member for base in own for member in vars(base) if not member.startswith("_")}


def signature(value: Any) -> str:
    """Parameters with their defaults: annotations may be written in another form and mean the same."""
    value = inspect.unwrap(getattr(value, "__func__", value))
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return type(value).__name__
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)


def configuration_keys(name: str) -> dict[str, str]:
    import icegrt

    found: dict[str, str] = {}

    def visit(prefix: str, cls: type) -> None:
        import typing

        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            inner = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
            default = field.default  # pydantic's FieldInfo, which also holds the help text
            if default is not dataclasses.MISSING:
                default = default.get_default(call_default_factory=True)
            found[f"{prefix}{field.name}"] = "required" if default is dataclasses.MISSING else repr(default)
            for t in inner:
                visit(f"{prefix}{field.name}.", t)

    visit("", getattr(icegrt, name))
    return found


def metric_fields(name: str) -> list[str]:
    import icegrt

    return [field.name for field in dataclasses.fields(getattr(icegrt, name))]


def test_names() -> list[str]:
    """Function name and parameters of every collected test, without its file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(line.split("::", 1)[1] for line in lines if "::" in line)


def import_seconds(module: str) -> float:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(5))


def make_inputs(folder: Path) -> Path:
    """Checkpoints of a tiny actor and scorer, a tokenizer, and files of rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder.mkdir()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "initializer_range": 0.25}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False}
    for seed, (name, auto, more) in enumerate(
        [("actor", AutoModelForCausalLM, {}), ("scorer", AutoModelForSequenceClassification, {"num_labels": 1})]
    ):
        torch.manual_seed(seed)
        auto.from_config(AutoConfig.for_model("llama", **shape, **tokens, **more)).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    prompts = ["say a", "what is up?", "count to 3", "name a cat", "go on", "why 7?", "sing it", "tell me more"]
    draw = random.Random(0)
    answers = [["".join(draw.choice("abcz ") for _ in range(6)) for _ in range(4)] for _ in prompts]
    write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write_rows(folder / "sft.jsonl", [{"prompt": p, "response": f"{p[:3]} ok"} for p in prompts])
    write_rows(
        folder / "rankings.jsonl",
        [{"prompt": p, "responses": a, "scores": [x.count("a") for x in a]} for p, a in zip(prompts, answers)],
    )
    (folder / "score.py").write_text(REWARD, encoding="utf-8")
    return folder


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([*SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def keys(stage: str, inputs: Path, run: Path, layout: str) -> list[str]:
    """Overrides of a small run of `stage` that passes through most of what the stage can do."""
    rows = {"sft": "sft", "reward": "rankings"}.get(stage)
    common = [f"{stage}.run.dir={run}", f"{stage}.run.seed=5", f"{stage}.optimizer.lr=1e-2"]
    common += [f"{stage}.parallel.{key}={value}" for key, value in LAYOUTS[layout][1].items()]
    if stage != "ppo":
        size = "batch_sequences=4" if stage == "sft" else "batch_prompts=4"
        data = [f"{stage}.{key}=[{{path: {inputs / rows}.jsonl}}]" for key in ("data", "heldout")]
        return [*common, *data, f"{stage}.model={inputs / 'actor'}", f"{stage}.{size}", f"{stage}.token_budget=256"]
    return [
        *common,
        f"ppo.actor={inputs / 'actor'}",
        f"ppo.reward_model={inputs / 'scorer'}",
        f"ppo.reward_function={inputs / 'score.py'}:share_of_a",
        f"ppo.prompts={inputs / 'prompts.jsonl'}",
        f"ppo.eval_prompts={inputs / 'prompts.jsonl'}",
        "ppo.iterations=4",
        "ppo.eval_every=2",
        "ppo.checkpoint_every=2",
        "ppo.prompts_per_iteration=5",
        "ppo.samples_per_prompt=2",
        "ppo.sampling.max_new_tokens=8",
        "ppo.token_budget=64",
        "ppo.ppo_epochs=2",
        "ppo.minibatches=2",
        "ppo.kl_control=adaptive",
        "ppo.score_shift=true",
        "ppo.missing_eos_penalty=0.5",
        "ppo.bootstrap_truncated=true",
        "ppo.ptx_coef=0.1",
        f"ppo.ptx_data=[{{path: {inputs / 'sft.jsonl'}}}]",
        "ppo.ptx_sequences=3",
        "ppo.critic.optimizer.lr=1e-2",
    ]


def execute(layout: str, stage: str, overrides: list[str]) -> None:
    ranks = LAYOUTS[layout][0]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*start, "-m", "icegrt", stage, *overrides], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise SystemExit(f"freeze: icegrt {stage} ({layout}) failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def outcome(run: Path) -> dict[str, Any]:
    """Metrics without times, the files of the run, and a digest of the exported weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = (p for p in run.rglob("*") if "tfevents" not in p.name)
    weights = sorted(run.glob("model/*.safetensors"))
    return {
        "metrics": [{k: v for k, v in row.items() if "second" not in k} for row in rows],
        "files": sorted(p.relative_to(run).as_posix() for p in files),
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights],
    }


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="run everything and write a record")
    one.add_argument("output", type=Path)
    one.add_argument("--work", type=Path, required=True, help="folder for inputs and runs; it is emptied first")
    two = commands.add_parser("compare", help="compare two records; exit 1 if a frozen part differs")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    three = commands.add_parser("resume", help="continue the PPO runs of a work folder with the installed code")
    three.add_argument("work", type=Path)
    three.add_argument("label")
    given = parser.parse_args()
    if given.command == "record":
        record(given.output.resolve(), given.work.resolve())
        return 0
    if given.command == "compare":
        return compare(given.before, given.after)
    return resume(given.work.resolve(), given.label)


if __name__ == "__main__":
    sys.exit(main())
