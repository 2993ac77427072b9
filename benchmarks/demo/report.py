"""Tables, CSV files and pictures of the demo."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.demo.approaches import APPROACHES, PADDING, UNPATCHED
from benchmarks.demo.checks import Checks
from benchmarks.demo.training import Run
from packattn import PackedMask

_COLOUR = {approach.name: approach.colour for approach in APPROACHES}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "savefig.dpi": 150,
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first a header, in aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "   ".join(cells))
    lines.insert(1, "  " + "-" * (len(lines[0]) - 2))
    return "\n".join(lines)


def finetune_table(runs: Sequence[Run], checks: Checks) -> str:
    """Everything the approaches are compared by."""
    padded = next(run for run in runs if run.approach == PADDING.name)
    header = ("approach", "rows", "steps", "padding", "real tokens/s", "speed-up", "peak MB", "held-out loss", "leak")
    rows = [header]
    for run in runs:
        rows.append(
            (
                run.approach,
                f"{run.rows}",
                f"{run.steps}",
                f"{run.padding:.1%}",
                f"{run.speed:.0f}",
                f"{run.speed / padded.speed:.2f}x",
                f"{run.peak_mb:.0f}",
                f"{run.curve[0].loss:.3f} -> {run.curve[-1].loss:.3f}",
                f"{checks.leaks[run.approach]:.3g}",
            )
        )
    rows.append((UNPATCHED.name, "", "", "", "", "", "", "", f"{checks.leaks[UNPATCHED.name]:.3g}"))
    return table(rows)


def curve_table(runs: Sequence[Run]) -> str:
    """The loss curves in figures."""
    rows = [("approach", "steps", "real tokens/s", "seconds", "held-out loss")]
    for run in runs:
        last = run.curve[-1]
        rows.append((run.approach, f"{run.steps}", f"{run.speed:.0f}", f"{last.seconds:.0f}", f"{last.loss:.3f}"))
    return table(rows)


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """One line a measurement: a point of an approach's loss curve, with the figures of its run."""
    names = ("approach", "device", "precision", "rows", "steps", "real_tokens", "computed_tokens", "seconds", "peak_mb")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "curve_seconds", "curve_real_tokens", "curve_loss"])
        for run in runs:
            values = asdict(run)
            for point in run.curve:
                writer.writerow([*(values[name] for name in names), point.seconds, point.tokens, point.loss])


def draw_speed(path: Path, runs: Sequence[Run], checks: Checks) -> None:
    """Real tokens per second by approach, and what each leaks."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
        names = [run.approach for run in runs]
        bars = ax.barh(names, [run.speed for run in runs], color=[_COLOUR[name] for name in names], height=0.62)
        padded = runs[0].speed
        for bar, run in zip(bars, runs, strict=True):
            leak = checks.leaks[run.approach]
            text = f"{run.speed / padded:.1f}x   " + ("leaks" if leak else "no leak")
            ax.annotate(text, (bar.get_width(), bar.get_y() + bar.get_height() / 2), (6, 0), va="center",
                        textcoords="offset points")  # fmt: skip
        ax.invert_yaxis()
        ax.set_xlim(0, 1.25 * max(run.speed for run in runs))
        ax.set_xlabel("real tokens per second")
        ax.set_title(f"Fine-tuning SmolLM2-135M on short tasks ({runs[0].device}, {runs[0].precision})")
        figure.savefig(path)
        plt.close(figure)


def draw_curves(path: Path, runs: Sequence[Run]) -> None:
    """Held-out loss against seconds and against real tokens."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for run in runs:
            loss = [point.loss for point in run.curve]
            # Online packing takes the steps of padding: drawn wide, padding shows under it.
            width = 5 if run.approach == PADDING.name else 1.5
            options = {
                "color": _COLOUR[run.approach],
                "label": run.approach,
                "marker": "o",
                "markersize": 3,
                "lw": width,
            }
            axes[0].plot([point.seconds for point in run.curve], loss, **options)
            axes[1].plot([point.tokens / 1e3 for point in run.curve], loss, **options)
        axes[0].set_xlabel("seconds of training")
        axes[1].set_xlabel("thousand real tokens")
        axes[0].set_ylabel("held-out loss, examples alone")
        axes[0].set_title("A small Llama on documented functions")
        axes[1].legend(frameon=False)
        figure.savefig(path)
        plt.close(figure)


def draw_mask(path: Path) -> None:
    """The masks of one packed row: causal, and with a sliding window."""
    lengths = [9, 5, 14, 7, 3, 10]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained")
        PackedMask.causal(lengths=lengths).plot(ax=axes[0]).set_title("six examples in one row, causal")
        PackedMask.causal(lengths=lengths, window=5).plot(ax=axes[1]).set_title("the same with a window of 5")
        axes[1].set_ylabel("")
        figure.savefig(path)
        plt.close(figure)
