"""The picture of a run: held-out exact match over seconds of training, by matplotlib without a display."""

from collections.abc import Mapping
from pathlib import Path

from icegrt.report.plots import COLORS
from sorting.curve import Curve

__all__ = ["write_picture"]

_STYLES = {"SFT": (COLORS[6], "-"), "PPO": (COLORS[0], "-"), "SFT alone, continued": (COLORS[1], "--")}


def write_picture(path: Path, curves: Mapping[str, Curve], labelled: int) -> None:
    """Write a PNG.

    Args:
        path: the file.
        curves: `SFT`, then from its end `PPO` and `SFT alone, continued`.
        labelled: the number of labelled rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = curves["SFT"]
    for name, curve in curves.items():
        color, style = _STYLES[name]
        # Both continuations leave from the last point of the short SFT.
        joined = curve if name == "SFT" else Curve(start.seconds[-1:], start.exact_match[-1:])
        x, y = [*joined.seconds, *curve.seconds], [*joined.exact_match, *curve.exact_match]
        if name == "SFT":
            x, y = [0.0, *curve.seconds], [0.0, *curve.exact_match]
        axes.plot(x, y, style, color=color, linewidth=2.2)
        if name != "SFT":
            label = "PPO, reward: exact match" if name == "PPO" else f"SFT on the same {labelled:,} labelled rows"
            axes.annotate(
                f"{label}: {y[-1]:.0%}",
                (x[-1], y[-1]),
                xytext=(-4, -30 if name == "PPO" else 8),
                textcoords="offset points",
                ha="right",
                va="top" if name == "PPO" else "bottom",
                color=color,
            )
    axes.axvspan(0, start.seconds[-1], color="0.93", linewidth=0)
    end = (start.seconds[-1], 1.0)
    axes.annotate("short SFT", end, xytext=(4, -3), textcoords="offset points", va="top", color="0.35")
    axes.set_title("Sort six digits (528041= becomes 012458): answers that are exactly right", fontsize=11)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("of sampled answers to held-out prompts")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
