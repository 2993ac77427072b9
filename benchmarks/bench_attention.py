"""Packed attention beside its alternatives, in one process, interleaved, on real lengths.

    python -m benchmarks.bench_attention --device cpu

Every round runs every way once, and the loop of multiply-adds that sets the peak; figures are medians over the rounds,
so that a neighbour on the machine slows all alike. GFLOP/s count the pairs that the mask shows, 2 products forward and
5 backward, whatever a way computes. Writes attention_cpu.csv and .png, and prints what it writes. With --limits it
measures instead what the kernel promises at its limits: memory at 131,072 tokens, 65,536 sequences of one token, and
the overhead of a small call; with --products what a library's small products would give.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import packs
from benchmarks.cpu_attention import WAYS, Peak, Problem, Run, Shape, peak_memory
from benchmarks.cpu_limits import limits, products

SHAPES = (Shape(9, 3, 64), Shape(8, 8, 64), Shape(8, 2, 128))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONGEST = 4096
FEWEST, LONG = 3, 5.0  # rounds of each way, and the seconds after which a slow one has run enough
COLORS = ("#0b6e4f", "#3f6fb5", "#c9c9c9", "#b5533f", "#8a63a8", "#c58b2a")
FIELDS = ("set", "shape", "dtype", "pass", "way", "ms", "gflops", "share_of_peak", "ours_is_faster", "peak_mb", "why")


def step(run: Run) -> None:
    """Forward and backward."""
    torch.autograd.grad(run.call(), run.leaves, run.grads)


def seconds(work: Callable[[], object]) -> float:
    """Time of work()."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def forward(run: Run) -> None:
    """Forward only."""
    with torch.no_grad():
        run.call()


def compare(problem: Problem, ways: list[str], rounds: int, peak: Peak) -> list[dict[str, Any]]:
    """A row for each pass and way."""
    runs: dict[str, Run] = {}
    why: dict[tuple[str, str], str] = {}
    memory: dict[str, float] = {}
    passes: dict[str, Callable[[Run], None]] = {"forward": forward, "forward+backward": step}
    for way in ways:
        try:
            runs[way] = WAYS[way](problem)
            forward(runs[way])
        except Exception as error:  # what an alternative cannot do belongs in the table
            runs.pop(way, None)
            why[way, "forward"] = why[way, "forward+backward"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not runs[way].backward:
            why[way, "forward+backward"] = "no backward pass on a CPU"
            continue
        try:
            step(runs[way])
            memory[way] = peak_memory(lambda way=way: step(runs[way])) / 1e6
        except Exception as error:
            why[way, "forward+backward"] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[tuple[str, str], list[float]] = {}
    peaks = []
    for _ in range(rounds):
        peaks.append(peak.measure())
        for name, work in passes.items():
            for way, run in runs.items():
                taken = times.setdefault((way, name), [])
                if (way, name) not in why and (len(taken) < FEWEST or sum(taken) < LONG):
                    taken.append(seconds(lambda work=work, run=run: work(run)))
    rows = []
    for name in passes:
        for way in ways:
            row: dict[str, Any] = {"pass": name, "way": way, "why": why.get((way, name), "")}
            if times.get((way, name)):
                took = statistics.median(times[way, name])
                rate = problem.flops(name != "forward") / took
                row |= {
                    "ms": took * 1e3,
                    "gflops": rate / 1e9,
                    "share_of_peak": statistics.median(
                        problem.flops(name != "forward") / (seconds * most)
                        for seconds, most in zip(times[way, name], peaks, strict=False)
                    ),
                    "ours_is_faster": statistics.median(
                        other / mine for other, mine in zip(times[way, name], times["packattn", name], strict=False)
                    ),
                }
                if name != "forward":
                    row["peak_mb"] = memory[way]
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the times of forward and backward over ours: a row for each shape, a column for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes, dtypes, sets = ([*dict.fromkeys(row[name] for row in rows)] for name in ("shape", "dtype", "set"))
    size = (6 * len(dtypes), 2.6 * len(shapes) + 0.6)
    figure, grid = pyplot.subplots(len(shapes), len(dtypes), figsize=size, layout="constrained", squeeze=False)
    drawn = [way for way in WAYS if any(row["way"] == way and row.get("peak_mb") and way != "packattn" for row in rows)]
    for axes, shape in zip(grid, shapes, strict=True):
        for axis, dtype in zip(axes, dtypes, strict=True):
            for i, way in enumerate(drawn):
                found = [
                    row
                    for row in rows
                    if (row["shape"], row["dtype"], row["way"], row["pass"]) == (shape, dtype, way, "forward+backward")
                ]
                places = [sets.index(row["set"]) + 0.8 / len(drawn) * (i - (len(drawn) - 1) / 2) for row in found]
                color = COLORS[list(WAYS).index(way)]
                values = [row.get("ours_is_faster", 1.0) for row in found]
                bars = axis.bar(places, values, 0.76 / len(drawn), color=color, label=way)
                axis.bar_label(
                    bars,
                    [f"{value:.1f}" if value < 20 else f"{value:.0f}" for value in values],
                    fontsize=6.5,
                    padding=1,
                )
            axis.set_xticks(range(len(sets)), sets, fontsize=8)
            axis.set_yscale("log")
            axis.axhline(1, color=COLORS[0], linewidth=1.5)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title(f"{shape}, {dtype}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("time of forward and backward,\npackattn = 1", fontsize=8)
    grid[0][0].legend(fontsize=7, frameon=False, loc="upper right")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['set']:18} {row['shape']:22} {row['dtype']:5} {row['pass']:17} {row['way']:18}"
    if "ms" not in row:
        return f"{head} -  {row['why'][:80]}"
    memory = f"{row['peak_mb']:8.0f} MB" if "peak_mb" in row else ""
    return (
        f"{head} {row['ms']:9.2f} ms {row['gflops']:7.1f} GFLOP/s {row['share_of_peak']:6.1%} "
        f"{row['ours_is_faster']:7.2f}x {memory}"
    )


def processor() -> str:
    """The CPU by its name."""
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="length of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sets", nargs="+", choices=(*packs.NAMES, "1,024 each"), default=[*packs.NAMES, "1,024 each"])
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=[*range(len(SHAPES))])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="packattn always runs")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = Peak()
    where = f"{processor()}, {options.threads} thread{'s' * (options.threads > 1)}, torch {torch.__version__}"
    print(f"{where}; float32 peak {peak.measure() / 1e9:.0f} GFLOP/s")
    if options.limits or options.products:
        for text in (limits if options.limits else products)(peak):
            print(text, flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ways = [way for way in WAYS if way == "packattn" or way in options.ways]
    rows = []
    for index in options.shapes:
        for dtype in options.dtypes:
            for name in options.sets:
                real = name in packs.NAMES
                drawn = packs.draw(name, options.tokens, LONGEST) if real else [1024] * (options.tokens // 1024)
                problem = Problem(drawn, SHAPES[index], DTYPES[dtype])
                for row in compare(problem, ways, options.rounds, peak):
                    rows.append({"set": name, "shape": str(SHAPES[index]), "dtype": dtype, **row})
                    print(line(rows[-1]), flush=True)
    with (options.out / "attention_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, f"Causal attention over {options.tokens:,} packed tokens, {where}", options.out / "attention_cpu.png")
    print(f"written: {options.out / 'attention_cpu.csv'}, {options.out / 'attention_cpu.png'}")


if __name__ == "__main__":
    main()
