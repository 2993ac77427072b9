"""What a step costs by each way of sampling: `python -m benchmarks.sampler`, a simulation on real lengths.

A micro-step waits for its slowest rank. Cost of a step over the least that any spread of the same examples can have,
max(total / ranks, largest example): "mean" is over the whole run (sum over sum), "worst" is the worst step. Of
the slowest rank: its own cost over all its micro-steps; "with waiting": the sum of the slowest of each micro-step, as
under FSDP, where ranks meet in every micro-step.
"""

import argparse
from collections.abc import Callable, Iterator

from benchmarks import sampler_schemes as schemes
from benchmarks.packs import lengths as real_lengths
from benchmarks.sampler_schemes import Setting, Step
from packattn.data import Cost

Scheme = Callable[[list[int], Setting], Iterator[Step]]
# name -> (scheme, whether rows are padded to the longest of a micro-batch, whether steps keep their examples)
APPROACHES: dict[str, tuple[Scheme, bool, bool]] = {
    "padding": (schemes.plain, True, True),
    "batch_rebalance, padding": (schemes.rebalanced, True, True),
    "online packing (the paper)": (schemes.plain, False, True),
    "batch_rebalance + flattening": (schemes.rebalanced, False, True),
    "balanced, budget": (schemes.budgeted, False, True),
    "**balanced**": (schemes.balanced, False, True),
    "offline packing (the paper)": (schemes.offline, False, False),
    "multipack": (schemes.multipack, False, False),
}


def measure(lengths: list[int], setting: Setting, scheme: Scheme, padded: bool) -> dict[str, float]:
    """Figures of one approach over an epoch."""
    price = [setting.cost.of_length(length) for length in lengths]
    slowest = waiting = least = worst = 0.0
    steps = micro_steps = 0
    for step in scheme(lengths, setting):
        costs = [[_batch_cost(batch, lengths, price, setting.cost, padded) for batch in ranks] for ranks in step]
        examples = [price[i] for ranks in step for batch in ranks for i in batch]
        bound = max(sum(examples) / setting.ranks, max(examples))
        own = max(map(sum, zip(*costs, strict=True)))
        slowest, waiting, least = slowest + own, waiting + sum(map(max, costs)), least + bound
        worst, steps, micro_steps = max(worst, own / bound), steps + 1, micro_steps + len(costs)
    return {
        "steps": steps, "micro-steps": micro_steps / steps, "mean": slowest / least, "worst": worst,
        "waiting": waiting / least,
    }  # fmt: skip


def _batch_cost(batch: list[int], lengths: list[int], price: list[float], cost: Cost, padded: bool) -> float:
    if padded:
        return len(batch) * cost.of_length(max(lengths[i] for i in batch))
    return sum(price[i] for i in batch)


def main() -> None:
    """Print one Markdown table for each global batch and cap."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", default="short tasks")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--per-square", type=float, default=1.98e-5, help="attention cost; that of a 7B Llama")
    arguments = parser.parse_args()
    for longest in (None, 4096):
        lengths = real_lengths(arguments.set, longest)
        for minibatch, accumulation in ((4, 2), (16, 2), (64, 2)):
            setting = Setting(
                arguments.ranks, minibatch, accumulation, 4096, Cost(1.0, arguments.per_square)
            )  # fmt: skip
            cap = f"capped at {longest:,}" if longest else "as they are"
            print(f"\n{arguments.set}, {cap}, global batch {setting.global_batch}, {setting.ranks} ranks\n")
            print("| approach | steps | micro-steps | slowest rank, mean | worst step | with waiting | same examples |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
            for name, (scheme, padded, same) in APPROACHES.items():
                found = measure(lengths, setting, scheme, padded)
                print(
                    f"| {name} | {found['steps']:,} | {found['micro-steps']:.1f} | {found['mean']:.3f} | "
                    f"{found['worst']:.2f} | {found['waiting']:.3f} | {'yes' if same else 'no'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
