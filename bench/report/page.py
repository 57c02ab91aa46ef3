"""The page of a device: icegrt beside every alternative, the share of the floor, and where icegrt loses.

The page is one file without scripts or remote parts. Its style is that of the reports of runs.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import icegrt.report.tables
from bench.report import charts, headlines, history, iterations
from bench.rows import (
    LESS_WORK,
    OURS,
    Comparison,
    Row,
    cases,
    compared,
    higher_is_better,
    is_ours,
    is_speed,
    load,
    ours_of,
    quotient_text,
    share_of_floor,
    significant,
    version_of,
    versions,
)

PAGE = "index.html"
BENCHES = Path(__file__).parents[1]
_TEMPLATES = (Path(__file__).parent, Path(icegrt.report.tables.__file__).parent / "templates")
_WORDS = {"max_over_mean": "fullest bin over mean", "memory_floor": "share of the memory floor", "kv_held": "KV held"}


def write_page(folder: Path) -> Path:
    """Write <folder>/index.html from the rows of the folder; return its path."""
    path = folder / PAGE
    path.write_text(page(folder.name, load(folder), history.load(folder.parent)), encoding="utf-8")
    return path


def page(device: str, benches: Mapping[str, Sequence[Row]], releases: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page of a device.

    Args:
        device: name of its folder.
        benches: its rows by bench, as `load` returns them.
        releases: entries of the history, oldest first; shown if at least two have the device.
    """
    all_rows = [row for rows in benches.values() for row in rows]
    comparisons = {bench: compared(rows) for bench, rows in benches.items()}
    losses = {bench: [c for c in found if c.quotient < 1] for bench, found in comparisons.items()}
    all_losses = [c for found in losses.values() for c in found]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        device=device,
        facts=facts(all_rows),
        headlines=[_headline(headline, c) for headline, c in headlines.find(benches)],
        n_comparisons=sum(map(len, comparisons.values())),
        n_lost=len(all_losses),
        n_clear=sum(c.is_clear for c in all_losses),
        losses=_losses(losses, comparisons),
        workloads=iterations.workloads(benches.get(iterations.BENCH, ())),
        benches=[_bench(name, rows, comparisons[name]) for name, rows in benches.items() if name != iterations.BENCH],
        releases=history.table(device, releases),
    )


