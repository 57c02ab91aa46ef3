"""The same task with each option of the engine: a run per file of options/, and one page with all curves.

    python examples/sorting/compare.py --run runs/learn --out runs/learn_options
    python examples/sorting/compare.py --run runs/learn --out runs/learn_options --only baseline advantage-rloo

A file holds the keys that differ from short.yaml, which is plain PPO; its first line says what it shows. Every run
starts from the SFT model of a finished `run.py` and has its seed. Finished runs are kept, so a new file costs one run;
overrides as in `ppo.iterations=80` hold for all runs of a folder. `{run}` in a value is the folder of that `run.py`.
`--page docs/options.md` also writes a Markdown page.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from icegrt import PPOConfig, PPOTrainer  # noqa: E402
from icegrt.config import CONFIG_FILE  # noqa: E402
from icegrt.data import open_rows  # noqa: E402
from icegrt.distributed import failure  # noqa: E402
from icegrt.errors import UserError  # noqa: E402
from icegrt.report.plots import Panel, legend, panel_svg, series_of, write_curves_png  # noqa: E402
from icegrt.report.profile import profile_files  # noqa: E402
from icegrt.report.tables import render_page, settings_tables  # noqa: E402
from icegrt.utils.console import is_main, print_info  # noqa: E402
from icegrt.utils.files import write_text_atomic  # noqa: E402
from sorting.curve import evaluations  # noqa: E402
from sorting.run import SHORT, Sorting, ppo_inputs  # noqa: E402
from staged_run.launch import launch, ranks  # noqa: E402
from staged_run.overrides import read_overrides  # noqa: E402

OPTIONS = HERE / "options"
BASELINE = "baseline"
TITLE = "Six digits to sort: each option of the engine"


@dataclasses.dataclass(frozen=True)
class Option:
    """A file of options/: its name, what it shows, and its keys as overrides."""

    name: str
    title: str
    overrides: list[str]

    @property
    def group(self) -> str:
        """The chart: the name up to the first hyphen."""
        return self.name.partition("-")[0]


def read_option(path: Path) -> Option:
    """Read a file of options/.

    Raises:
        UserError: it does not begin with a comment, or has another section than `ppo`.
    """
    text = path.read_text(encoding="utf-8")
    if not text.startswith("# "):
        raise UserError(f"{path}: expected a comment that says what it shows, then the section ppo")
    return Option(path.stem, text.splitlines()[0].removeprefix("# "), read_overrides(path, "ppo"))


def read_options(names: Iterable[str]) -> list[Option]:
    """Return the named options, or all of them, the baseline first.

    Raises:
        UserError: a name has no file.
    """
    paths = {path.stem: path for path in sorted(OPTIONS.glob("*.yaml"))}
    unknown = sorted(set(names) - set(paths))
    if unknown:
        raise UserError(f"--only: expected names of {OPTIONS}, got {unknown[0]!r}; there are {', '.join(paths)}")
    chosen = [paths[name] for name in paths if name == BASELINE or not names or name in names]
    return sorted((read_option(path) for path in chosen), key=lambda option: option.name != BASELINE)


def train(options: Iterable[Option], run: Path, out: Path, overrides: list[str]) -> None:
    """Train each option that is not finished, in a folder of its name below `out`. Collective."""
    saved = PPOConfig.load(run / "ppo" / CONFIG_FILE)
    for option in options:
        folder = out / option.name
        if (folder / "summary.json").is_file():
            print_info(f"{option.name}: finished before")
            continue
        print_info(f"{option.name}: {option.title}")
        here = [f"ppo.run.dir={folder}", f"ppo.run.seed={saved.run.seed}", "ppo.run.resume=auto"]
        changes = [text.replace("{run}", str(run)) for text in option.overrides]
        config = PPOConfig.load(SHORT, [*ppo_inputs(run), *overrides, *changes, *here])
        with PPOTrainer(config) as trainer:
            trainer.train()


def chart_panels(options: list[Option], curves: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """Return a chart for each group of options, the baseline in each of them."""
    panels = []
    for group in dict.fromkeys(option.group for option in options if option.name != BASELINE):
        members = [option.name for option in options if option.group == group or option.name == BASELINE]
        series = [series_of(name, curves[name], "function_score_mean", markers=True) for name in members]
        panels.append(Panel(f"Exact match: {group}", "of sampled answers to validation prompts", tuple(series)))
    return panels


def first_and_last(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the exact match of the first and of the last evaluation as text."""
    return f"{rows[0]['function_score_mean']:.3f}", f"{rows[-1]['function_score_mean']:.3f}"


