"""The report of a run: `report.json`, `curves.png` and `report.html`.

The page is one file without scripts or remote parts (its Content-Security-Policy forbids both), for light and dark
screens. It begins with the verdict, which compares the reward-model score with the task score: a rise of the
reward-model score alone proves nothing. Without a reward model the total score takes its place. A missing figure is
printed as "not measured". All model text is escaped, and invisible characters are printed as marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.config import CONFIG_FILE, Loadable, PPOConfig
from icegrt.errors import ConfigError, RunError
from icegrt.metrics import PPOStep, read_metrics, step_from_row
from icegrt.metrics.alarms import Alarms
from icegrt.report.alarm_list import alarm_list
from icegrt.report.calibration import calibration_charts
from icegrt.report.memory_table import memory_table
from icegrt.report.plots import Panel, ppo_panels, write_curves_png
from icegrt.report.profile import profile_files
from icegrt.report.tables import (
    cards,
    charts,
    example_texts,
    margins,
    outcomes,
    phases,
    render_page,
    settings_tables,
    training,
)
from icegrt.report.training_page import TITLES, write_training_report
from icegrt.report.verdict import verdict
from icegrt.utils.files import json_safe, write_text_atomic
from icegrt.utils.values import is_number

__all__ = ["validated", "write_ppo_report", "write_run_report"]

_NUMBER_KEY = re.compile(r"_(before|after|accuracy|pairs|fraction|response|second)$|^iterations$|^test_(ads|prompts)$")


def write_ppo_report(
    run_dir: str | Path,
    report: Mapping[str, Any],
    *,
    examples: Sequence[Mapping[str, Any]],
    title: str,
    notes: str | Sequence[str] = (),
    settings: Sequence[Loadable] | None = None,
    panels: Sequence[Panel] = (),
) -> Path:
    """Write report.json, curves.png and report.html into `run_dir`. The curves come from the run's `metrics.jsonl`.

    Args:
        run_dir: the run's folder.
        report: sections `sft`, `reward` and `ppo` of figures, each a finite number or None (see `validated`). An absent
            figure is printed as not measured. `reward.heldout_pairs` is the number of untied pairs of the accuracy,
            `reward.heldout_tie_fraction` the fraction of ties among all pairs.
        examples: `prompt`, `before`, `after` and `kind` ("fixed" or "random"); optionally `reference`, `before_score`
            and `after_score` (a number, or a mapping of parts).
        title: the page's title.
        notes: paragraphs under the verdict.
        settings: the configurations to list; None: those of the run's `config.yaml`.
        panels: charts of the caller, before those of the run.

    Returns:
        The path of the page.

    Raises:
        ValueError: a figure or an example has another form.
    """
    run_dir = Path(run_dir)
    checked = validated(report)
    rows = read_metrics(run_dir)
    ppo = checked.get("ppo") or {}
    panels = [*panels, *ppo_panels(rows, ppo.get("kl_target_nats_per_response"))]
    run_dir.mkdir(parents=True, exist_ok=True)
    if panels:
        write_curves_png(run_dir / "curves.png", panels, title)
    write_text_atomic(
        run_dir / "report.json", json.dumps(checked, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    )
    page = render_page(
        "report.html",
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes),
        verdict=verdict(checked),
        cards=cards(checked),
        outcomes=outcomes(checked),
        margins=margins(checked.get("reward") or {}),
        alarms=None if ppo.get("alarms") is None else alarm_list(ppo["alarms"]),
        charts=charts(panels),
        training=training(rows),
        phases=phases(ppo),
        memory=memory_table(run_dir),
        calibration=calibration_charts(run_dir),
        examples=[example_texts(number, example) for number, example in enumerate(examples, 1)],
        profiles=profile_files(run_dir),
        settings=settings_tables(run_dir / CONFIG_FILE, settings),
    )
    write_text_atomic(run_dir / "report.html", page)
    return run_dir / "report.html"


def write_run_report(run_dir: str | Path, *, config: PPOConfig | None = None, title: str = "") -> Path:
    """Write the report of a run from its metrics and its `config.yaml` alone; return the path of the page.

    The run may be one of PPO, SFT or reward training, finished or not. The figures of PPO before and after come from
    the first and the last evaluation on held-out prompts. They have no intervals, because metrics are means.

    Raises:
        RunError: the run has no PPO iteration and no training step yet.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    steps = [step_from_row(row) for row in rows if row["kind"] == "ppo"]
    if not steps:
        for kind in TITLES:
            kind_rows = [row for row in rows if row["kind"] == kind]
            if kind_rows:
                return write_training_report(run_dir, kind, kind_rows, title)
        raise RunError(
            f"{run_dir}/metrics.jsonl has no PPO iteration and no training step: a report needs a run of at least one."
        )
    if config is None:
        config = _saved_config(run_dir)
    evaluations = [step_from_row(row) for row in rows if row["kind"] == "evaluation"]
    evaluations += [step.evaluation for step in steps if step.evaluation is not None]
    evaluations.sort(key=lambda evaluation: evaluation.iteration)
    report = {"ppo": _figures(steps, evaluations, config)}
    return write_ppo_report(
        run_dir, report, examples=[], title=title or f"PPO run {run_dir.name}", settings=config and [config]
    )


