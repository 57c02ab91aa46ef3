"""The page of a study, as HTML and as Markdown, its pictures, and `study.json`."""

from __future__ import annotations

import base64
import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.config import StudyConfig, StudyMeasure
from icegrt.report.tables import render_page
from icegrt.report.text import NOT_MEASURED, interval, number, signed
from icegrt.study.frozen import now, write_json
from icegrt.study.plots import write_picture
from icegrt.study.results import ContrastResult, Curve, Power, Results
from icegrt.study.verdicts import power_sentence, sentence
from icegrt.utils.files import json_safe, write_text_atomic
from icegrt.utils.text import duration

__all__ = ["value_text", "write_page"]

JSON_FILE, HTML_FILE, MARKDOWN_FILE = "study.json", "study.html", "study.md"
_LEVELS = {"as expected": "good", "equal": "good", "opposite": "bad", "not equal": "bad"}


def write_page(
    config: StudyConfig,
    frozen: Mapping[str, Any],
    results: Results,
    power: Sequence[Power],
    versions: Sequence[Mapping[str, str]],
) -> Path:
    """Write study.json, study.html, study.md with a picture for each measure, and a copy at `study.page`.

    Args:
        config: the study.
        frozen: the document of `frozen.freeze`.
        results: of the runs that have ended.
        power: of the pilot.
        versions: the different sets of versions that the runs had.

    Returns:
        The path of the HTML page.
    """
    folder = Path(config.dir)
    context = _context(config, frozen, results, power, versions)
    document = {
        "title": config.title,
        "written_at": now(),
        "frozen": dict(frozen),
        "results": dataclasses.asdict(results),
        "sentences": {item["name"]: item["sentence"] for item in context["contrasts"]},
        "power": [dataclasses.asdict(p) for p in power],
        "versions": [dict(v) for v in versions],
    }
    write_json(folder / JSON_FILE, json_safe(document, not_finite_as_null=True))
    pictures = _write_markdown(folder / MARKDOWN_FILE, "", config, results, context)
    embedded = [
        {"measure": measure, "source": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()}
        for measure, path in pictures.items()
    ]
    write_text_atomic(folder / HTML_FILE, render_page("study.html", **context, pictures=embedded))
    if config.page:
        page = Path(config.page)
        page.parent.mkdir(parents=True, exist_ok=True)
        _write_markdown(page, f"{page.stem}_", config, results, context)
    return folder / HTML_FILE


def _write_markdown(
    path: Path, prefix: str, config: StudyConfig, results: Results, context: Mapping[str, Any]
) -> dict[str, Path]:
    """Write the Markdown page with its pictures beside it; return the picture of each measure that has a value."""
    pictures = {}
    for measure in config.measures:
        if any(results.values[measure.name].values()):
            pictures[measure.name] = path.with_name(f"{prefix}{measure.name.replace(' ', '_')}.png")
            write_picture(pictures[measure.name], results, measure.name, measure.unit)
    sources = [{"measure": measure, "source": picture.name} for measure, picture in pictures.items()]
    write_text_atomic(path, render_page("study.md.jinja", **context, pictures=sources))
    return pictures


