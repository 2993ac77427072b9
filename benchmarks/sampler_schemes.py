"""Ways to make micro-batches of examples, as the samplers of the field do it: `[micro_step][rank]` lists of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

from packattn.data import BalancedPackingSampler, Cost, pack

Step = list[list[list[int]]]


class Setting(NamedTuple):
    """A plain run of so many ranks, examples a rank and micro-step, and micro-steps; rows of `capacity` tokens."""

    ranks: int
    minibatch: int
    accumulation: int
    capacity: int
    cost: Cost
    seed: int = 0

    @property
    def global_batch(self) -> int:
        """Examples of a plain optimiser step."""
        return self.ranks * self.minibatch * self.accumulation


def plain(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """As DistributedSampler draws them: whole global batches only."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(setting.seed)).tolist()
    each, ranks = setting.minibatch, setting.ranks
    for start in range(0, len(order) - setting.global_batch + 1, setting.global_batch):
        step = order[start : start + setting.global_batch]
        batches = [step[at : at + each] for at in range(0, len(step), each)]
        yield [batches[at : at + ranks] for at in range(0, len(batches), ranks)]


def rebalanced(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """By transformers' own BatchRebalanceSampler (train_sampling_strategy="batch_rebalance")."""
    ranks = [
        list(
            BatchRebalanceSampler(
                lengths, setting.global_batch, setting.ranks, setting.accumulation, seed=setting.seed, rank=rank
            )
        )
        for rank in range(setting.ranks)
    ]
    for start in range(0, len(ranks[0]), setting.accumulation):
        yield [[mine[at] for mine in ranks] for at in range(start, start + setting.accumulation)]


def offline(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """Full rows packed beforehand, one to a micro-batch."""
    yield from _dealt(lengths, setting, "mixed")


def multipack(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """As axolotl's MultipackBatchSampler: first-fit in the sampler's order, bins dealt out, the surplus dropped."""
    yield from _dealt(lengths, setting, "first-fit")


def balanced(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """By BalancedPackingSampler, without a budget: one micro-step a step."""
    yield from _balanced(lengths, setting, None)


def budgeted(lengths: list[int], setting: Setting) -> Iterator[Step]:
    """By BalancedPackingSampler under a budget of `capacity` tokens (of the longest example, if that is longer)."""
    yield from _balanced(lengths, setting, max(setting.capacity, *lengths))


def _balanced(lengths: list[int], setting: Setting, budget: int | None) -> Iterator[Step]:
    sampler = BalancedPackingSampler(
        lengths, setting.global_batch, token_budget=budget, num_replicas=setting.ranks, rank="all", cost=setting.cost,
        seed=setting.seed,
    )  # fmt: skip
    for step in range(len(lengths) // setting.global_batch):
        yield sampler.assignment(step)


def _dealt(lengths: list[int], setting: Setting, method: str) -> Iterator[Step]:
    plan = pack(lengths, max(setting.capacity, *lengths), method=method, seed=setting.seed)
    rows = [[piece.example for piece in bin_] for bin_ in plan]
    each = setting.ranks * setting.accumulation
    for start in range(0, len(rows) - each + 1, each):
        yield [rows[at : at + setting.ranks] for at in range(start, start + each, setting.ranks)]
