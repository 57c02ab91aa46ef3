"""The tables of a report page, as plain values for the template: numbers are text, model text is HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from icegrt.config import SECTIONS, Loadable
from icegrt.config.introspect import config_keys, value_text
from icegrt.config.loader import as_yaml
from icegrt.config.strict_yaml import parse
from icegrt.metrics import PHASE_LABELS, PHASES
from icegrt.metrics.alarms import KL_TARGET_MULTIPLE
from icegrt.report.plots import legend, panel_svg, stacked_bar_svg
from icegrt.report.text import arrow, breakdown, interval, number, percent, signed, visible
from icegrt.report.verdict import Change, change_of, score_name
from icegrt.utils.files import json_safe
from icegrt.utils.text import duration
from icegrt.utils.values import flatten

__all__ = [
    "cards",
    "charts",
    "example_texts",
    "margins",
    "outcomes",
    "phases",
    "render_page",
    "settings_tables",
    "training",
]

_TEMPLATES = Path(__file__).parent / "templates"
_TEXTS = ("prompt", "reference", "before", "after")


def cards(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return the cards at the top of the page. tone: up or down (a significant change), good, bad or flat."""
    ppo = report.get("ppo") or {}
    prompts = ppo.get("test_ads") or ppo.get("test_prompts")
    prompts_text = f"{number(prompts, 0)} held-out prompts" if prompts else "held-out prompts"
    task, greedy = change_of(ppo, "task_score"), change_of(ppo, "greedy_task_score")
    return [
        _change_card("Task score", f"sampled answers, {prompts_text}", task, toned=True),
        _change_card(
            score_name(ppo).capitalize(), f"sampled answers, {prompts_text}", change_of(ppo, "heldout_reward")
        ),
        _change_card("Task score, greedy", f"greedy answers, {prompts_text}", greedy, toned=True),
        _kl_card(ppo.get("kl_nats_per_response"), ppo.get("kl_target_nats_per_response")),
        _change_card("General held-out loss", "nats per token, lower is better", change_of(ppo, "general_loss")),
        _reward_model_card(report.get("reward") or {}),
    ]


def _change_card(label: str, detail: str, change: Change, toned: bool = False) -> dict[str, str]:
    below = ", ".join(
        part for part in (signed(change.gain) if change.gain is not None else "", interval(change.ci95)) if part
    )
    if toned and change.gain is not None and not change.has_interval:
        below += " (no interval)"
    tone = {1: "up", -1: "down"}.get(change.direction, "flat") if toned and change.has_interval else "flat"
    return _card(label, detail, arrow(change.before, change.after), below, tone)


def _kl_card(kl: float | None, target: float | None) -> dict[str, str]:
    label, detail = "KL from the reference", "nats per response"
    if target is None:
        return _card(label, detail, number(kl, 2), "target not known", "flat")
    limit = KL_TARGET_MULTIPLE * target
    tone = "flat" if kl is None else "bad" if kl > limit else "good" if kl <= target else "flat"
    return _card(label, detail, number(kl, 2), f"target {target:g}, alarm above {limit:g}", tone)


def _reward_model_card(reward: dict[str, Any]) -> dict[str, str]:
    accuracy, baseline = reward.get("heldout_accuracy"), reward.get("baseline_accuracy")
    pairs, ties = reward.get("heldout_pairs"), reward.get("heldout_tie_fraction")
    facts = [
        f"{number(pairs, 0)} pairs" if pairs is not None else "number of pairs not measured",
        f"{percent(ties)} of all pairs are ties, not counted" if ties is not None else "fraction of ties not measured",
        f"best single feature, {reward.get('baseline_feature') or 'unnamed'}: {percent(baseline)}"
        if baseline is not None
        else "single-feature baseline not measured",
    ]
    tone = "flat" if accuracy is None or baseline is None else "good" if accuracy > baseline else "bad"
    below = "; ".join(facts) if reward else ""
    return _card("Reward model", "pairwise accuracy on held-out data", percent(accuracy), below, tone)


def _card(label: str, detail: str, value: str, below: str, tone: str) -> dict[str, str]:
    return {"label": label, "detail": detail, "value": value, "below": below, "tone": tone}