def validated(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return `report` as plain JSON types, with numbers that are finite or None.

    Intervals (`*_ci95`) are [low, high] or None; `alarms` is a list of text; `seconds_by_phase` maps phases to numbers.

    Raises:
        ValueError: a figure has another form; the message names its key.
    """
    checked = json_safe(report, not_finite_as_null=True)
    for section in ("sft", "reward", "ppo"):
        values = checked.get(section)
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"report.{section} must be a mapping of figures, not {values!r}")
        for key, value in (values or {}).items():
            name = f"report.{section}.{key}"
            if key.endswith("_ci95"):
                if value is not None and (not isinstance(value, list) or len(value) != 2):
                    raise ValueError(f"{name} must be [low, high] or None, not {value!r}")
                if value is not None and None in value:
                    values[key] = None
                elif value is not None and value[0] > value[1]:
                    raise ValueError(f"{name} must be [low, high], but {value[0]} is above {value[1]}")
            elif key == "alarms":
                if value is not None and (not isinstance(value, list) or not all(isinstance(v, str) for v in value)):
                    raise ValueError(f"{name} must be a list of text, not {value!r}")
            elif key == "seconds_by_phase":
                if value is not None and not (
                    isinstance(value, dict) and all(v is None or is_number(v) for v in value.values())
                ):
                    raise ValueError(f"{name} must map phases to seconds, not {value!r}")
            elif _NUMBER_KEY.search(key) and value is not None and not is_number(value):
                raise ValueError(f"{name} must be a number or None, not {value!r}")
    return checked


def _figures(steps: list[PPOStep], evaluations: list[Any], config: PPOConfig | None) -> dict[str, Any]:
    # 1. figures before and after, from the first and the last evaluation
    first, last = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else (None, None)
    has_reward_model = first is not None and first.reward_model_score_mean is not None
    fields = {
        "heldout_reward": "reward_model_score_mean" if has_reward_model else "score_mean",
        "task_score": "function_score_mean",
        "greedy_task_score": "greedy_function_score_mean",
        "distinct_fraction": "distinct_fraction",
        "response_tokens_mean": "response_tokens_mean",
        "truncated_fraction": "truncated_fraction",
    }
    figures: dict[str, Any] = {"heldout_reward_name": "reward-model score" if has_reward_model else "total score"}
    for name, field in fields.items():
        figures[f"{name}_before"] = getattr(first, field, None)
        figures[f"{name}_after"] = getattr(last, field, None)
    # 2. speed and time
    timed = [step for step in steps if step.response_tokens_per_second]
    seconds = [step.response_tokens / step.response_tokens_per_second for step in timed]
    tokens = sum(step.response_tokens for step in timed)
    phases = {name: sum(s.seconds_by_phase.get(name, 0.0) for s in steps) for s in steps for name in s.seconds_by_phase}
    # 3. the alarms, raised again
    alarms = Alarms(config or PPOConfig())
    for evaluation in evaluations:
        if evaluation.iteration == 0:
            alarms.observe(evaluation)
    return figures | {
        "kl_nats_per_response": getattr(last, "kl_nats_per_response", steps[-1].kl_nats_per_response),
        "kl_target_nats_per_response": config.kl_target_nats_per_response if config else None,
        "iterations": len(steps),
        "response_tokens_per_second": tokens / sum(seconds) if sum(seconds) > 0 else None,
        "seconds_by_phase": phases,
        "test_prompts": getattr(last, "prompts", None),
        "alarms": [f"Iteration {s.iteration}. {message}" for s in steps for message in alarms.check(s)]
        if config
        else None,
    }


def _saved_config(run_dir: Path) -> PPOConfig | None:
    path = run_dir / CONFIG_FILE
    try:
        return PPOConfig.load(path) if path.exists() else None
    except ConfigError:
        return None
