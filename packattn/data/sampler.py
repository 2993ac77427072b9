"""BalancedPackingSampler: the examples of every optimiser step as they were, spread so that no rank waits."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from packattn.data.balance import Cost, assign
from packattn.data.plan import fingerprint
from packattn.data.values import counted, lengths_tensor, whole

_T = TypeVar("_T")
# What decides which examples a step has, and what decides only how they are spread.
_SAME_STEPS = ("global_batch", "shuffle", "seed", "drop_last", "fingerprint")
_SAME_SPREAD = ("num_replicas", "token_budget", "micro_steps", "cost")
_PLACE = ("epoch", "step", "micro_step")


class BalancedPackingSampler(Sampler[list[int]]):
    """A batch sampler that keeps the optimiser's steps and balances the ranks.

    Every optimiser step has exactly the examples that a plain run draws with the same seed, `DistributedSampler` or
    Accelerate's seeded sampler: a loss curve is that of the plain run, up to rounding, if the loss of a step is the
    mean over its tokens. Within a step the examples are spread over ranks and micro-steps by their cost under a token
    budget, each micro-batch to be packed in one row by `PackingCollator`. Every rank has the same number of
    micro-steps, every rank works the spread out by itself: nothing is communicated. What `DistributedSampler` repeats
    to make the ranks even (less than one example a rank and epoch), or drops with drop_last, is all that is.

    Args:
        lengths: tokens of each example of the data set.
        global_batch: examples of an optimiser step, over all ranks and micro-steps; a multiple of num_replicas.
        token_budget: tokens that a micro-batch may hold, what memory allows. None: any number.
        micro_steps: micro-steps of every optimiser step (gradient accumulation), the last of an epoch may have fewer.
            None: as few as the budget allows, one without a budget; they may differ from step to step, and
            `by_step(loader)` groups what the loader gives.
        num_replicas, rank: as for DistributedSampler; by default those of torch.distributed, or one. rank="all" yields
            the micro-batches of all ranks in turn, which is what `Accelerator.prepare` deals out (give num_replicas).
        cost: of an example; `Cost.of_model(model.config)`, or tokens alone.
        shuffle, seed, drop_last: as for DistributedSampler.

    Raises:
        TypeError, ValueError: an argument does not fit; an example is longer than the budget.

    >>> sampler = BalancedPackingSampler([9, 2, 3, 4, 8, 6], 6, num_replicas=2, rank=0, shuffle=False)
    >>> list(sampler), sampler.assignment(0)
    ([[0, 3, 2]], [[[0, 3, 2], [4, 5, 1]]])
    """

    def __init__(
        self,
        lengths: Iterable[int] | Tensor,
        global_batch: int,
        *,
        token_budget: int | None = None,
        micro_steps: int | None = None,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        cost: Cost = Cost(),  # noqa: B008  (immutable)
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.lengths = lengths_tensor(lengths)
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        whole("global_batch", global_batch, 1)
        if global_batch % self.num_replicas:
            raise ValueError(
                f"global_batch must be a multiple of the {self.num_replicas} ranks, got {global_batch}: a plain run "
                "gives every rank equally many examples of a step."
            )
        whole("seed", seed, 0)
        if micro_steps is not None:
            whole("micro_steps", micro_steps, 1, global_batch // self.num_replicas)
        if token_budget is not None:
            whole("token_budget", token_budget, 1)
            if int(self.lengths.max()) > token_budget:
                first = int((self.lengths > token_budget).nonzero()[0])
                raise ValueError(
                    f"example {first} has {int(self.lengths[first])} tokens, more than the token_budget of "
                    f"{token_budget} (such are {int((self.lengths > token_budget).sum())}); raise the budget, or "
                    "cut or leave out these examples beforehand."
                )
        _check_cost("cost", cost)
        self.global_batch, self.token_budget, self.micro_steps = global_batch, token_budget, micro_steps
        self.cost, self.shuffle, self.seed, self.drop_last = Cost(*cost), shuffle, seed, drop_last
        self.fingerprint = fingerprint(self.lengths)
        self.total = self._total_for(self.num_replicas)
        if self.total == 0:
            few = counted(self.lengths.numel(), "example")
            raise ValueError(f"{few} cannot be dealt to {self.num_replicas} ranks with drop_last=True; give more.")
        self._dealt_out, self._epoch_is_set = False, False
        self._begin(0)

    def _total_for(self, ranks: int) -> int:
        """Examples of an epoch on that many ranks."""
        n = self.lengths.numel()
        return n // ranks * ranks if self.drop_last else -(-n // ranks) * ranks

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._order: Tensor | None = None
        self._counts: dict[int, int] = {}
        # (step, micro-step): where the next iteration begins; where the last one began; what it handed out; what the
        # caller of by_step works on.
        self._start = self._began = self._reached = (0, 0)
        self._given: tuple[int, int] | None = None

    @property
    def num_steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.total // self.global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose number changes the order of the examples.

        Raises:
            TypeError, ValueError: the epoch is not an int of at least 0; a state was loaded in the middle of another
                epoch, and what is left of that epoch would be lost.
        """
        whole("epoch", epoch, 0)
        if epoch != self.epoch:
            if (0, 0) < self._start < (self.num_steps, 0):
                raise ValueError(
                    f"the state that was loaded goes on in epoch {self.epoch} at step {self._start[0]}, and "
                    f"set_epoch({epoch}) would lose the rest of that epoch; begin the loop at epoch {self.epoch} "
                    f"(a loader that Accelerate prepared begins at 0: loader.set_epoch({self.epoch}))."
                )
            self._begin(epoch)
        self._epoch_is_set = True

    def global_batch_of(self, step: int) -> list[int]:
        """The examples of an optimiser step of this epoch, in the order in which a plain run draws them."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must lie in [0, {self.num_steps}), got {step}.")
        if self._order is None:
            n = self.lengths.numel()
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
            self._order = order.repeat(-(-self.total // n))[: self.total]
        batch: list[int] = self._order[step * self.global_batch : (step + 1) * self.global_batch].tolist()
        return batch

    def assignment(self, step: int) -> list[list[list[int]]]:
        """The micro-batches of an optimiser step: `[micro_step][rank]`, lists of examples.

        Raises:
            ValueError: the step does not fit into `micro_steps` under the budget.
        """
        batch = self.global_batch_of(step)
        lengths = self.lengths[batch].tolist()
        most = len(batch) // self.num_replicas
        if self.micro_steps is not None:
            least = most = min(self.micro_steps, most)
        elif self.token_budget is None:
            least = 1
        else:
            least = -(-sum(lengths) // (self.num_replicas * self.token_budget))
        for micro_steps in range(min(least, most), most + 1):
            found = assign(lengths, self.cost, self.num_replicas, micro_steps, self.token_budget)
            if found is not None:
                self._counts[step] = micro_steps
                return [[[batch[item] for item in items] for items in ranks] for ranks in found]
        raise ValueError(
            f"the {sum(lengths)} tokens of step {step} of epoch {self.epoch} do not fit into {most} micro-steps of "
            f"{self.num_replicas} ranks with a token_budget of {self.token_budget}; raise one of the three, or leave "
            "micro_steps out and use by_step."
        )

    def micro_steps_of(self, step: int) -> int:
        """The number of micro-steps of an optimiser step of this epoch, the same on every rank."""
        if step not in self._counts:
            self.assignment(step)
        return self._counts[step]

    def by_step(self, batches: Iterable[_T]) -> Iterator[list[_T]]:
        """What a loader with this sampler gives to a rank, grouped by optimiser step: lists of micro-batches.

        After `load_state_dict`, or of a loader from `Accelerator.skip_first_batches`, the first list holds what was
        left of its step.

        Args:
            batches: a loader whose batch_sampler is this sampler; for rank="all" what `Accelerator.prepare` made of it,
                whose epoch the sampler takes.

        Raises:
            ValueError: the loader gives the batches of all ranks, does not keep their order, or ends too early.
        """
        sampler, skipped = getattr(batches, "batch_sampler", None), 0
        if self.rank == "all" and self.num_replicas > 1 and self in (batches, sampler):
            raise ValueError(
                "this loader gives the micro-batches of all ranks; give by_step the loader that Accelerator.prepare "
                "returned, which gives those of its own."
            )
        if not getattr(batches, "in_order", True):
            raise ValueError(
                "this loader has in_order=False, so that the micro-batches of different steps would be mixed; leave "
                "in_order out."
            )
        while sampler not in (None, self):  # Accelerate wraps a sampler, and once more to skip batches
            skipped += getattr(sampler, "skip_batches", 0)
            sampler = getattr(sampler, "batch_sampler", None)
        if sampler is self and hasattr(batches, "iteration"):
            self.set_epoch(batches.iteration)
        return self._grouped(skipped, iter(batches))

    def _place_after(self, micro_batches: int) -> tuple[int, int]:
        """The step and micro-step that lie that many micro-batches of a rank behind the begin of the iteration."""
        step, done = self._began
        while step < self.num_steps and micro_batches >= (left := self.micro_steps_of(step) - done):
            step, done, micro_batches = step + 1, 0, micro_batches - left
        return step, done + micro_batches

    def _grouped(self, skipped: int, batches: Iterator[_T]) -> Iterator[list[_T]]:
        ahead = list(itertools.islice(batches, 1))  # a loader that loads a state has done so now
        first, done = self._place_after(skipped)
        for step in range(first, self.num_steps):
            taken = ahead or list(itertools.islice(batches, 1))  # the sampler has then worked this step out
            ahead = []
            left = self.micro_steps_of(step) - done
            taken.extend(itertools.islice(batches, left - 1))
            if len(taken) < left:
                raise ValueError(
                    f"batches ended in step {step} of {self.num_steps}, after {len(taken)} of {left} micro-batches; "
                    "give a loader whose batch_sampler is this sampler."
                )
            # The loader may have read ahead of what its user has: while the user has a step, that is where it stands.
            self._given = (step + 1, 0)
            yield taken
            self._given = None
            done = 0
        self._start = (0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        if self._dealt_out and not self._epoch_is_set:
            raise RuntimeError(
                "the epoch did not reach this BalancedPackingSampler: on several ranks, set_epoch of a loader from "
                "Accelerate's skip_first_batches does not come through, and the examples of another epoch would be "
                "repeated. Call sampler.set_epoch(epoch) before the loop, or give the loader to sampler.by_step; with "
                "transformers' Trainer use packattn.hf.BalancedTrainer."
            )
        self._epoch_is_set = False
        (first, skipped), self._start = self._start, (0, 0)
        self._began = self._reached = (first, skipped)
        self._given = None
        self._check_fit(first)
        for step in range(first, self.num_steps):
            found = self.assignment(step)
            ranks = range(self.num_replicas) if isinstance(self.rank, str) else range(self.rank, self.rank + 1)
            for at, micro_batch in enumerate(found):
                if step == first and at < skipped:
                    continue
                for rank in ranks:
                    if rank == ranks[-1]:
                        self._reached = (step, at + 1) if at + 1 < len(found) else (step + 1, 0)
                    yield micro_batch[rank]

    def __len__(self) -> int:
        """Micro-batches of this epoch: of this rank, or of all for rank="all"."""
        if self.token_budget is None:
            last = (self.total - (self.num_steps - 1) * self.global_batch) // self.num_replicas
            each = self.micro_steps or 1
            count = (self.num_steps - 1) * each + min(each, last)
        else:
            count = sum(self.micro_steps_of(step) for step in range(self.num_steps))
        return count * (self.num_replicas if self.rank == "all" else 1)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, after what was handed out; plain numbers, for any checkpoint.

        A loader with workers, or of Accelerate, takes batches ahead of training. In a loop over `by_step` the state is
        that after the step which the loop has; StatefulDataLoader accounts for it too. In any other loop give the
        number of optimiser steps of this epoch that training has finished.

        Raises:
            TypeError, ValueError: this epoch has no such step.
        """
        if step is not None:
            whole("step", step, 0, self.num_steps)
        at = (step, 0) if step is not None else self._given or self._reached
        state = {name: getattr(self, name) for name in (*_SAME_STEPS, *_SAME_SPREAD)}
        return state | {"cost": list(self.cost), "epoch": self.epoch, "step": at[0], "micro_step": at[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next iteration yields what was left of that epoch.

        The number of ranks, the budget, the micro-steps and the cost may change between optimiser steps: the steps keep
        their examples. In the middle of a step they may not.

        Raises:
            TypeError, ValueError: this is no state of a sampler; it is of other data, another seed or another global
                batch, or in the middle of a step that this sampler spreads in another way.
        """
        mine = self.state_dict()
        _check_fields(state, mine)
        state = {**state, "cost": list(state["cost"])}
        for name in _SAME_STEPS + (_SAME_SPREAD if state["micro_step"] else ()):
            if state[name] != mine[name]:
                where = f"in the middle of step {state['step']}" if name in _SAME_SPREAD else "by a sampler"
                wanted = "those of the run that saved it" if name != "fingerprint" else "the same data in its order"
                raise ValueError(
                    f"the state was saved {where} with {name}={state[name]!r}, this sampler has {mine[name]!r}; "
                    f"resume with {wanted}{', or from a state between two steps' if name in _SAME_SPREAD else ''}."
                )
        # The run that saved it may have had another number of ranks, and with it one step more or less.
        steps = -(-self._total_for(state["num_replicas"]) // self.global_batch)
        whole("step of the state", state["step"], 0, steps - bool(state["micro_step"]))
        there = copy.copy(self)
        there._begin(state["epoch"])
        if state["micro_step"]:
            whole("micro_step of the state", state["micro_step"], 0, there.micro_steps_of(state["step"]) - 1)
        self._begin(state["epoch"])
        self._start = self._began = self._reached = (state["step"], state["micro_step"])

    @property
    def batch_size(self) -> None:
        """None: batches differ in size. Accelerate asks before it deals batches out to the ranks.

        Raises:
            TypeError: this sampler has dealt them out already, so that a second time would lose examples.
        """
        if self.rank != "all" and self.num_replicas > 1:
            raise TypeError(
                f"this BalancedPackingSampler yields the batches of rank {self.rank} only, and Accelerate would deal "
                'these out once more; make it with rank="all", or do not give its loader to Accelerator.prepare.'
            )
        self._dealt_out = self.num_replicas > 1

    @property
    def sampler(self) -> "BalancedPackingSampler":
        """This sampler itself: where Accelerate looks for `set_epoch`."""
        return self

    def _check_fit(self, first: int) -> None:
        """Find a step that does not fit before the epoch begins, not in the middle of it."""
        if self.micro_steps is None or self.token_budget is None:
            return
        for step in range(first, self.num_steps):
            lengths = self.lengths[self.global_batch_of(step)]
            # Whatever the order, the emptiest micro-batch takes the longest example if the average leaves it room.
            micro_steps = min(self.micro_steps, lengths.numel() // self.num_replicas)
            average = int(lengths.sum()) / (micro_steps * self.num_replicas)
            if average > self.token_budget - int(lengths.max()):
                self.assignment(step)


def _check_cost(name: str, cost: object) -> None:
    two: Any = cost if isinstance(cost, (tuple, list)) and len(cost) == 2 else (None, None)
    numbers = all(isinstance(part, (int, float)) for part in two)
    if not (numbers and 0 < two[0] < math.inf and 0 <= two[1] < math.inf):
        raise ValueError(f"{name} must be Cost(per_token > 0, per_square >= 0), got {cost!r}.")


def _check_fields(state: object, mine: dict[str, Any]) -> None:
    """Refuse what is not a state of a sampler; whether it is of this one is asked afterwards."""
    if not isinstance(state, Mapping):
        raise TypeError(f"the state must be what state_dict returned, got {type(state).__name__}.")
    if state.keys() != mine.keys():
        missing, more = mine.keys() - state.keys(), state.keys() - mine.keys()
        said = f"no {', '.join(sorted(missing))}" if missing else f"{', '.join(sorted(map(str, more)))}"
        raise ValueError(f"the state has {said}; give what state_dict of a BalancedPackingSampler returned.")
    for name in _PLACE:
        whole(f"{name} of the state", state[name], 0)
    for name in ("num_replicas", "token_budget", "micro_steps"):
        if state[name] is not None or name == "num_replicas":
            whole(f"{name} of the state", state[name], 1)
    _check_cost("cost of the state", state["cost"])


def _replicas(num_replicas: int | None, rank: int | str | None) -> tuple[int, int | str]:
    """The number of ranks and the rank, given or those of torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        num_replicas = torch.distributed.get_world_size() if distributed else 1
    elif rank is None and not (distributed and num_replicas == torch.distributed.get_world_size()):
        raise ValueError(f"rank must be given with num_replicas={num_replicas}, got none.")
    whole("num_replicas", num_replicas, 1)
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    if rank != "all":
        if type(rank) is not int:
            raise TypeError(f'rank must be an int or "all", got {rank!r}.')
        whole("rank", rank, 0, num_replicas - 1)
    return num_replicas, rank