def outcomes(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return figures of the answers and of the run, as (label, value)."""
    ppo, sft = report.get("ppo") or {}, report.get("sft")
    speed = ppo.get("response_tokens_per_second")
    rows = [
        ("Response length, tokens", arrow(*_pair(ppo, "response_tokens_mean"), lambda v: number(v, 2))),
        ("Truncated answers", arrow(*_pair(ppo, "truncated_fraction"), percent)),
        ("Distinct answers", arrow(*_pair(ppo, "distinct_fraction"), percent)),
        ("PPO iterations", number(ppo.get("iterations"), 0)),
        ("Speed", number(speed, 0) + (" response tokens per second" if speed is not None else "")),
    ]
    if sft:
        rows.append(("SFT held-out loss, nats per token", arrow(*_pair(sft, "heldout_loss"))))
    return rows


def _pair(ppo: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    return ppo.get(f"{name}_before"), ppo.get(f"{name}_after")


def margins(reward: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the reward model's accuracy by true margin, as (margin, pairs, accuracy)."""
    rows = []
    for row in reward.get("heldout_accuracy_by_margin") or []:
        low, high = row.get("margin_low"), row.get("margin_high")
        margin = f"below {high:g}" if low is None else f"{low:g} and more" if high is None else f"{low:g} to {high:g}"
        rows.append((margin, number(row.get("pairs"), 0), percent(row.get("accuracy"))))
    return rows


def charts(panels: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the drawing and the legend of each panel."""
    return [
        {"title": panel.title, "unit": panel.unit, "svg": panel_svg(panel), "legend": legend(panel)} for panel in panels
    ]


_OPTIONAL = (
    "correction_fraction",
    "correction_ratio_mean",
    "positive_nll",
    "overlong_penalty_mean",
    "rollout_logprob_gap_mean",
)


def training(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the metrics of the first and the last iteration, on their training prompts, as (label, first, last)."""
    steps = [row for row in rows if row["kind"] == "ppo"]
    if not steps:
        return []
    metrics = {
        "score that training pays": ("score_mean", number),
        "reward-model score": ("reward_model_score_mean", number),
        "task score": ("function_score_mean", number),
        "KL, nats per response": ("kl_nats_per_response", number),
        "KL coefficient": ("kl_coef", number),
        "entropy, nats per token": ("entropy_nats_per_token", number),
        "clip fraction": ("clip_fraction", percent),
        "tokens capped or masked": ("correction_fraction", percent),
        "ratio to the rollout, mean": ("correction_ratio_mean", number),
        "positive-example loss, nats per token": ("positive_nll", number),
        "overlong penalty": ("overlong_penalty_mean", number),
        "value explained variance": ("value_explained_variance", number),
        "response length, tokens": ("response_tokens_mean", number),
        "truncated answers": ("truncated_fraction", percent),
        "rollout and scoring log-prob gap, nats per token": ("rollout_logprob_gap_mean", number),
        "largest such gap, nats": ("rollout_logprob_gap_max", number),
    }
    first_last = [json_safe(step, not_finite_as_null=True) for step in (steps[0], steps[-1])]
    # Metrics that the run does not have are left out.
    return [
        (label, *(show(step.get(key)) for step in first_last))
        for label, (key, show) in metrics.items()
        if key not in _OPTIONAL or any(step.get(key) is not None for step in first_last)
    ]


def phases(ppo: dict[str, Any]) -> dict[str, Any] | None:
    """Return the time per phase: a bar and rows of (phase, time, fraction, time per iteration). None without times."""
    seconds = {name: value for name, value in (ppo.get("seconds_by_phase") or {}).items() if value is not None}
    total = sum(seconds.values())
    if total <= 0:
        return None
    order = [name for name in PHASES if name in seconds] + sorted(set(seconds) - set(PHASES))
    iterations = ppo.get("iterations")
    rows = []
    for name in order:
        per_iteration = duration(seconds[name] / iterations) if iterations else ""
        fraction = percent(seconds[name] / total)
        rows.append((PHASE_LABELS.get(name, name), duration(seconds[name]), fraction, per_iteration))
    bar = stacked_bar_svg([(PHASE_LABELS.get(name, name), seconds[name]) for name in order])
    return {"bar": bar, "rows": rows, "total": duration(total)}


def example_texts(index: int, example: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example with its texts as visible HTML and its scores side by side."""
    kind = example.get("kind", "fixed")
    if kind not in ("fixed", "random"):
        raise ValueError(f"examples[{index - 1}].kind must be fixed or random, not {kind!r}")
    before, after = example.get("before_score"), example.get("after_score")
    return {
        "number": index,
        "kind": kind,
        "scores": breakdown(before, after) if before is not None or after is not None else [],
        **{name: visible(example[name]) if example.get(name) is not None else None for name in _TEXTS},
    }


def settings_tables(path: Path, settings: Sequence[Loadable] | None) -> list[dict[str, Any]]:
    """Return every key of the configurations, or of the saved file at `path`, and if it differs from the default."""
    if settings is not None:
        sections = {config.section: parse(as_yaml(config), config.section)[config.section] for config in settings}
    elif path.exists():
        sections = parse(path.read_text(encoding="utf-8"), str(path)) or {}
    else:
        return []
    tables = []
    for section, values in sections.items():
        keys = {key.name: key for key in config_keys(SECTIONS[section])} if section in SECTIONS else {}
        rows = []
        for name, value in flatten(values, section):
            key, text = keys.get(name), value_text(value)
            unit, meaning = (key.unit, key.help) if key else ("", "")
            changed = key is not None and text != key.default
            rows.append({"name": name, "value": text, "changed": changed, "unit": unit, "help": meaning})
        tables.append({"section": section, "rows": rows})
    return tables


def render_page(template: str, **context: Any) -> str:
    """Return a page of `templates/`; text is escaped, and a missing name raises."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
