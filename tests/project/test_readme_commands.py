"""The commands of the README, run as they stand, in their order, in a folder that holds what they name."""

import re
import shlex
from pathlib import Path

from icegrt import cli
from icegrt.config.loader import as_yaml
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models
from tests.helpers.studies import STUDY, study_of

ROOT = Path(__file__).resolve().parents[2]
# Sizes alone: what the README names is left as it is.
SMALL = {
    "sft": ["sft.batch_sequences=4", "sft.token_budget=64"],
    "sample": ["sample.sampling.max_new_tokens=8"],
    "reward": ["reward.batch_prompts=4", "reward.token_budget=256"],
    "value": ["value.batch_sequences=4", "value.token_budget=64"],
    "ppo": [*cases.SMALL_PPO, "ppo.iterations=1"],
    "rehearse": ["--prompt-tokens", "uniform:8:32"],
    "plan": ["--prompt-tokens", "uniform:8:32"],
    "generate": ["generate.sampling.max_new_tokens=4"],
}


def test_every_command_of_the_readme_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("base", "path/to/hf"):
        cases.save_model(tmp_path / folder, tiny_models.causal_lm(), tiny_models.tokenizer())
    cases.write_jsonl("train.jsonl", cases.sft_rows())
    cases.write_jsonl("prompts.jsonl", cases.prompt_rows())
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M) if "def score(" in block)
    Path("score.py").write_text(code, encoding="utf-8")
    study = study_of(tmp_path, pilot={}, seeds=[0, 1], settings=STUDY["settings"][:2], contrasts=STUDY["contrasts"][:1])
    Path("config.yaml").write_text("kl_coef: 0.05\ntotal_episodes: 1024\n", encoding="utf-8")
    Path("study.yaml").write_text(as_yaml(study), encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.S | re.M) for line in block.splitlines()]
    for line in lines:
        command, *words = shlex.split(line, comments=True)[1:] if line.startswith("icegrt ") else ["doctor"]
        if command == "doctor":  # of this machine: tests/test_doctor.py
            continue
        capsys.readouterr()
        assert cli.main([command, *words, *SMALL.get(command, [])]) == 0, (line, capsys.readouterr().err)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "ppo" / "report.html").is_file()
