"""packing_report: what padding wastes, what each way of packing saves and what it changes, before training."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packattn.data.balance import Cost
from packattn.data.packing import pack
from packattn.data.plan import PackingPlan
from packattn.data.simulate import Setting, Step, balanced, offline, plain, tally
from packattn.data.values import lengths_tensor, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A decoder of 7 billion weights, Cost.of_model(LlamaConfig()): attention is 4 % of the work at 2,000 tokens.
SEVEN_BILLION = Cost(1.0, 1.98e-5)
# Optimiser steps that are simulated of each approach that keeps the plain steps; beyond, figures are scaled.
_SIMULATED = 400


@dataclass(frozen=True)
class Approach:
    """What one way of making batches comes to.

    Attributes:
        name: the approach.
        steps: optimiser steps of an epoch.
        examples_per_step: examples of an optimiser step, on average.
        padding: share of the computed tokens that are padding.
        token_imbalance: tokens of the slowest rank of each micro-step over its share, 1 is perfect.
        attention_imbalance: the same of the sum of squared lengths.
        seconds: predicted, relative to padding (1.0).
        speed_up: predicted, over padding, for an epoch of the same examples.
    """

    name: str
    steps: int
    examples_per_step: float
    padding: float
    token_imbalance: float
    attention_imbalance: float
    seconds: float
    speed_up: float


@dataclass(frozen=True)
class PackingReport:
    """The report; `str(report)` is a table, `report.to_json()` and `report.plot(path)` the rest of it.

    Attributes:
        capacity, ranks, minibatch, accumulation: what was asked.
        examples, tokens: of the data set, as given.
        shortest, median, mean, p95, longest: of the lengths.
        over: examples longer than the capacity; the predictions take them as cut to it.
        tokens_cut: tokens lost if those are cut.
        tokens_dropped: tokens lost if those are left out.
        bins, fill, examples_per_bin: of the offline plan.
        approaches: one entry each.
        recommendation: in a sentence or two.
        lengths, plan: what it was made of.
    """

    capacity: int
    ranks: int
    minibatch: int
    accumulation: int
    examples: int
    tokens: int
    shortest: int
    median: int
    mean: float
    p95: int
    longest: int
    over: int
    tokens_cut: int
    tokens_dropped: int
    bins: int
    fill: float
    examples_per_bin: float
    approaches: list[Approach]
    recommendation: str
    lengths: Tensor
    plan: PackingPlan

    def __str__(self) -> str:
        lost = ""
        if self.over:
            cut, dropped = self.tokens_cut / self.tokens, self.tokens_dropped / self.tokens
            lost = f": cut, they lose {self.tokens_cut:,} tokens ({cut:.1%})"
            lost += f"; dropped, {self.tokens_dropped:,} ({dropped:.1%}); split, none"
        shape = f"lengths {self.shortest:,} to {self.longest:,}, median {self.median:,}, mean {self.mean:,.0f}"
        full = f"{self.bins:,} bins, {self.fill:.2%} full, {self.examples_per_bin:.1f} examples each"
        head = [
            f"{self.examples:,} examples, {self.tokens:,} tokens; {shape}, 95 % up to {self.p95:,}",
            f"rows of {self.capacity:,} tokens: {full}",
            f"{self.over:,} examples are longer than a row{lost}",
            f"{self.ranks} ranks x mini-batch {self.minibatch} x accumulation {self.accumulation}:",
        ]
        names = ("approach", "steps", "examples/step", "padding", "imbalance", "of attention", "speed-up")
        rows = [names] + [
            (
                a.name, f"{a.steps:,}", f"{a.examples_per_step:,.0f}", f"{a.padding:.1%}", f"{a.token_imbalance:.2f}",
                f"{a.attention_imbalance:.2f}", f"{a.speed_up:.2f}x",
            )
            for a in self.approaches
        ]  # fmt: skip
        widths = [max(len(row[at]) for row in rows) for at in range(len(names))]
        table = [
            "  ".join(f"{cell:<{w}}" if at == 0 else f"{cell:>{w}}" for at, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
            for row in rows
        ]
        return "\n".join([*head, "", *table, "", self.recommendation])

    def to_json(self) -> str:
        """Everything but the lengths and the plan."""
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("lengths", "plan")}
        kept["approaches"] = [asdict(approach) for approach in self.approaches]
        return json.dumps(kept, indent=1)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw the lengths, some bins and the predicted times; write the picture to `path` where it is given.

        Raises:
            ImportError: matplotlib is missing.
        """
        from packattn.data.picture import draw_report

        return draw_report(self, path)


