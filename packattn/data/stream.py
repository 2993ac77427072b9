"""PackedStream: packs examples as they come, and goes on bit by bit where it was stopped."""

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from packattn.data.collator import PackingCollator, packed_row
from packattn.data.examples import Example, holds_tokens, left_out, mapping_with_tokens, read_example
from packattn.data.fit import BestFit
from packattn.data.packing import Overlong, longest, make_limits
from packattn.data.values import whole

# The number of an example, the tokens of it that are meant, and the example as it was given.
_Held = tuple[int, int, int, Mapping[str, Any]]


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """Packed rows of an endless or unknown number of examples, by best-fit over a bounded number of open bins.

    A row is handed on when it is full, or when it is the fullest of the open ones and another bin is needed; what is
    open at the end comes last. `state_dict` holds all that is open, so that a run that was stopped goes on with the
    very rows that it would have had. In the workers of a loader every worker packs its own examples: those that the
    data set deals out itself, if it is a torch IterableDataset (`datasets.IterableDataset` is), else every n-th.

    Args:
        examples: mappings with input_ids, to be iterated over. With a `state_dict` of its own (as
            `datasets.IterableDataset` has) it is resumed by that, otherwise examples are skipped.
        capacity: tokens that a row may hold.
        open_bins: rows that are open at a time: more fill better, fewer keep the order.
        max_per_bin, max_square, overlong: as for `pack`; `split` and `dropped` count what was done.
        columns: as for `pack_dataset`; the first example shows which hold one number per token.
        collator: packs the examples of a row.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        capacity: int,
        *,
        open_bins: int = 64,
        max_per_bin: int | None = None,
        max_square: int | None = None,
        overlong: Overlong = "error",
        columns: Collection[str] | None = None,
        collator: PackingCollator = PackingCollator(),  # noqa: B008  (immutable)
    ) -> None:
        if not hasattr(examples, "__iter__"):
            raise TypeError(f"examples must be iterable, got {type(examples).__name__}.")
        if iter(examples) is examples:
            raise TypeError(
                "examples must be iterable anew in every epoch, got an iterator; give what makes it, for instance a "
                "class with __iter__."
            )
        if overlong not in get_args(Overlong):
            raise ValueError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {overlong!r}.")
        whole("open_bins", open_bins, 1)
        self.columns = columns
        self._left_out: frozenset[str] | None = None  # once an example has been seen
        self.examples, self.collator, self.overlong = examples, collator, overlong
        self.limits, self.open_bins = make_limits(capacity, max_per_bin, max_square), open_bins
        self._resume: dict[str, Any] | None = None
        self._stateful = hasattr(examples, "state_dict") and hasattr(examples, "load_state_dict")
        # Where every epoch begins: what has been resumed once would begin there again.
        self._beginning = copy.deepcopy(examples.state_dict()) if self._stateful else None  # type: ignore[attr-defined]
        self._begin()

    def _begin(self) -> None:
        self.taken = self.split = self.dropped = self.dropped_tokens = 0
        self._walk = BestFit(self.limits, self.open_bins)
        self._held: dict[int, list[_Held]] = {}
        self._ready: list[int] = []
        self._ended = False

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the examples, which may shuffle by it."""
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        state, self._resume = self._resume, None
        if state is None:
            self._begin()
        source = self._source(state)
        while True:
            while self._ready:
                yield packed_row(self.collator, [self._read(*held) for held in self._held.pop(self._ready.pop(0))])
            if self._ended:
                return
            example = next(source, None)
            if example is None:
                self._ended = True
                self._ready = sorted(self._held)
            else:
                self._take(example)

    def _source(self, state: dict[str, Any] | None) -> Iterator[Mapping[str, Any]]:
        """The examples of this worker from where the state was taken."""
        if state is not None and self._ended:
            return iter(())
        if self._stateful:
            from_here = self._beginning if state is None else state["examples"]
            self.examples.load_state_dict(copy.deepcopy(from_here))  # type: ignore[attr-defined]
            return iter(self.examples)
        source = iter(self.examples)
        worker = get_worker_info()
        if worker is not None and not isinstance(self.examples, IterableDataset):
            source = itertools.islice(source, worker.id, None, worker.num_workers)
        return itertools.islice(source, self.taken, None)

    def _columns_of(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns of an example that are packed."""
        if self._left_out is None:
            holding = {name: holds_tokens(values) for name, values in example.items()}
            self._left_out = left_out(holding, self.columns, stacklevel=5)
        return {name: values for name, values in example.items() if name not in self._left_out}

    def _read(self, number: int, start: int, stop: int, example: Mapping[str, Any]) -> Example:
        return read_example(example, f"example {number}", self.collator.start_position).cut(start, stop)

    def _take(self, example: Mapping[str, Any]) -> None:
        """Put one example into the open bins."""
        example = self._columns_of(mapping_with_tokens(example, f"example {self.taken}"))
        tokens, most = len(example["input_ids"]), longest(self.limits)
        if tokens == 0:
            raise ValueError(f"example {self.taken} is empty; leave out examples without tokens.")
        if tokens > most and self.overlong == "error":
            raise ValueError(
                f"example {self.taken} has {tokens} tokens where a bin takes at most {most}; raise the capacity, or "
                'choose overlong="split" or overlong="drop".'
            )
        self.taken += 1
        if tokens > most and self.overlong == "drop":
            self.dropped += 1
            self.dropped_tokens += tokens
            return
        self.split += tokens > most
        for start in range(0, tokens, most):
            stop = min(start + most, tokens)
            bin_, closed = self._walk.place(stop - start)
            self._held.setdefault(bin_, []).append((self.taken - 1, start, stop, example))
            self._ready.extend(closed)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last row that it handed on; for torch.save or a checkpoint of any kind."""
        if self._resume is not None:
            return self._resume
        return {
            "limits": list(self.limits), "open_bins": self.open_bins, "overlong": self.overlong, "taken": self.taken,
            "split": self.split, "dropped": self.dropped, "dropped_tokens": self.dropped_tokens,
            "walk": self._walk.state_dict(), "held": {bin_: list(held) for bin_, held in self._held.items()},
            "ready": list(self._ready), "ended": self._ended,
            "examples": copy.deepcopy(self.examples.state_dict()) if self._stateful else None,  # type: ignore[attr-defined]
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next iteration hands on the rows that were still to come.

        Raises:
            ValueError: the stream packs in another way than the one that was stopped.
        """
        for name, mine in (("limits", list(self.limits)), ("open_bins", self.open_bins), ("overlong", self.overlong)):
            if state[name] != mine:
                raise ValueError(f"the state was saved with {name}={state[name]!r}, this stream has {mine!r}.")
        self._begin()
        self.taken, self.split = state["taken"], state["split"]
        self.dropped, self.dropped_tokens = state["dropped"], state["dropped_tokens"]
        self._walk.load_state_dict(state["walk"])
        self._held = {int(bin_): list(held) for bin_, held in state["held"].items()}
        self._ready, self._ended, self._resume = list(state["ready"]), state["ended"], state
