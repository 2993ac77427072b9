"""The picture of a packing report; needs matplotlib."""

import os
from typing import TYPE_CHECKING

import torch

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
    edges = torch.logspace(float(values.min().log10()), float((values.max() + 1).log10()), 41).tolist()
    ax.hist(values.tolist(), bins=edges, color=_COLOURS[0])
    ax.set_xscale("log")
    ax.axvline(report.capacity, color=_COLOURS[5], linestyle="--", linewidth=1.2)
    ax.annotate(
        f" {report.capacity:,} ", (report.capacity, 0.97), xycoords=("data", "axes fraction"), va="top",
        ha="right" if report.capacity > report.longest / 2 else "left", color=_COLOURS[5],
    )  # fmt: skip
    ax.set_xlabel("tokens of an example")
    ax.set_ylabel("examples")
    ax.set_title(f"{report.examples:,} examples, mean {report.mean:,.0f} tokens")


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
    ax.set_xlabel(f"{shown} of {report.bins:,} bins, one colour an example")
    ax.set_ylabel("tokens")
    ax.set_title(f"rows {report.fill:.2%} full")


def _draw_times(report: "PackingReport", ax: "Axes") -> None:
    for at, approach in enumerate(report.approaches):
        same = approach.steps == report.approaches[0].steps
        ax.barh(at, approach.seconds, color=_COLOURS[2] if same else _COLOURS[1], height=0.6)
        ax.text(
            approach.seconds, at, f" {approach.speed_up:.2f}x, {approach.steps:,} steps", va="center", ha="left",
        )  # fmt: skip
    ax.set_yticks(range(len(report.approaches)), [approach.name for approach in report.approaches])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.75)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.set_xlabel(f"predicted time of an epoch, {report.ranks} ranks")
    ax.set_title("green keeps the steps")