def _context(
    config: StudyConfig,
    frozen: Mapping[str, Any],
    results: Results,
    power: Sequence[Power],
    versions: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Return the texts of the page."""
    base = config.base
    recipe = shlex.join(["icegrt", base.stage, base.recipe])
    return {
        "title": config.title or f"Study {Path(config.dir).name}",
        "question": config.question,
        "level": _level(results),
        "headline": _headline(results),
        "state": _state(results),
        "contrasts": _contrast_rows(results),
        "several": _several(results),
        "power": [power_sentence(p) for p in power],
        "pilot": bool(config.pilot.setting),
        "measures": [measure.name for measure in config.measures],
        "values_of": [{"name": m.name, "text": value_text(m, results.curves.get(m.name))} for m in config.measures],
        "settings": _setting_rows(config, results),
        "failures": [dataclasses.asdict(failure) for failure in results.failures],
        "base": base.command or recipe,
        "base_overrides": base.overrides,
        "prepare": base.prepare,
        "seeds": ", ".join(map(str, config.seeds)),
        "limit": duration(config.time_limit_seconds) if config.time_limit_seconds else "none",
        "threads": config.threads,
        "frozen_at": frozen["frozen_at"],
        "sha256": frozen["sha256"],
        "files": frozen["files"],
        "amendments": frozen["amendments"],
        "versions": [", ".join(f"{name} {version}" for name, version in v.items()) for v in versions],
    }


def _level(results: Results) -> str:
    levels = [_LEVELS.get(c.outcome, "neutral") for c in results.contrasts]
    return "bad" if "bad" in levels else "good" if set(levels) == {"good"} else "neutral"


def _headline(results: Results) -> str:
    """Return how many expectations were confirmed, failed, and stayed open."""
    outcomes = Counter(c.outcome for c in results.contrasts)
    confirmed, failed = outcomes["as expected"] + outcomes["equal"], outcomes["opposite"] + outcomes["not equal"]
    parts = [
        f"{confirmed} of {len(results.contrasts)} expectations were confirmed"
        if len(results.contrasts) > 1
        else f"The expectation was {'' if confirmed else 'not '}confirmed"
    ]
    for count, text in (
        (failed, "failed"),
        (outcomes["not shown"], "without a measurable difference"),
        (outcomes["undecided"], "undecided"),
        (outcomes["not measured"], "not measured"),
    ):
        if count:
            parts.append(f"{count} {text}")
    return ", ".join(parts) + "."


def _state(results: Results) -> str:
    missing = results.runs - results.finished - len(results.failures)
    text = f"{results.finished} of {results.runs} runs finished"
    text += f", {len(results.failures)} failed" if results.failures else ""
    return text + (f", {missing} have not ended: the figures are preliminary." if missing else ".")


def _several(results: Results) -> str:
    count = sum(c.difference is not None for c in results.contrasts)
    if count < 2:
        return ""
    chance = 1 - 0.95**count
    return (
        f"There are {count} contrasts. Each interval holds for its contrast alone, it is not simultaneous: if nothing "
        f"differed, at least one of {count} independent intervals would exclude 0 with a probability of "
        f"{100 * chance:.0f}%. The last column has p-values after Holm's correction, which hold for all contrasts "
        "together."
    )


def _contrast_rows(results: Results) -> list[dict[str, str]]:
    count = sum(c.difference is not None for c in results.contrasts)
    return [_contrast_row(result, count) for result in results.contrasts]


def _contrast_row(result: ContrastResult, count: int) -> dict[str, str]:
    contrast, difference = result.contrast, result.difference
    expected = contrast.expected + (f" within {number(contrast.margin)}" if contrast.expected == "equal" else "")
    row = {
        "name": contrast.name,
        "pair": f"{contrast.a} \N{MINUS SIGN} {contrast.b}",
        "measure": result.label,
        "expected": expected,
        "seeds": str(len(result.seeds)),
        "sentence": sentence(result, count),
        "level": _LEVELS.get(result.outcome, "neutral"),
        "difference": NOT_MEASURED,
        "interval": "",
        "std": "",
        "p": "",
        "holm": "",
    }
    if difference is None:
        return row
    return row | {
        "difference": signed(difference.mean),
        "interval": interval([difference.low, difference.high]).removeprefix("95% CI "),
        "std": number(difference.std),
        "p": _p_text(difference.p_value),
        "holm": _p_text(result.holm_p),
    }


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else number(p_value)


def value_text(measure: StudyMeasure, curves: Mapping[str, Sequence[Curve]] | None) -> str:
    """Return what the measure of a run is, with the iterations it is from, and its mean where the curves begin.

    Args:
        measure: what is read.
        curves: of the runs by setting; None for a measure without rows.
    """
    field = f"{measure.field} in {measure.file}"
    if curves is None:
        return field
    text = f"mean of the last {measure.last} values of {field}" if measure.last > 1 else f"last value of {field}"
    found = [curve for lines in curves.values() for curve in lines]
    read = {", ".join(f"{x:g}" for x, _ in curve[-measure.last :]) for curve in found}
    if len(read) > 1:
        return f"{text}, whose iterations differ between runs"
    if not read:
        return text
    text = f"{text}, of iteration {read.pop()}"
    starts = {curve[0][0] for curve in found}
    if len(starts) > 1:
        return text
    mean = sum(curve[0][1] for curve in found) / len(found)
    return f"{text}; at iteration {starts.pop():g} the mean of all runs is {number(mean)}"


def _setting_rows(config: StudyConfig, results: Results) -> list[dict[str, Any]]:
    rows = []
    for setting in config.settings:
        seconds = results.seconds[setting.name]
        cells = []
        for measure in config.measures:
            values = list(results.values[measure.name][setting.name].values())
            spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
            cells.append(number(sum(values) / len(values)) + spread if values else NOT_MEASURED)
        rows.append(
            {
                "name": setting.name,
                "overrides": setting.overrides,
                "ranks": setting.ranks,
                "runs": len(seconds),
                "values": cells,
                "time": duration(sum(seconds) / len(seconds)) if seconds else "",
            }
        )
    return rows