def facts(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return what rows say about how they were measured: machine, date, commit, versions, threads, runs."""
    rows = list(rows)
    machines = {row["machine"] or f"{row['device']}, processor not recorded" for row in rows}
    recorded = [versions(row) for row in rows]
    names = dict.fromkeys(name for each in recorded for name in each if name != "threads")
    runs = sorted({row["runs"] for row in rows})
    return [
        ("machine", "; ".join(sorted(machines))),
        ("driver", _list(row["driver"] for row in rows)),
        ("date", _list(row["date"] or "not recorded" for row in rows)),
        ("commit", _list(row["commit"] or "unknown" for row in rows)),
        ("threads", _list(each.get("threads") for each in recorded)),
        ("versions", ", ".join(f"{name} {_list(each.get(name) for each in recorded)}" for name in names)),
        ("runs of a figure", str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}" if runs else ""),
    ]


def metric_words(metric: str) -> str:
    """Return a metric in words."""
    return _WORDS.get(metric, metric.replace("_", " "))


def _list(values: Iterable[str | None]) -> str:
    return ", ".join(sorted({value for value in values if value is not None}))


def _headline(headline: headlines.Headline, comparison: Comparison) -> dict[str, Any]:
    return {"label": headline.label, "case": comparison.other["case"]} | _pair(comparison)


def _pair(c: Comparison) -> dict[str, Any]:
    return {
        "ours": f"{significant(c.ours['median'])} {c.ours['unit']}",
        "ours_name": c.ours["provider"],
        "other": f"{significant(c.other['median'])} {c.other['unit']}",
        "other_name": c.other["provider"],
        "version": version_of(c.other),
        "quotient": quotient_text(c),
        "is_clear": c.is_clear,
        "is_loss": c.quotient < 1,
    }


def _losses(
    losses: Mapping[str, list[Comparison]], comparisons: Mapping[str, Sequence[Comparison]]
) -> list[dict[str, Any]]:
    """Return the lost comparisons by bench; benches and cases with the worst quotient come first."""
    groups = []
    for bench, found in losses.items():
        if found:
            ordered = sorted(found, key=lambda c: c.quotient)
            groups.append(
                {
                    "bench": bench,
                    "n_comparisons": len(comparisons[bench]),
                    "worst": significant(1 / ordered[0].quotient),
                    "runs_reference": {c.ours["provider"] for c in found} == {OURS[-1]},
                    "lines": [_loss(bench, c) for c in ordered],
                    "quotient": ordered[0].quotient,
                }
            )
    return sorted(groups, key=lambda group: group["quotient"])


def _loss(bench: str, c: Comparison) -> dict[str, Any]:
    low, high = c.interval
    return _pair(c) | {
        "case": c.other["case"],
        "metric": metric_words(c.other["metric"]),
        "times": f"{significant(1 / c.quotient)} [{significant(1 / high)}, {significant(1 / low)}]",
        "note": LESS_WORK.get((bench, c.other["provider"]), ""),
    }


def _bench(name: str, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    return {
        "name": name,
        "about": _about(name, rows[0]["bench"]),
        "facts": [(label, text) for label, text in facts(rows) if text],
        "legend": [_provider(number, provider, name, rows) for number, provider in enumerate(providers)],
        "charts": _charts(name, rows, providers),
        "alternatives": _alternatives(name, comparisons),
        "rows": [line for group in cases(rows).values() for line in _lines(group)],
        "has_floor": any(_share_of_floor(row) for row in rows),
        "floor": _floor_words(rows),
        "has_peak": any(row["peak_bytes"] is not None for row in rows),
        "has_error": any(row["error_vs_fp64"] is not None for row in rows),
    }


def _about(*names: str) -> str:
    """Return the first paragraph of the bench's docstring; empty if no bench has one of the names."""
    for name in names:
        for path in BENCHES.glob(f"**/bench_{name}.py"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return " ".join(text.split("\n\n")[0].split())
    return ""


def _provider(number: int, provider: str, bench: str, rows: Sequence[Row]) -> dict[str, Any]:
    version = _list(version_of(row) for row in rows if row["provider"] == provider)
    note = LESS_WORK.get((bench, provider))
    return {"key": charts.key(number), "name": provider, "version": f"{version}; {note}" if note else version}


def _charts(bench: str, rows: Sequence[Row], providers: Sequence[str]) -> list[tuple[Any, bool]]:
    """Return a chart per metric, and whether it has floors."""
    made = []
    by_metric: dict[str, dict[str, list[Row]]] = {}
    for (case, metric), group in cases(rows).items():
        if is_speed(metric) and group[0]["unit"] != "1" and len(group) > 1 and min(row["p20"] for row in group) > 0:
            by_metric.setdefault(metric, {})[case] = group
    for metric, groups in by_metric.items():
        lines = {
            case: [
                charts.Dot(
                    providers.index(row["provider"]),
                    row["p20"],
                    row["median"],
                    row["p80"],
                    f"{row['provider']}: {significant(row['median'])} {row['unit']} "
                    f"({iterations.spread(row)}, {row['runs']} runs)",
                )
                for row in group
            ]
            for case, group in groups.items()
        }
        floors = {case: group[0]["floor"] for case, group in groups.items() if group[0]["floor"]}
        unit = next(iter(groups.values()))[0]["unit"]
        axis = f"{metric_words(metric)}, {unit} ({'more' if higher_is_better(metric) else 'less'} is better)"
        made.append((charts.whisker_chart(f"{bench}: {metric_words(metric)}", axis, lines, floors), bool(floors)))
    return made


def _alternatives(bench: str, comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return, for each alternative and metric, the range of quotients over the cases and how many icegrt loses."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.ours["provider"], c.other["provider"], c.other["metric"]), []).append(c)
    lines = []
    for (ours, provider, metric), group in groups.items():
        quotients = sorted(c.quotient for c in group)
        lines.append(
            {
                "name": provider,
                "version": _list(version_of(c.other) for c in group),
                "ours": ours,
                "metric": metric_words(metric),
                "cases": len(group),
                "worst": significant(quotients[0]),
                "middle": significant(quotients[len(quotients) // 2]),
                "best": significant(quotients[-1]),
                "lost": sum(q < 1 for q in quotients),
                "lost_clearly": sum(c.is_clear and c.quotient < 1 for c in group),
                "note": LESS_WORK.get((bench, provider), ""),
            }
        )
    return lines


def _lines(group: Sequence[Row]) -> list[dict[str, Any]]:
    ours, lines = ours_of(group), []
    for row in group:
        quotient = ""
        if ours is not None and row is not ours and is_speed(row["metric"]) and min(row["p20"], ours["p20"]) > 0:
            quotient = quotient_text(Comparison(ours, row))
        lines.append(
            {
                "case": row["case"],
                "provider": row["provider"],
                "is_ours": row is ours or is_ours(row["provider"]),
                "metric": metric_words(row["metric"]),
                "median": f"{significant(row['median'])} {row['unit'] if row['unit'] != '1' else ''}".strip(),
                "spread": iterations.spread(row),
                "runs": row["runs"],
                "quotient": quotient,
                "floor": _share_of_floor(row),
                "peak": "" if row["peak_bytes"] is None else significant(row["peak_bytes"] / 2**20),
                "error": "" if row["error_vs_fp64"] is None else f"{row['error_vs_fp64']:.1e}",
            }
        )
    return lines


def _floor_words(rows: Sequence[Row]) -> str:
    """Return icegrt's share of the floor over the cases; empty if no row has a floor."""
    shares = []
    for (_, metric), group in cases(rows).items():
        ours = ours_of(group)
        if ours is not None and (metric == "memory_floor" or is_speed(metric)) and ours["unit"] != "1":
            shares += [share] if (share := share_of_floor(ours)) is not None else []
    if not shares:
        return ""
    middle = statistics.median(shares)
    return f"{100 * middle:.0f}% in the median case, {100 * min(shares):.0f}% to {100 * max(shares):.0f}% over all"


def _share_of_floor(row: Row) -> str:
    share = share_of_floor(row)
    return "" if share is None else f"{100 * share:.0f}%"
