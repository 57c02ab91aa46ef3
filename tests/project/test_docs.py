"""The documentation agrees with the code: metrics, alarms, layers, docstrings, diagrams."""

import ast
import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icegrt.metrics import alarms, records
from tests.project.test_imports import LAYERS

ROOT = Path(__file__).resolve().parents[2]

DOCS = ROOT / "docs"


def tool(name):
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


check_docs, mermaid = tool("check_docs"), tool("mermaid")


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def first_column(text):
    """The names in backticks that begin the rows of the first table of a text."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [records.PPOStep, records.Evaluation, records.SFTStep, records.RewardStep, records.ValueStep]
)
def test_the_glossary_has_every_field_of_every_record_in_order(record):
    sections = re.split(r"^##+ ", page("metrics.md"), flags=re.MULTILINE)
    (section,) = (text for text in sections if f"Class `{record.__name__}`, kind `{records.KINDS[record]}`" in text)
    assert first_column(section) == [field.name for field in dataclasses.fields(record)]


def test_glossary_and_concepts_have_every_phase():
    phases = page("metrics.md").split("### Phases")[1].split("## Evaluation")[0]
    assert first_column(phases) == list(records.PHASES)
    concepts = page("concepts.md").split("| phase |")[1].split("\n\n")[0]
    assert re.findall(r"^\| \w+ \| `(\w+)` \|", concepts, re.MULTILINE) == list(records.PHASES)


# -- alarms ----------------------------------------------------------------------------------------------------------


def alarms_in_the_source():
    """Name (with units filled in) and text of every alarm that the code yields."""
    alarms = {}
    for node in ast.walk(ast.parse((ROOT / "engine" / "metrics" / "alarms.py").read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)):
            continue
        name, message = map(ast.unparse, node.value.elts)
        for unit in ("iterations", "evaluations"):
            alarms[ast.literal_eval(name.lstrip("f").replace("{unit}", unit))] = message
    return alarms


def alarms_on_the_page():
    parts = re.split(r"^### (.+)$", page("alarms.md"), flags=re.MULTILINE)[1:]
    return {name: text for names, text in zip(parts[::2], parts[1::2], strict=True) for name in names.split(", ")}


def test_every_alarm_is_explained_with_the_remedies_of_the_code():
    code, explained = alarms_in_the_source(), alarms_on_the_page()
    assert set(code) == set(explained) and len(code) >= 14
    for name, message in code.items():
        keys = set(re.findall(r"ppo\.[a-z_.]*[a-z]", message))
        assert keys, name
        assert keys <= set(re.findall(r"ppo\.[a-z_.]*[a-z]", explained[name])), name
        assert "Remedy: " in explained[name]


def test_the_page_of_alarms_has_the_thresholds_of_the_code():
    explained = alarms_on_the_page()
    expected = {
        "kl": f"{alarms.KL_TARGET_MULTIPLE:g} times",
        "entropy": f"{alarms.ENTROPY_FRACTION:.0%} of the mean of the first {alarms.ENTROPY_BASELINE_ITERATIONS}",
        "clip": f"{alarms.CLIP_FRACTION:.0%}",
        "truncated": f"{alarms.TRUNCATED_FRACTION:.0%}",
        "ratio": f"{alarms.RATIO_TOLERANCE:g}",
        "first kl": f"{alarms.KL_FIRST_ITERATION_NATS:g} nats",
        "gap": f"{alarms.ROLLOUT_GAP_NATS['fp32']:g} nats in fp32, or {alarms.ROLLOUT_GAP_NATS['bf16']:g} nats",
        "critic": f"{alarms.EXPLAINED_VARIANCE_ITERATIONS} iterations",
    }
    for name, text in expected.items():
        assert text in explained[name], name
    means = alarms.ROLLOUT_GAP_MEAN_NATS
    assert f"{means['fp32']:g} nats in fp32, or {means['bf16']:g} nats" in explained["gap"]
    assert alarms.DISTINCT_FRACTION_OF_FIRST == 0.5 and "half of the first" in explained["distinct"]
    introduction = page("alarms.md").split("## ")[0]
    for text in (
        f"every {alarms.REPEAT_ITERATIONS} iterations",
        f"{alarms.TREND_T:g}",
        f"{alarms.MIN_ITERATIONS} to {alarms.MAX_ITERATIONS} iterations",
        f"{alarms.MIN_EVALUATIONS} to {alarms.MAX_EVALUATIONS} evaluations",
    ):
        assert text in introduction


# -- architecture ----------------------------------------------------------------------------------------------------


def test_the_architecture_page_has_the_layers_of_the_import_rule():
    layers, _ = re.findall(r"^```mermaid\n(.*?)^```$", page("architecture.md"), re.DOTALL | re.MULTILINE)
    chart = mermaid.parse(layers)
    assert [tuple(label.split(", ")) for (label,) in reversed(chart.labels.values())] == list(LAYERS)
    names = list(chart.labels)
    assert chart.arrows == list(itertools.pairwise(names))
    table = page("architecture.md").split("| package |")[1].split("\n\n")[0]
    assert {name for layer in LAYERS for name in layer} <= set(first_column(table))


def test_paths_in_the_architecture_page_exist():
    for name in re.findall(r"`([\w./*]+/[\w./*]*)`", page("architecture.md")):
        folders = [ROOT, ROOT / "engine"]
        assert any(list(folder.glob(name)) for folder in folders), name


# -- docstrings and the site -----------------------------------------------------------------------------------------


def test_every_public_name_is_documented():
    assert check_docs.problems(ROOT) == []


def test_missing_docstrings_and_entries_are_found(tmp_path):
    package = tmp_path / "src" / "demo_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        '"""A package."""\nfrom .inner import Thing, bare\nfrom .same import same\n'
        '__all__ = ["Thing", "bare", "same"]\n'
    )
    (package / "inner.py").write_text(
        'class Thing:\n    """A thing."""\n    def run(self):\n        pass\n'
        "    def _hidden(self):\n        pass\n"
        "    @property\n    def size(self):\n        return 1\n"
        "def bare():\n    pass\n"
    )
    (package / "same.py").write_text('def same():\n    """Documented."""\n')
    reference = tmp_path / "docs" / "reference"
    reference.mkdir(parents=True)
    (reference / "demo.md").write_text("::: demo_pkg.Thing\n::: demo_pkg.same.same\n::: demo_pkg.gone\n")
    lines = check_docs.problems(tmp_path, {"demo_pkg": "demo.md"})
    assert sorted(line.split(": ", 1)[1] for line in lines) == [
        "Thing.run has no docstring",
        "Thing.size has no docstring",
        "demo_pkg.inner.bare has no docstring",
        "gone is not in demo_pkg.__all__",
        "no entry for demo_pkg.bare",
    ]


def test_diagrams_are_drawn_or_refused():
    chart = mermaid.parse('flowchart TD\n  a["one<br>two"] --> b["three & four"] --> c\n  a --> c\n')
    assert chart.labels == {"a": ["one", "two"], "b": ["three & four"], "c": ["c"]}
    assert chart.arrows == [("a", "b"), ("b", "c"), ("a", "c")]
    svg = mermaid.to_svg('flowchart TD\n  a["one<br>two"] --> b["three & four"] --> c\n')
    assert svg.count("<rect") == 3 and "three &amp; four" in svg and "\n" not in svg
    for wrong in (
        "graph LR\n a --> b",
        "flowchart TD\n a -.-> b",
        "flowchart TD\n subgraph x",
        "flowchart TD\n a-->b-->a",
    ):
        with pytest.raises(ValueError, match="diagram"):
            mermaid.to_svg(wrong)


def build(folder, *, pages=None):
    """`make docs` on a copy of the pages."""
    for name in ("docs", "tools", "README.md", "mkdocs.yml", "examples", "bench", "src", "engine", "kernels"):
        (folder / name).symlink_to(ROOT / name)
    if pages:
        (folder / "docs").unlink()
        (folder / "docs").mkdir()
        for path in DOCS.iterdir():
            (folder / "docs" / path.name).symlink_to(path)
        for name, text in pages.items():
            (folder / "docs" / name).unlink()
            (folder / "docs" / name).write_text(text)
    (options,) = re.findall(r"-m mkdocs (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert "quiet" not in options  # mkdocs 1.6: --quiet also turns `strict` off
    command = [sys.executable, "-m", "mkdocs", *options.split(), "--site-dir", str(folder / "site")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site"
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*?(?:src|href)="(https?:[^"]+)', path.read_text()
        )
        assert loaded == [], path
        assert 'class="mermaid"' not in path.read_text(), path
    home = (site / "index.html").read_text()
    assert 'href="checkpoints.html"' in home and 'docs/checkpoints.md"' not in home
    assert "<p>*" not in home and not re.search(r"<p>[^<]*\n\* ", home)
    log = (site / "log.html").read_text()
    assert re.search(r"<p><strong>Decisions</strong></p>\s*<ul>", log)
    assert (site / "bench" / "results" / "cpu" / "linear_ppo_loss.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[broken](nowhere.md)", "[broken](data.md#nowhere)", "![broken](gone.png)"])
def test_a_broken_link_fails_the_build(tmp_path, text):
    result = build(tmp_path, pages={"scaling.md": f"# Page\n\n{text}\n"})
    assert result.returncode != 0
    assert "scaling.md" in result.stderr, result.stderr
