"""The page, the README's section and the history come from rows alone and say where icegrt loses."""

import argparse
import json
import re
import sys

import pytest
import torch

from bench import harness
from bench.report import charts, headlines, history, iterations, readme
from bench.report.__main__ import main
from bench.report.page import page
from bench.rows import KEYS, Comparison, compared, load, significant, version_of
from tests.helpers.bench_rows import row, write


def text_of(html):
    """What a reader sees, with single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<style>.*?</style>", "", html)).split())


def gae(ours=10.0, other=20.0):
    return [row("ours", ours, case="1M ragged"), row("loop over time", other, case="1M ragged")]


# -- what is compared ------------------------------------------------------------------------------------------------


def test_a_quotient_is_how_many_times_as_fast_icegrt_is_and_its_interval_is_the_widest():
    slower = row("eager", 20.0, p20=18.0, p80=24.0)
    comparison = Comparison(row("ours", 10.0, p20=9.0, p80=12.0), slower)
    assert comparison.quotient == 2.0 and comparison.interval == (1.5, 24 / 9) and comparison.is_clear
    rates = {"metric": "throughput", "unit": "tokens/s"}
    comparison = Comparison(row("icegrt", 300.0, p20=200.0, p80=310.0, **rates), row("x", 150.0, spread=0, **rates))
    assert comparison.quotient == 2.0 and comparison.interval == (200 / 150, 310 / 150)
    assert not Comparison(row("ours", 10.0, spread=0.2), row("eager", 11.0, spread=0.2)).is_clear


@pytest.mark.parametrize(
    ("providers", "ours", "alternatives"),
    [
        (["eager", "reference"], "reference", ["eager"]),  # the operation has no kernel here
        (["reference", "chunked", "triton", "triton, in place"], "triton", ["reference"]),
        (["chunked", "chunked, half masked", "three products"], "chunked", ["three products"]),
        (["icegrt tight cap", "icegrt", "heap"], "icegrt", ["heap"]),
        (["TRL, 8 rows", "reference, 8 rows", "icegrt, x", "icegrt"], "icegrt", ["TRL, 8 rows", "reference, 8 rows"]),
        (["torch"], None, []),
    ],
)  # fmt: skip
def test_modes_and_backends_of_icegrt_are_no_alternatives(providers, ours, alternatives):
    found = compared([row(name, 1.0) for name in providers])
    assert [c.other["provider"] for c in found] == alternatives
    assert all(c.ours["provider"] == ours for c in found)


def test_only_speed_is_compared():
    rows = [row(name, 1.0, metric=m) for m in ("rows", "processor time", "time of update") for name in ("icegrt", "x")]
    assert [c.key for c in compared(rows)] == [("A8", "time of update", "x")]


def test_versions_are_those_of_the_row_or_said_to_be_missing():
    assert version_of(row("transformers, batch 8", 1.0)) == "transformers 5.1.0"
    assert version_of(row("eager", 1.0)) == "torch 2.13.0"
    assert version_of(row("TRL, 8 rows", 1.0)) == "version not recorded"
    assert version_of(row("chunked, half masked", 1.0)) == "icegrt abc1234"


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,230"), (99.96, "100"), (0.02718, "0.0272"), (0, "0"), (-4.0, "-4.00")]
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_every_loss_with_its_quotient_and_interval():
    rivals = [row("blocked matmul", 4.0, case="1M ragged"), row("near", 9.9, case="1M ragged", spread=0.1)]
    html = page("cpu", {"shaped_gae": [*gae(10.0, 20.0), *rivals]})
    text = text_of(html)
    assert "In 2 of 3 comparisons the alternative has the better median, in 1 of them clearly." in text
    losses = text_of(html.split('id="losses"')[1].split("</section>")[0])
    assert "blocked matmul torch 2.13.0 10.0 ms 4.00 ms 2.50 [2.40, 2.60] yes" in losses
    assert "near torch 2.13.0 10.0 ms 9.90 ms 1.01 [0.900, 1.14] no" in losses and "loop over time" not in losses
    assert losses.index("blocked matmul") < losses.index("near")


def test_a_page_without_losses_and_iterations_says_so():
    text = text_of(page("cpu", {"shaped_gae": gae()}))
    assert "Nowhere: in none of 1 comparisons" in text and "No rows yet: make bench-ppo measures them." in text


def test_the_page_shows_machine_date_commit_runs_units_and_share_of_the_floor():
    rows = [r | {"floor": 4.0} for r in gae()]
    html = page("cpu", {"shaped_gae": rows})
    text = text_of(html)
    for fact in ("A Processor, 2 cores", "2026-01-31", "abc1234", "torch 2.13.0", "runs of a figure 9", "threads 2"):
        assert fact in text, fact
    assert "icegrt's share of the floor: 40% in the median case" in text
    assert ">time, ms (less is better)" in html and "9.80 .. 10.2" in text
    assert "<title>loop over time: 20.0 ms (19.6 .. 20.4, 9 runs)</title>" in html
    assert "GAE over ragged responses 1M ragged 10.0 ms 20.0 ms loop over time torch 2.13.0 2.00 [1.92, 2.08]" in text


def test_what_leaves_out_work_is_marked():
    rows = [row("ours", 2.0), row("halves", 1.0)]
    assert "rounds its logits to bf16" in text_of(page("cpu", {"lm_logits": rows})).split("Whole PPO iterations")[0]


def test_the_page_is_one_file_without_scripts_and_escapes_names():
    html = page("cpu", {"shaped_gae": [*gae(), row("<script>alert(1)</script>", 3.0)]})
    assert "<script" not in html and "http" not in re.sub(r'http-equiv="[^"]*"', "", html) and "src=" not in html
    assert "&lt;script&gt;" in html


def test_rows_of_older_runs_say_that_machine_and_date_are_not_recorded(tmp_path):
    old = [{key: value for key, value in r.items() if key not in ("machine", "date")} for r in gae()]
    text = text_of(page("cpu", load(write(tmp_path / "cpu", shaped_gae=old))))
    assert "x86_64, processor not recorded" in text and "date not recorded" in text


def test_a_file_that_holds_no_rows_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"x\.json is no list of bench rows"):
        load(write(tmp_path / "cpu", x={"a": 1}))


@pytest.mark.parametrize(("values", "logarithmic"), [((10.0, 20.0), False), ((1.0, 20.0), True)])
def test_dots_lie_between_their_whiskers_in_the_order_of_their_medians(values, logarithmic):
    dots = [charts.Dot(n, 0.9 * v, v, 1.2 * v, f"dot {n}") for n, v in enumerate(values)]
    svg = charts.whisker_chart("a chart", "time, ms", {"case": dots})
    whiskers = [tuple(map(float, x)) for x in re.findall(r'<line class="s\d" x1="([\d.]+)" x2="([\d.]+)"', svg)]
    circle = float(re.search(r'<circle class="m0" cx="([\d.]+)"', svg)[1])
    square = float(re.search(r'<rect class="m1" x="([\d.]+)"', svg)[1]) + 2.8
    assert whiskers[0][0] < circle < whiskers[0][1] < whiskers[1][1] and whiskers[1][0] < square < whiskers[1][1]
    assert ("time, ms, logarithmic" in svg) == logarithmic
    assert max(x for pair in whiskers for x in pair) <= charts.WIDTH - charts.RIGHT + 0.1


# -- whole iterations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo_rows():
    """Rows as the bench makes them, of figures made by hand. TRL reports no phases; the last provider only samples."""
    from bench.end_to_end import figures
    from bench.end_to_end.flops import ATTENTION, PRODUCTS
    from bench.end_to_end.providers import Provider
    from bench.end_to_end.workloads import WORKLOADS

    workload, options, made = WORKLOADS["uniform"], argparse.Namespace(threads=2), []

    def add(name, family, seconds, phases, counts=None, settings=None, **changes):
        provider = Provider(name, family, sys.executable, "none", (), **changes)
        made.extend(figures.settings_rows(workload, "fp32", provider, settings or {}, options))
        one = {"cpu_seconds": 2 * seconds, "phases": phases, "peak_bytes": 3_000_000_000}
        one |= {"tokens": 6000, "answer_tokens": 4000}
        runs = [one | {"seconds": s} for s in (0.9 * seconds, seconds, 1.1 * seconds)]
        provider = provider.at(settings or {})
        made.extend(figures.rows_of(workload, "fp32", provider, runs, 200.0, options, counts))

    phases = {"rollout": 1.0, "score": 0.5, "update": 2.0}
    flops = {"score": {PRODUCTS: 50e9, ATTENTION: 1e9}, "update": {PRODUCTS: 200e9, ATTENTION: 1e9}}
    add("icegrt", "icegrt", 4.0, phases, {"flops": flops, "tokens": 6000, "answer_tokens": 4000, "padding": 0.0})
    add("icegrt, lora", "icegrt", 3.0, phases)
    add("reference", "reference", 6.0, phases | {"rollout": 2.0}, {}, {"8 rows": 6.1, "16 rows": 6.4})
    add("TRL", "TRL", 7.0, {}, {}, {"8 rows": 8.0, "16 rows": 7.2})
    name = "transformers continuous batching"
    add(name, name, 0.75, {"rollout": 0.75}, {}, {"64 tokens": 0.8}, is_rollout_only=True)
    return made


def test_an_iterations_table_has_phases_speed_peak_memory_and_quotients(ppo_rows):
    (workload,) = iterations.workloads(ppo_rows)
    assert workload["case"] == "uniform fp32" and workload["phases"] == ["rollout", "score", "update"]
    lines = {line["provider"]: line for line in workload["lines"]}
    ours, trl = lines["icegrt"], lines["TRL, 16 rows"]
    sampler = lines["transformers continuous batching, 64 tokens"]
    assert ours["quotient"] == "" and ours["phases"] == ["1.00", "0.500", "2.00"]
    assert ours["speed"] == "1,000" and ours["memory"] == "3.00" and ours["shares"] == ["50%", "50%"]
    assert lines["icegrt, lora"]["is_ours"] and lines["icegrt, lora"]["quotient"].startswith("0.750 [")
    assert trl["quotient"].startswith("1.75 [") and set(trl["phases"] + trl["shares"]) == {"\N{EN DASH}"}
    assert lines["reference, 8 rows"]["rollout_quotient"].startswith("2.00 [")
    assert sampler["seconds"] == "\N{EN DASH}" and sampler["rollout_quotient"].startswith("0.750 [")
    assert set(lines) == {"icegrt", "icegrt, lora", "reference, 8 rows", "TRL, 16 rows", sampler["provider"]}


def test_operations_and_the_settings_that_were_tried_are_listed(ppo_rows):
    (workload,) = iterations.workloads(ppo_rows)
    (line,) = workload["operations"]["lines"]
    assert line["provider"] == "icegrt" and line["padding"] == "0%" and line["ranks"] == "\N{EN DASH}"
    executed, useful, quotient = re.fullmatch(r"([\d.]+) / ([\d.]+) \(([\d.]+)\)", line["counts"][0]).groups()
    assert executed == "50.0" and float(quotient) == pytest.approx(50.0 / float(useful), rel=0.01)
    assert "TRL, 8 rows: 8.00 s" in workload["tried"] and len(workload["tried"]) == 5


def test_iterations_reach_the_page_its_losses_and_its_headlines(ppo_rows):
    html = page("cpu", {"ppo": ppo_rows})
    text = text_of(html)
    assert "PPO iteration, fp32, beside TRL uniform fp32 4.00 s 7.00 s TRL, 16 rows" in text
    losses = text_of(html.split('id="losses"')[1].split("</section>")[0])
    assert "time of rollout transformers continuous batching, 64 tokens" in losses and "TRL" not in losses
    assert "share of peak, update" in text and ">seconds of an iteration<" in html


# -- headlines, README and history -----------------------------------------------------------------------------------


def test_a_headline_takes_the_best_alternative_that_does_the_whole_work():
    times = {"chunked": 5.0, "chunked, half masked": 1.0, "eager": 9.0, "liger-kernel": 7.0, "three products": 4.0}
    rows = [row(name, t, case="A2048 V32000 H512 float32 both") for name, t in times.items()]
    ((headline, comparison),) = headlines.find({"linear_ppo_loss": rows})
    assert headline.key == "linear-ppo-loss" and comparison.other["provider"] == "liger-kernel"


def test_keys_of_headlines_are_unique():
    keys = [headline.key for headline in headlines.HEADLINES]
    assert len(keys) == len(set(keys))


@pytest.fixture
def project(tmp_path):
    """Options for a folder of results and a README with markers."""
    write(tmp_path / "results" / "cpu", shaped_gae=gae())
    (tmp_path / "README.md").write_text(f"# A\n\nbefore\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    return tmp_path, ["--results", str(tmp_path / "results"), "--readme-file", str(tmp_path / "README.md")]


def test_the_section_is_written_between_its_markers_and_checked_against_the_rows(project, capsys):
    folder, options = project
    assert main(["--check", *options]) == 1 and "differs from the rows" in capsys.readouterr().err
    assert main(["--readme", *options]) == 0 and main(["--check", *options]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# A\n\nbefore\n") and text.endswith("\nafter\n") and "old" not in text
    line = "| `1M ragged` | 10.0 ms | 20.0 ms, loop over time (torch 2.13.0) | 2.00 [1.92, 2.08] | 9 | 2 |"
    assert line in text and "A Processor, 2 cores" in text and "better median in 0" in text
    write(folder / "results" / "cpu", shaped_gae=gae(ours=11.0))
    assert main(["--check", *options]) == 1


@pytest.mark.parametrize("text", ["none", f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN} {readme.END} {readme.END}"])
def test_markers_that_are_missing_or_doubled_are_an_error(project, capsys, text):
    folder, options = project
    (folder / "README.md").write_text(text)
    assert main(["--readme", *options]) == 1 and "once each" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == text


def test_the_readme_of_the_repository_has_the_figures_of_the_committed_rows():
    assert main(["--check"]) == 0


def test_the_command_writes_a_page_per_device_and_fails_without_rows(project, tmp_path, capsys):
    folder, options = project
    write(folder / "results" / "nvidia-h200", shaped_gae=gae())
    assert main(options) == 0
    pages = sorted(path.parent.name for path in (folder / "results").glob("*/index.html"))
    assert pages == ["cpu", "nvidia-h200"]
    assert main(["--results", str(tmp_path / "empty")]) == 1 and "make bench" in capsys.readouterr().err


def test_releases_are_recorded_and_shown_once_there_are_two(project):
    folder, options = project
    results = folder / "results"
    assert main(["--release", "0.1", *options]) == 0
    entry = json.loads((results / "history" / "0.1.json").read_text())
    assert entry["devices"]["cpu"]["gae"]["quotient"] == 2.0 and entry["devices"]["cpu"]["gae"]["commit"] == "abc1234"
    assert history.table("cpu", history.load(results)) is None
    main(options)
    assert "History" not in (results / "cpu" / "index.html").read_text()
    write(results / "cpu", shaped_gae=gae(ours=5.0))
    history.record("0.2", "2099-01-01", results)
    main(options)
    text = text_of((results / "cpu" / "index.html").read_text())
    assert "GAE over ragged responses 2.00, loop over time 4.00, loop over time" in text.split("History")[1]
    assert history.table("nvidia-h200", history.load(results)) is None
    assert not (results / "history" / "index.html").exists()


@pytest.mark.parametrize("version", ["../x", "", "v1", "1/2"])
def test_a_release_is_named_by_its_version(project, version):
    with pytest.raises(ValueError, match="no version"):
        history.record(version, "2026-01-31", project[0] / "results")


# -- rows that benches write -----------------------------------------------------------------------------------------


def test_rows_of_the_harness_say_where_and_when_they_were_measured(tmp_path):
    x = torch.ones(4)
    calls = {"ours": lambda: x + x, "eager": lambda: 2 * x}
    rows = harness.compare("toy", "A4", calls, error=lambda out: 0.0, tolerance=0.0, rounds=3, device="cpu")
    harness.write("toy", rows, argparse.Namespace(device="cpu", out=tmp_path))
    loaded = load(tmp_path / "cpu")["toy"]
    assert [tuple(r) for r in loaded] == [KEYS, KEYS]
    assert re.search(r", \d+ cores$", loaded[0]["machine"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", loaded[0]["date"])
    assert "transformers" in json.loads(loaded[0]["versions"])
    assert [c.key for c in compared(loaded)] == [("A4", "time", "eager")]