def write_page(options: list[Option], out: Path) -> Path:
    """Write curves.png and report.html with the curves of all options. Return the page's path."""
    curves = {option.name: evaluations(out / option.name) for option in options}
    panels = chart_panels(options, curves)
    write_curves_png(out / "curves.png", panels, TITLE)
    figures = [(f"{option.name}: {option.title}", *first_and_last(curves[option.name])) for option in options]
    page = render_page(
        "training_report.html",
        title=TITLE,
        charts=[{"title": p.title, "unit": p.unit, "svg": panel_svg(p), "legend": legend(p)} for p in panels],
        figures=figures,
        settings=settings_tables(out / BASELINE / CONFIG_FILE, None),
        profiles=profile_files(out / BASELINE),
    )
    write_text_atomic(out / "report.html", page)
    return out / "report.html"


def write_markdown(options: list[Option], out: Path, page: Path) -> Path:
    """Write the same curves and figures as a Markdown page, with its picture beside it. Return the page's path."""
    curves = {option.name: evaluations(out / option.name) for option in options}
    picture = page.with_suffix(".png")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_curves_png(picture, chart_panels(options, curves), TITLE)
    baseline = PPOConfig.load(out / BASELINE / CONFIG_FILE)
    rows = len(open_rows(Path(baseline.eval_prompts)))
    prompts = min(rows, baseline.eval_limit) if baseline.eval_limit else rows
    lines = [
        f"# {TITLE}",
        "",
        f"Each option is one run from the same SFT model, with seed {baseline.run.seed}: {baseline.iterations} "
        f"iterations of {baseline.prompts_per_iteration * baseline.samples_per_prompt} answers with the settings of "
        f"`examples/sorting/short.yaml`, but for the keys of the option. Exact match of sampled answers to {prompts} "
        "validation prompts. One run per option does not rank them: studies compare settings over seeds.",
        "",
        f"![Exact match over iterations, a chart for each group of options.]({picture.name})",
        "",
        "| option | what it is | before | after |",
        "|---|---|---|---|",
        *(f"| `{o.name}` | {o.title} | {' | '.join(first_and_last(curves[o.name]))} |" for o in options),
        "",
        "`compare.py --page` of `examples/sorting` writes this page after `make learn`.",
        "",
    ]
    write_text_atomic(page, "\n".join(lines))
    return page


def main() -> int:
    """Run the command line with one rank per core. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/learn"), help="folder of a finished run.py")
    parser.add_argument("--out", type=Path, default=Path("runs/learn_options"), help="folder to write")
    parser.add_argument("--page", type=Path, help="also write this Markdown page, with a PNG beside it")
    parser.add_argument("--only", nargs="+", default=[], help="names of options; the baseline always runs")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as in ppo.iterations=40")
    arguments = parser.parse_args()
    if arguments.page and arguments.only:
        parser.error("--page shows all options, so it does not go with --only")
    try:
        options = read_options(arguments.only)
        count = ranks(Sorting.MAX_RANKS)
        if count > 1:
            return launch([sys.executable, *sys.argv], count)
        with failure.exit_on_peer_failure():
            train(options, arguments.run, arguments.out, arguments.overrides)
            if is_main():
                print_info(f"page: {write_page(options, arguments.out)}")
                if arguments.page:
                    print_info(f"Markdown: {write_markdown(options, arguments.out, arguments.page)}")
    except UserError as error:
        if failure.should_report(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
