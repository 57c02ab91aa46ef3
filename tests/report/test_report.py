"""The report page: honest verdicts, nothing invented, nothing executed, every file well-formed."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from icegrt.config import PPOConfig, RunConfig
from icegrt.errors import RunError
from icegrt.metrics import RunLog
from icegrt.report.alarm_list import alarm_list
from icegrt.report.page import validated, write_ppo_report, write_run_report
from icegrt.report.plots import Panel, Series, panel_svg, ppo_panels, write_curves_png
from icegrt.report.text import arrow, breakdown, number, percent, signed, visible
from icegrt.report.verdict import verdict
from icegrt.utils.text import duration
from tests.helpers.step_records import evaluation, step

PPO = {
    "heldout_reward_before": 0.1,
    "heldout_reward_after": 1.2,
    "heldout_reward_gain_ci95": [1.0, 1.2],
    "task_score_before": 0.690,
    "task_score_after": 0.729,
    "task_score_gain_ci95": [0.021, 0.055],
    "greedy_task_score_before": 0.764,
    "greedy_task_score_after": 0.768,
    "greedy_task_score_gain_ci95": [-0.008, 0.016],
    "kl_nats_per_response": 5.5,
    "kl_target_nats_per_response": 6.0,
    "seconds_by_phase": {"rollout": 10.0, "update": 30.0},
    "iterations": 4,
    "test_ads": 200,
    "alarms": [],
}
FELL = {"task_score_after": 0.52, "task_score_gain_ci95": [-0.19, -0.15]}
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e{{ 7*7 }}"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.stack = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def run_folder(path, iterations=4, evaluated=True):
    with RunLog(path, tensorboard=False) as log:
        if evaluated:
            log.log(evaluation(0, function_score_mean=0.69, reward_model_score_mean=0.1))
        for i in range(1, iterations + 1):
            last = evaluation(i, function_score_mean=0.73, reward_model_score_mean=1.2, kl_nats_per_response=3.0)
            log.log(
                step(
                    i,
                    function_score_mean=0.7,
                    value_explained_variance=math.nan if i == 2 else 0.5,
                    seconds_by_phase={"rollout": 2.0, "update": 6.0},
                    evaluation=last if evaluated and i == iterations else None,
                )
            )
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("run"))
    PPOConfig(kl_coef=0.07, run=RunConfig(dir="here")).save(folder / "config.yaml")
    examples = [
        {"prompt": EVIL, "reference": EVIL, "before": EVIL, "after": "", "before_score": {EVIL: 0.5}, "kind": "fixed"},
        {"prompt": "p", "before": "a", "after": "b", "before_score": 0.25, "after_score": 0.75, "kind": "random"},
    ]
    report = {"ppo": PPO | {"alarms": [EVIL]}, "reward": {"heldout_accuracy": 0.8, "baseline_feature": EVIL}}
    path = write_ppo_report(folder, report, examples=examples, title=EVIL, notes=EVIL)
    return folder, path.read_text(encoding="utf-8")


def test_nothing_on_the_page_can_run_or_load(page):
    parsed = Page(page[1])
    assert not {"script", "img", "iframe", "object", "embed", "link", "form", "base", "a"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("href", "src", "style")]
    policy = next(v for name, v in parsed.attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy
    assert "url(" not in page[1] and "@import" not in page[1] and "{{" not in page[1].replace("{{ 7*7 }}", "")
    assert parsed.text.count("alert(1)") >= 6


def test_invisible_characters_show(page):
    assert "\x1b" not in page[1].split("<main>")[1].split("<pre>")[1]
    assert '<span class="ctl">ESC</span>[31m<span class="ctl">U+202E</span>' in page[1]


def test_page_holds_figures_examples_and_settings(page):
    text = Page(page[1]).text
    assert "PPO raised the task score." in text
    assert "0.690 \u2192 0.729" in text and "95% CI +0.021 to +0.055" in text
    assert "General held-out loss nats per token, lower is better not measured" in text
    assert "fraction of ties not measured" in text and "(an empty answer)" in text
    assert "Held-out examples, chosen in advance" in text and "Held-out examples, drawn at random" in text
    assert "ppo.kl_coef" in text and 'changed">0.07' in page[1]
    assert re.search(r"update 30.0 s 75.0% 7.5 s", text)


def test_files_are_whole_and_valid(page):
    folder, text = page
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "report.html",
        "report.json",
    ]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["ppo"]["task_score_gain_ci95"] == [0.021, 0.055]
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_an_empty_report_says_not_measured(tmp_path):
    text = Page(write_ppo_report(tmp_path, {}, examples=[], title="t").read_text()).text
    assert "The task score was not measured." in text and "No metrics were recorded." in text
    assert text.count("not measured") >= 9 and not re.search(r"\bnan\b|None", text)
    assert json.loads((tmp_path / "report.json").read_text()) == {}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "good", "PPO raised the task score."),
        (FELL, "bad", "PPO gamed the reward model: the reward-model score rose while the task score fell."),
        ({"task_score_gain_ci95": [-0.01, 0.05]}, "neutral", "no measurable difference"),
        (
            {"task_score_gain_ci95": [-0.01, 0.05], "greedy_task_score_gain_ci95": [-0.1, -0.02]},
            "bad",
            "the reward-model score rose while the task score of greedy answers fell",
        ),
        (FELL | {"heldout_reward_gain_ci95": [-0.3, -0.1]}, "bad", "PPO lowered the task score."),
        (FELL | {"task_score_gain_ci95": None}, "bad", "may be gaming"),
        ({"task_score_gain_ci95": None}, "neutral", "without an interval"),
        ({"task_score_before": None, "task_score_gain_ci95": None}, "neutral", "no measurable difference"),
        (dict.fromkeys([k for k in PPO if "task_score" in k]), "neutral", "The task score was not measured."),
        ({"kl_nats_per_response": 12.5}, "warn", "PPO raised the task score."),
    ],
)
def test_verdicts(changes, level, words):
    result = verdict({"ppo": PPO | changes})
    assert result.level == level and words in result.headline


def test_warnings_of_the_verdict():
    weak = {"heldout_accuracy": 0.6, "baseline_accuracy": 0.61, "baseline_feature": "length (higher)"}
    changes = {"distinct_fraction_before": 0.9, "distinct_fraction_after": 0.1, "truncated_fraction_after": 0.3}
    warnings = verdict({"ppo": PPO | changes, "reward": weak}).warnings
    assert len(warnings) == 3
    assert "no better than one feature alone, length (higher) (61.0%)" in warnings[2]
    flat = verdict({"ppo": PPO | {"task_score_gain_ci95": [-0.01, 0.05]}}).warnings
    assert "without a measurable gain" in flat[0]


@pytest.mark.parametrize(
    ("report", "name"),
    [
        ({"ppo": {"task_score_gain_ci95": 0.1}}, "task_score_gain_ci95"),
        ({"ppo": {"task_score_gain_ci95": [0.2, 0.1]}}, "above"),
        ({"ppo": {"alarms": "one"}}, "alarms"),
        ({"ppo": {"seconds_by_phase": {"rollout": "long"}}}, "seconds_by_phase"),
        ({"ppo": {"task_score_after": "0.7"}}, "task_score_after"),
        ({"reward": {"heldout_accuracy": "high"}}, "heldout_accuracy"),
        ({"sft": 3}, "report.sft"),
    ],
)
def test_a_malformed_report_is_refused(report, name):
    with pytest.raises(ValueError, match=name):
        validated(report)


def test_what_is_not_finite_becomes_null():
    checked = validated({"ppo": {"task_score_after": math.nan, "task_score_gain_ci95": [math.nan, 1.0]}, "x": math.inf})
    assert checked == {"ppo": {"task_score_after": None, "task_score_gain_ci95": None}, "x": None}


def test_an_example_of_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"examples\[0\]\.kind"):
        write_ppo_report(tmp_path, {}, examples=[{"prompt": "p", "kind": "best"}], title="t")


def test_a_plain_run_gets_a_page_from_its_metrics(tmp_path):
    config = PPOConfig(run=RunConfig(dir=str(tmp_path)))
    page = Page(write_run_report(run_folder(tmp_path), config=config).read_text())
    assert "The task score rose; without an interval" in page.text and "0.690 \u2192 0.730" in page.text
    figures = json.loads((tmp_path / "report.json").read_text())["ppo"]
    assert figures["seconds_by_phase"] == {"rollout": 8.0, "update": 24.0}
    assert figures["response_tokens_per_second"] == pytest.approx(900.0)
    assert "task_score_gain_ci95" not in figures and figures["iterations"] == 4
    assert figures["alarms"] == [] and figures["kl_nats_per_response"] == 3.0


def test_an_alarm_that_is_raised_again_is_listed_once():
    alarms = [
        "iteration 1: 41% of the answers are truncated (threshold 20%).",
        *(f"iteration {n}: Entropy collapsed: {0.2 - n / 1000:.3f} nats per token." for n in range(10, 90, 10)),
        "Iteration 95. 30% of the answers are truncated (threshold 20%).",
        "no iteration",
    ]
    assert alarm_list(alarms) == [
        (alarms[0], "again in iteration 95 (1 more)"),
        (alarms[1], "again in iterations 20, 30, 40, 50, 60, ..., 80 (7 more)"),
        ("no iteration", ""),
    ]
    assert alarm_list([]) == [] and alarm_list(["a 1", "a 2", "a 3"]) == [("a 1", "2 more times")]


MEMORY = {"planned": {"rollout": 2e9, "update": 4e9}, "measured": {"rollout": 1e9, "update": 3.9e9}, "measure": "RSS"}


def test_planned_memory_is_beside_the_measured_one(tmp_path):
    folder = run_folder(tmp_path)
    assert "Peak memory" not in Page(write_run_report(folder).read_text()).text
    (folder / "memory.json").write_text(json.dumps(MEMORY))
    text = Page(write_run_report(folder).read_text()).text
    assert "Peak memory, planned and measured" in text and "Measured: RSS." in text
    assert text.split("measured / planned")[1].split()[:8] == [
        "rollout",
        "2.000",
        "1.000",
        "50.0%",
        "update",
        "4.000",
        "3.900",
        "97.5%",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"planned": {}}', '{"planned": 1, "measured": 2, "measure": ""}'])
def test_a_damaged_memory_file_leaves_the_page_without_its_table(tmp_path, text):
    folder = run_folder(tmp_path)
    (folder / "memory.json").write_text(text)
    assert "Peak memory" not in Page(write_run_report(folder).read_text()).text


def test_a_run_without_evaluation_invents_nothing(tmp_path):
    write_run_report(run_folder(tmp_path, iterations=1, evaluated=False))
    figures = json.loads((tmp_path / "report.json").read_text())["ppo"]
    assert figures["task_score_before"] is None and figures["task_score_after"] is None and figures["alarms"] is None
    with pytest.raises(RunError, match="no PPO iteration"):
        write_run_report(tmp_path / "nothing")


def test_charts_of_odd_data(tmp_path):
    odd = [
        Panel("one point", "u", (Series("s", [3], [0.0]),)),
        Panel("all the same", "u", (Series("s", [1, 2], [5.0, 5.0]),), ("target", 5.0)),
        Panel("gap", "u", (Series("s", [1, 2, 3, 4], [1e9, math.nan, -1e9, math.inf]),)),
        Panel("tiny <&>", "u", (Series("$x$ <&>", [1, 2], [1e-7, 2e-7], markers=True),), percent=True),
    ]
    for panel in odd:
        drawing = ElementTree.fromstring(panel_svg(panel))
        for element in drawing.iter():
            assert "nan" not in "".join(element.attrib.values())
    write_curves_png(tmp_path / "curves.png", odd, "50% $ _x_")
    assert ppo_panels([]) == []


def test_long_runs_are_drawn_with_few_points():
    rows = [{"kind": "ppo", "iteration": i, "score_mean": float(i)} for i in range(1, 5001)]
    (panel,) = ppo_panels(rows)
    assert len(panel.series[0].x) <= 600 and "means of 9" in panel.series[0].label


def test_numbers_as_text():
    assert [number(v) for v in (None, 0.0, 0.12345, 12.376, 123.46, 12345.6, -1.5, 2e-6)] == [
        "not measured",
        "0.000",
        "0.123",
        "12.38",
        "123.5",
        "12,346",
        "\u22121.500",
        "2.0e\u221206",
    ]
    assert [signed(0.5), signed(-0.5)] == ["+0.500", "\u22120.500"]
    assert [percent(0.1234), percent(None)] == ["12.3%", "not measured"]
    assert arrow(None, 1.0) == "\u2013 \u2192 1.000" and arrow(None, None) == "not measured"
    assert [duration(s) for s in (0.0042, 5.0, 119.8, 7260)] == ["4.2 ms", "5.0 s", "2 min 00 s", "2 h 01 min"]


def test_text_is_visible_and_bounded():
    assert str(visible("a\tb\nc<\x00\ud800\u200d")) == (
        'a<span class="ctl">TAB</span>b\nc&lt;<span class="ctl">NUL</span><span class="ctl">U+D800</span>\u200d'
    )
    assert "5 more characters" in visible("x" * 20_005)


def test_breakdown_of_scores():
    before, after = {"total": 1.0, "parts": {"verdict": True}}, {"total": math.nan, "extra": "ok<"}
    assert breakdown(before, after) == [
        ("total", "1.000", "nan"),
        ("parts.verdict", "yes", "not measured"),
        ("extra", "not measured", "ok&lt;"),
    ]
    assert breakdown(0.5, None) == [("score", "0.500", "not measured")]
