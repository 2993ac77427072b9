"""packing_report: what padding wastes, what each way of packing saves and what it changes, before training."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packattn.data.balance import Cost
from packattn.data.counts import count_examples, is_datasets, is_indexed
from packattn.data.packing import pack
from packattn.data.plan import PackingPlan
from packattn.data.simulate import Setting, Step, balanced, offline, plain, tally
from packattn.data.values import counted, lengths_tensor, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A decoder of 7 billion weights, Cost.of_model(LlamaConfig()): attention is 4 % of the work at 2,000 tokens.
SEVEN_BILLION = Cost(1.0, 1.98e-5)
# The approach that does not keep the examples of a step.
OFFLINE = "packing offline"
# A speed-up from which packing is recommended: below, what is not predicted (launches, the patch) can eat it up.
_WORTH = 1.1
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
        without_target: examples from which nothing is learnt, since none of their labels is a target; None where the
            targets are not known.
        rows_without_target: rows of the offline plan that hold no others.
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
    without_target: int | None
    rows_without_target: int | None
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
        full = f"{counted(self.bins, 'bin')}, {self.fill:.2%} full, {self.examples_per_bin:.1f} examples each"
        longer = f"{counted(self.over, 'example')} {'is' if self.over == 1 else 'are'} longer than a row"
        head = [
            f"{counted(self.examples, 'example')}, {counted(self.tokens, 'token')}; {shape}, 95 % up to {self.p95:,}",
            f"rows of {counted(self.capacity, 'token')}: {full}",
            f"{longer}{lost}",
            *self._untaught(),
            f"{counted(self.ranks, 'rank')} x mini-batch {self.minibatch} x accumulation {self.accumulation}:",
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

    def _untaught(self) -> list[str]:
        if not self.without_target:
            return []
        rows = f", and with them {counted(self.rows_without_target, 'row')}" if self.rows_without_target else ""
        verb = "has" if self.without_target == 1 else "have"
        return [f"{counted(self.without_target, 'example')} {verb} no target{rows}: nothing is learnt from them"]

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
    lengths: Any,
    capacity: int,
    *,
    targets: Iterable[int] | Tensor | None = None,
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
        lengths: tokens of each example, ints or an integer tensor (examples,); or the data set itself, a
            `datasets.Dataset` or a sequence of mappings with input_ids, whose tokens and targets are then counted.
        capacity: tokens of a row, and of a balanced micro-batch.
        targets: labels of each example that are to be predicted, where they are known; for lengths only.
        ranks, minibatch, accumulation: the plain run; a step has ranks * minibatch * accumulation examples.
        cost: of an example; `Cost.of_model(model.config)`.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    whole("capacity", capacity, 1)
    for name, value in (("ranks", ranks), ("minibatch", minibatch), ("accumulation", accumulation)):
        whole(name, value, 1)
    found, learnt = _counts(lengths, targets)
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
        without_target=None if learnt is None else int((learnt == 0).sum()),
        rows_without_target=None if learnt is None else _rows_without(learnt, plan),
        bins=len(plan), fill=plan.fill, examples_per_bin=found.numel() / len(plan),
        approaches=approaches, recommendation=_recommend(approaches, setting), lengths=found, plan=plan,
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
        OFFLINE: lambda: offline(part, setting),
        "balanced packing": lambda: balanced(part, setting, cost),
    }
    found: list[Approach] = []
    reference = 0.0
    for name, run in runs.items():
        work = tally(run(), setting.ranks, cost.of_length)
        in_tokens = tally(run(), setting.ranks, float)
        in_squares = tally(run(), setting.ranks, lambda length: float(length) ** 2)
        reference = reference or work.slowest
        all_steps = -(-bins // (setting.ranks * setting.accumulation)) if name == OFFLINE else steps
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


def _recommend(approaches: list[Approach], setting: Setting) -> str:
    padding, online, offline_, balanced_ = approaches
    if max(online.speed_up, balanced_.speed_up) < _WORTH:
        why = f"only {padding.padding:.1%} of the computed tokens are padding"
        if padding.padding == 0:
            why = "none of the computed tokens is padding"
        said = (
            f"Recommended: padding, without packing and without a patch: {why}, and with the same steps packing takes "
            f"{min(online.seconds, balanced_.seconds):.2f} of the time."
        )
    elif setting.ranks == 1 and online.speed_up > 0.97 * balanced_.speed_up:
        said = (
            f"Recommended: packing online (PackingCollator alone): {online.speed_up:.2f} times the speed of padding; "
            "on one rank there is nothing to balance."
        )
    else:
        said = (
            f"Recommended: balanced packing (BalancedPackingSampler + PackingCollator): {balanced_.speed_up:.2f} times "
            "the speed of padding, with the examples of every optimiser step as they are."
        )
    if offline_.steps < 0.8 * padding.steps and offline_.speed_up >= _WORTH:
        fewer = f"{padding.steps / offline_.steps:.1f} times fewer optimiser steps ({offline_.steps:,})"
        said += (
            f" Offline packing ({offline_.speed_up:.2f} times) takes {fewer}: an epoch learns less unless the learning "
            "rate or the number of epochs is changed."
        )
    return said


def _counts(given: Any, targets: Iterable[int] | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens and, where they are known, targets of each example: int64 (examples,)."""
    if isinstance(given, Mapping):
        raise TypeError(
            f"packing_report takes lengths or a data set, got a {type(given).__name__} with "
            f"{', '.join(map(str, given))}; give one of its splits or columns."
        )
    sized = is_indexed(given)
    if not sized and isinstance(given, Iterable):
        first = list(itertools.islice(values := iter(given), 1))
        if first and isinstance(first[0], Mapping):
            raise TypeError(
                f"packing_report cannot count a stream ({type(given).__name__}), which may have no end; give lengths, "
                "or a data set with a length."
            )
        given = itertools.chain(first, values)
    elif is_datasets(given) or (
        sized and not isinstance(given, Tensor) and isinstance(next(iter(given), None), Mapping)
    ):
        if targets is not None:
            raise ValueError("targets are counted where packing_report is given a data set; leave them out.")
        counts = count_examples(given)
        return lengths_tensor(counts.tokens), counts.targets
    found = lengths_tensor(given)
    if targets is None:
        return found, None
    learnt = torch.as_tensor(targets if isinstance(targets, Tensor) else list(targets))
    if learnt.is_floating_point() or learnt.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {learnt.dtype}; give the number of targets of each example.")
    if learnt.shape != found.shape:
        raise ValueError(f"targets must hold one number for each of {found.numel()} lengths, got {learnt.numel()}.")
    if int(learnt.min()) < 0:
        raise ValueError(f"targets must hold numbers of at least 0, got {int(learnt.min())}.")
    return found, learnt.to("cpu", torch.int64)


def _rows_without(targets: Tensor, plan: PackingPlan) -> int:
    """Rows of a plan all of whose examples have no target."""
    before = torch.cat([targets.new_zeros(1), targets[plan.examples].cumsum(0)])[plan.offsets]
    return int((before.diff() == 0).sum())


def _chosen(n: int, count: int, seed: int) -> Tensor:
    """Indices of the part that is simulated, in order."""
    if count == n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _percentile(values: Tensor, share: float) -> int:
    return int(values.kthvalue(max(1, round(share * values.numel()))).values)
