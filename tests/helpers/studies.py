"""A study over a script that writes metrics from its seed alone, in milliseconds."""

import copy
from pathlib import Path

from icegrt.config import StudyConfig

# Value of evaluation i: gain x i / 4, plus noise of the seed, which two settings share only in part.
SCRIPT = """
import json, os, random, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
noise = random.Random(f"{words['seed']} {words.get('noise', '')}")
with open(os.path.join(words["log"], "starts.txt"), "a") as log:
    log.write(f"{words.get('name', 'plain')} {words['seed']}\\n")
rows = [
    {"kind": "ppo", "iteration": i, "evaluation": {"score": float(words.get("gain", 1)) * i / 4 + noise.gauss(0, 0.05)}}
    for i in range(5)
]
with open(os.path.join(words["out"], "metrics.jsonl"), "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
if "wait_for" in words:
    print("waiting", flush=True)
    while not os.path.exists(words["wait_for"]):
        time.sleep(0.02)
if words.get("fails") == words["seed"]:
    sys.exit("no more memory")
"""

STUDY = {
    "title": "Gain",
    "seeds": [0, 1, 2, 3],
    "settings": [
        {"name": "plain"},
        {"name": "more", "overrides": ["gain=2", "noise=b", "name=more"]},
        {"name": "same", "overrides": ["noise=f", "name=same"]},
    ],
    "measures": [{"name": "score", "field": "evaluation.score", "last": 2, "unit": "points"}],
    "contrasts": [
        {"name": "gain", "a": "more", "b": "plain", "expected": "higher"},
        {"name": "wrong", "a": "more", "b": "plain", "expected": "lower"},
        {"name": "none", "a": "same", "b": "plain", "expected": "higher"},
        {"name": "alike", "a": "same", "b": "plain", "expected": "equal", "margin": 0.5},
    ],
    "pilot": {"setting": "plain", "seeds": [100, 101, 102]},
    "parallel": 2,
}


def study_of(folder: Path, **changes) -> StudyConfig:
    """Return the study in `folder`, whose runs note their starts in `folder/starts.txt`; `changes` replace keys."""
    script = folder / "script.py"
    if not script.exists():
        script.write_text(SCRIPT, encoding="utf-8")
    command = f"python -S {script} out={{out}} seed={{seed}} log={folder}"
    document = copy.deepcopy(STUDY) | {"dir": str(folder / "study"), "base": {"command": command}} | changes
    return StudyConfig(**document)


def starts(folder: Path) -> list[str]:
    """Return `setting seed` of every run that has started, in order."""
    path = folder / "starts.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