def packing_report(
    lengths: Iterable[int] | Tensor,
    capacity: int,
    *,
    ranks: int = 8,
    minibatch: int = 4,
    accumulation: int = 2,
    cost: Cost = SEVEN_BILLION,
    seed: int = 0,
) -> PackingReport:
    """Compare, before training, what the ways to make batches of these examples come to.

    Four approaches: padding each mini-batch; packing each mini-batch (the online mode of Kundu et al.); packing the
    data set into full rows, one to a micro-batch (their offline mode); the plain steps spread by
    `BalancedPackingSampler`. A micro-step takes as long as its slowest rank; launch costs and communication are not
    counted.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a row, and of a balanced micro-batch.
        ranks, minibatch, accumulation: the plain run; a step has ranks * minibatch * accumulation examples.
        cost: of an example; `Cost.of_model(model.config)`.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    found = lengths_tensor(lengths)
    whole("capacity", capacity, 1)
    for name, value in (("ranks", ranks), ("minibatch", minibatch), ("accumulation", accumulation)):
        whole(name, value, 1)
    over = found[found > capacity]
    capped = found.clamp(max=capacity)
    setting = Setting(capacity, ranks, minibatch, accumulation, seed)
    plan = pack(capped, capacity, seed=seed)
    approaches = _approaches(capped, setting, cost, len(plan))
    return PackingReport(
        capacity=capacity, ranks=ranks, minibatch=minibatch, accumulation=accumulation,
        examples=found.numel(), tokens=int(found.sum()), shortest=int(found.min()), median=int(found.median()),
        mean=float(found.double().mean()), p95=_percentile(found, 0.95), longest=int(found.max()),
        over=over.numel(), tokens_cut=int((over - capacity).sum()), tokens_dropped=int(over.sum()),
        bins=len(plan), fill=plan.fill, examples_per_bin=found.numel() / len(plan),
        approaches=approaches, recommendation=_recommend(approaches, ranks), lengths=found, plan=plan,
    )  # fmt: skip


def _approaches(lengths: Tensor, setting: Setting, cost: Cost, bins: int) -> list[Approach]:
    """Every approach, simulated on a part of a large data set and scaled."""
    steps = -(-lengths.numel() // setting.global_batch)
    count = min(lengths.numel(), _SIMULATED * setting.global_batch)
    part: list[int] = lengths[_chosen(lengths.numel(), count, setting.seed)].tolist()
    real = tally(plain(part, setting, padded=False), setting.ranks, float).work
    runs: dict[str, Callable[[], Iterator[Step]]] = {
        "padding": lambda: plain(part, setting, padded=True),
        "packing online": lambda: plain(part, setting, padded=False),
        "packing offline": lambda: offline(part, setting),
        "balanced packing": lambda: balanced(part, setting, cost),
    }
    found: list[Approach] = []
    reference = 0.0
    for name, run in runs.items():
        work = tally(run(), setting.ranks, cost.of_length)
        in_tokens = tally(run(), setting.ranks, float)
        in_squares = tally(run(), setting.ranks, lambda length: float(length) ** 2)
        reference = reference or work.slowest
        all_steps = -(-bins // (setting.ranks * setting.accumulation)) if name == "packing offline" else steps
        found.append(
            Approach(
                name=name, steps=all_steps, examples_per_step=lengths.numel() / all_steps,
                padding=1 - real / in_tokens.work if name == "padding" else 0.0,
                token_imbalance=in_tokens.slowest * setting.ranks / in_tokens.work,
                attention_imbalance=in_squares.slowest * setting.ranks / in_squares.work,
                seconds=work.slowest / reference, speed_up=reference / work.slowest,
            )
        )  # fmt: skip
    return found


def _recommend(approaches: list[Approach], ranks: int) -> str:
    padding, online, offline_, balanced_ = approaches
    if balanced_.speed_up < 1.1:
        return (
            f"Recommended: padding. The examples are so alike that packing saves {1 - balanced_.seconds:.0%} of the "
            "time at most."
        )
    fewer = f"{padding.steps / offline_.steps:.1f} times fewer optimiser steps"
    said = (
        f"Recommended: balanced packing (BalancedPackingSampler + PackingCollator): {balanced_.speed_up:.2f} times the "
        f"speed of padding, with the examples of every optimiser step as they are."
    )
    if ranks == 1 and online.speed_up > 0.97 * balanced_.speed_up:
        said = (
            f"Recommended: packing online (PackingCollator alone): {online.speed_up:.2f} times the speed of padding; "
            "on one rank there is nothing to balance."
        )
    if offline_.steps < 0.8 * padding.steps:
        said += (
            f" Offline packing ({offline_.speed_up:.2f} times) takes {fewer} ({offline_.steps:,}): an epoch learns "
            "less unless the rate or the epochs are set anew."
        )
    return said


def _chosen(n: int, count: int, seed: int) -> Tensor:
    """Indices of the part that is simulated, in order."""
    if count == n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _percentile(values: Tensor, share: float) -> int:
    return int(values.kthvalue(max(1, round(share * values.numel()))).values)
