"""What a step costs by each approach: every micro-step waits for its slowest rank."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packattn.data.balance import Cost
from packattn.data.packing import pack
from packattn.data.sampler import BalancedPackingSampler

# A micro-batch is a list of rows, a row a list of the lengths that are packed in it. A step is [micro_step][rank].
Row = list[int]
MicroBatch = list[Row]
Step = list[list[MicroBatch]]


class Setting(NamedTuple):
    """A training run.

    Attributes:
        capacity: tokens of a packed row, and of a balanced micro-batch.
        ranks, minibatch, accumulation: a plain optimiser step has ranks * minibatch * accumulation examples.
        seed: of the order of the examples.
    """

    capacity: int
    ranks: int
    minibatch: int
    accumulation: int
    seed: int = 0

    @property
    def global_batch(self) -> int:
        """Examples of a plain optimiser step."""
        return self.ranks * self.minibatch * self.accumulation


class Tally(NamedTuple):
    """Sums over the micro-steps of a run, in the unit of the cost.

    Attributes:
        steps: optimiser steps.
        examples: examples of these steps.
        work: cost of all micro-batches.
        slowest: sum over the micro-steps of the cost of the slowest rank.
        least: sum over the steps of what no spread can go below: the share of a rank, or the largest example.
    """

    steps: int
    examples: int
    work: float
    slowest: float
    least: float


def plain(lengths: Sequence[int], setting: Setting, padded: bool) -> Iterator[Step]:
    """Mini-batches as they are drawn: padded to their longest example, or flattened (the paper's online mode).

    Every rank draws as many examples, as from DistributedSampler, so that no rank is idle in the last step.
    """
    order = _order(len(lengths), setting)
    drawn = [[lengths[i] for i in order[rank :: setting.ranks]] for rank in range(setting.ranks)]
    each = setting.minibatch * setting.accumulation
    for start in range(0, len(drawn[0]), each):
        micro_steps = range(start, min(start + each, len(drawn[0])), setting.minibatch)
        batches = [[mine[at : min(at + setting.minibatch, start + each)] for mine in drawn] for at in micro_steps]
        yield [[[[max(batch)]] * len(batch) if padded else [batch] for batch in of_ranks] for of_ranks in batches]


def offline(lengths: Sequence[int], setting: Setting) -> Iterator[Step]:
    """Full rows packed beforehand, one to a micro-batch: fewer and larger optimiser steps."""
    plan = pack(lengths, setting.capacity, seed=setting.seed)
    rows = [[[piece.stop - piece.start for piece in bin_]] for bin_ in plan]
    each = setting.ranks * setting.accumulation
    for start in range(0, len(rows), each):
        part = rows[start : start + each]
        yield [part[at : at + setting.ranks] for at in range(0, len(part), setting.ranks)]


def balanced(lengths: Sequence[int], setting: Setting, cost: Cost) -> Iterator[Step]:
    """The examples of the plain steps, spread by BalancedPackingSampler."""
    sampler = BalancedPackingSampler(
        lengths, setting.global_batch, token_budget=setting.capacity, num_replicas=setting.ranks, rank="all",
        cost=cost, seed=setting.seed,
    )  # fmt: skip
    for step in range(sampler.num_steps):
        yield [[[[lengths[i] for i in items]] for items in ranks] for ranks in sampler.assignment(step)]


def tally(steps: Iterator[Step], ranks: int, price: Callable[[int], float], most: int | None = None) -> Tally:
    """Add up at most `most` steps; `price` is the cost of a length."""
    count, examples, work, slowest, least = 0, 0, 0.0, 0.0, 0.0
    known: dict[int, float] = {}

    def of(length: int) -> float:
        if length not in known:
            known[length] = price(length)
        return known[length]

    for step in steps:
        if most is not None and count == most:
            break
        costs = [[sum(of(length) for row in batch for length in row) for batch in batches] for batches in step]
        total = sum(map(sum, costs))
        count += 1
        examples += sum(len(row) for batches in step for batch in batches for row in batch)
        work += total
        slowest += sum(map(max, costs))
        largest = max(of(length) for batches in step for batch in batches for row in batch for length in row)
        least += max(total / ranks, largest)
    return Tally(count, examples, work, slowest, least)


def _order(n: int, setting: Setting) -> list[int]:
    """The order in which a plain run draws its examples, padded to whole ranks as DistributedSampler does."""
    drawn: Tensor = torch.randperm(n, generator=torch.Generator().manual_seed(setting.seed))
    total = -(-n // setting.ranks) * setting.ranks
    order: list[int] = drawn.repeat(-(-total // n))[:total].tolist()
    return order
