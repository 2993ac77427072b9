"""How fast the packers are and how full their bins: `python -m benchmarks.packing`.

Ten million lengths drawn from each real set (capped at the capacity), one thread; then a billion as a histogram.
"""

import argparse
import resource
import statistics
import time

import torch

from benchmarks.packs import NAMES, lengths
from packattn.data import pack, pack_histogram

METHODS = ("mixed", "first-fit", "best-fit", "next-fit", "best-fit-decreasing")
CAPACITY = 4096


def drawn(name: str, count: int) -> torch.Tensor:
    """`count` lengths of a set, drawn with a seed."""
    pool = torch.tensor(lengths(name, CAPACITY))
    return pool[torch.randint(len(pool), (count,), generator=torch.Generator().manual_seed(0))]


def imbalance(squares: torch.Tensor, ranks: int = 8) -> float:
    """Attention work of the slowest of 8 ranks over its share, rows dealt out as they come; mean over the steps."""
    dealt = squares[: len(squares) // ranks * ranks].double().view(-1, ranks)
    return float((dealt.amax(1) / dealt.mean(1)).mean())


def main() -> None:
    """Print one Markdown table a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=list(NAMES), default=list(NAMES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.count:,} lengths, capacity {CAPACITY:,}, one thread, median of {arguments.repeats}\n")
    print("| set | method | CPU seconds | fill | bins | attention imbalance | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.sets:
        values = drawn(name, arguments.count)
        for method in METHODS:
            seconds = []
            for _ in range(arguments.repeats):
                began = time.process_time()  # of one thread; what else the machine does is not counted
                plan = pack(values, CAPACITY, method=method)
                seconds.append(time.process_time() - began)
            uneven = imbalance(plan.per_bin(plan.lengths**2))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"| {name} | {method} | {statistics.median(seconds):.2f} | {plan.fill:.2%} | {len(plan):,} | "
                f"{uneven:.2f} | {peak:,} |",
                flush=True,
            )
            del plan
    counts = torch.bincount(torch.tensor([length for name in NAMES for length in lengths(name, CAPACITY)]))
    times = 10**9 // int(counts.sum()) + 1
    histogram = {length: times * int(counts[length]) for length in counts.nonzero().flatten().tolist()}
    began = time.process_time()
    plan = pack_histogram(histogram, CAPACITY)
    seconds = time.process_time() - began
    print(
        f"\nA histogram of {sum(histogram.values()):,} examples of {len(histogram):,} lengths: {seconds:.3f} s, "
        f"{plan.num_bins:,} bins, {plan.fill:.3%} full, {plan.length.numel():,} placements"
    )


if __name__ == "__main__":
    main()
