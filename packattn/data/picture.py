"""The picture of a packing report; needs matplotlib."""

import math
import os
from typing import TYPE_CHECKING

import torch

from packattn.data.report import OFFLINE
from packattn.data.values import counted
from packattn.requirements import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from packattn.data.report import PackingReport

# Okabe and Ito's palette, told apart by colour-blind readers too; neighbours alternate.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_BARS = 40


def draw_report(report: "PackingReport", path: str | os.PathLike[str] | None) -> "Figure":
    """Lengths, bins as stacked bars, predicted times; written to `path` where it is given."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("PackingReport.plot", "matplotlib", "plot") from error
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    lengths, bins, times = figure.subplots(1, 3, width_ratios=(3, 4, 3))
    _draw_lengths(report, lengths)
    _draw_bins(report, bins)
    _draw_times(report, times)
    for ax in (lengths, bins, times):
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_lengths(report: "PackingReport", ax: "Axes") -> None:
    values = report.lengths.double()
    low, high = report.shortest, max(report.longest + 1, report.capacity)
    edges = torch.logspace(math.log10(low), math.log10(high), 41, dtype=torch.float64).tolist()
    edges[0], edges[-1] = low, high  # whatever the rounding, all lengths lie within
    ax.hist(values.tolist(), bins=edges, color=_COLOURS[0])
    ax.set_xscale("log")
    ax.set_xticks(ticks := _round_numbers(low, high), [f"{tick:,}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])  # room above the bars for the capacity
    ax.axvline(report.capacity, color=_COLOURS[5], linestyle="--", linewidth=1.2)
    ax.annotate(
        f" {report.capacity:,} ", (report.capacity, 0.97), xycoords=("data", "axes fraction"), va="top",
        ha="right" if report.capacity**2 > low * high else "left", color=_COLOURS[5],
    )  # fmt: skip
    ax.set_xlabel("tokens of an example")
    ax.set_ylabel("examples")
    ax.set_title(f"{counted(report.examples, 'example')}, mean {report.mean:,.0f} tokens")


def _round_numbers(low: int, high: int) -> list[int]:
    """Two to five numbers to write below an axis of logarithms from `low` to `high`, far enough apart to be read."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(len(str(high)))
        found = [step * 10**power for power in powers for step in steps if low <= step * 10**power <= high]
        if len(found) <= 5:
            return found if len(found) > 1 else [low, high]
    return found[:: -(-len(found) // 5)]


def _draw_bins(report: "PackingReport", ax: "Axes") -> None:
    shown = min(_BARS, len(report.plan))
    for at in range(shown):
        bottom = 0
        for number, piece in enumerate(report.plan[at]):
            height = piece.stop - piece.start
            colour = _COLOURS[(number + at) % len(_COLOURS)]
            ax.bar(at, height, bottom=bottom, width=0.9, color=colour, edgecolor="white", linewidth=0.3)
            bottom += height
    ax.axhline(report.capacity, color="#444444", linewidth=0.8)
    ax.set_xlim(-0.7, shown - 0.3)
    ax.set_xticks([])
    ax.set_xlabel(f"{shown} of {counted(report.bins, 'bin')}, one colour an example")
    ax.set_ylabel("tokens")
    ax.set_title(f"rows {report.fill:.2%} full")


def _draw_times(report: "PackingReport", ax: "Axes") -> None:
    longest = max(approach.seconds for approach in report.approaches)
    for at, approach in enumerate(report.approaches):
        colour = _COLOURS[1] if approach.name == OFFLINE else _COLOURS[2]
        ax.barh(at, approach.seconds, color=colour, height=0.6)
        said = f" {approach.speed_up:.2f}x, {counted(approach.steps, 'step')}"
        ax.text(approach.seconds, at, said, va="center", ha="left")
    ax.set_yticks(range(len(report.approaches)), [approach.name for approach in report.approaches])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.8 * longest)
    ticks = [0, 0.5, 1] if longest < 2 else [0, 1, math.floor(longest)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(f"predicted time of an epoch, {counted(report.ranks, 'rank')}")
    ax.set_title("green keeps the steps")
