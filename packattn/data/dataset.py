"""pack_dataset: rows of packed examples, from a data set of any kind and an index plan."""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from packattn.data.collator import PackingCollator, packed_row
from packattn.data.counts import (
    count_examples,
    count_tokens,
    is_datasets,
    is_indexed,
    of_numbers,
    rows_without_target,
    without_format,
)
from packattn.data.examples import Example, holds_tokens, left_out, mapping_with_tokens, read_example, targets
from packattn.data.packing import Method, Overlong, pack
from packattn.data.plan import PackingPlan, Piece
from packattn.data.stream import PackedStream
from packattn.data.values import lengths_tensor

if TYPE_CHECKING:
    import pyarrow

_PLAIN = PackingCollator()


def pack_dataset(
    dataset: Any,
    capacity: int,
    *,
    method: Method | None = None,
    seed: int | EllipsisType | None = ...,
    max_per_bin: int | None = None,
    max_square: int | None = None,
    overlong: Overlong | None = None,
    open_bins: int | None = None,
    lengths: Iterable[int] | Tensor | None = None,
    plan: PackingPlan | str | os.PathLike[str] | None = None,
    columns: Collection[str] | None = None,
    collator: PackingCollator = _PLAIN,
    num_proc: int | None = None,
    progress: bool = True,
) -> Any:
    """Pack a whole data set beforehand, into rows of at most `capacity` tokens, whatever the order of its examples.

    The rows hold input_ids, labels, position_ids and further fields of one value per token, and are given to training
    one or several at a time through a `PackingCollator`, like examples. Masks of the loss are honoured as there. Fewer
    rows mean fewer optimiser steps: `packing_report` says what that costs, `BalancedPackingSampler` is the way that
    keeps the steps.

    Args:
        dataset: what has examples, mappings with input_ids: a `datasets.Dataset`; a sequence (a list, a torch Dataset);
            or anything to iterate over, a `datasets.IterableDataset` among them.
        capacity, method, seed, max_per_bin, max_square, overlong, open_bins: as for `pack`. Without them the method is
            "mixed", the seed 0, overlong "error", or what the plan was made with. What can only be iterated over is
            packed as it comes, in its order, by "best-fit" over `open_bins` bins (64).
        lengths: tokens of the examples, where they are known; otherwise they are counted.
        plan: a plan to follow in place of packing again, or a file: read if it is there, else written. A plan of other
            data, or made with other arguments than those given, is refused.
        columns: the columns to keep beside those that `PackingCollator` knows by name. None: all that hold one number
            per token; a warning names the others, which are left out.
        collator: packs the examples of a row.
        num_proc: processes that write the rows of a `datasets.Dataset`.
        progress: show progress bars.

    Returns:
        A `datasets.Dataset` of rows for one, a `PackedDataset` for a sequence (rows are packed when they are asked
        for), a `PackedStream` for anything else.

    Raises:
        TypeError, ValueError: as `pack` and `PackingCollator`; arguments do not fit this kind of data, or the plan.

    Warns:
        UserWarning: columns are left out; some rows have no target (those of a sequence with `lengths` given, and of a
            stream, are not counted beforehand).
    """
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"dataset must hold examples, got a {type(dataset).__name__} of {', '.join(map(str, dataset))}; give one "
            "of several data sets, and columns as datasets.Dataset.from_dict(columns)."
        )
    said: dict[str, Any] = {
        "method": method, "max_per_bin": max_per_bin, "max_square": max_square, "overlong": overlong,
        "open_bins": open_bins,
    }  # fmt: skip
    said = {name: value for name, value in said.items() if value is not None}
    if not isinstance(seed, EllipsisType):
        said["seed"] = seed
    if not is_indexed(dataset):
        unused = (lengths, plan, num_proc, said.pop("seed", None))
        if any(value is not None for value in unused) or said.pop("method", "best-fit") != "best-fit":
            raise ValueError(
                "what can only be iterated over is packed as it comes: leave out lengths, plan, num_proc, seed and any "
                'method but "best-fit", or give a data set with a length.'
            )
        return PackedStream(dataset, capacity, columns=columns, collator=collator, **said)
    dataset = _chosen(dataset, columns)
    of_targets = None
    if lengths is not None or is_datasets(dataset):
        counted = lengths_tensor(count_tokens(dataset, progress) if lengths is None else lengths)
    else:
        first, after = collator.start_position, collator.ignored_first
        counted, of_targets = count_examples(dataset, start_position=first, mask_first=after, progress=progress)
        counted = lengths_tensor(counted)
    if counted.numel() != len(dataset):
        raise ValueError(f"lengths must hold one length for each of {len(dataset)} examples, got {counted.numel()}.")
    found = plan_for(plan, counted, capacity, said)
    rows: Any
    if is_datasets(dataset):
        rows = _written(dataset, found, collator, num_proc, progress)
        nothing = rows_without_target(rows)
    else:
        rows = PackedDataset(dataset, found, collator)
        nothing = 0 if of_targets is None else _without_target(rows, of_targets)
    if nothing:
        warnings.warn(
            f"{nothing} of {len(rows)} rows have no target: all their labels are -100 (masked, or the first of an "
            "example), so they teach nothing. Leave out examples without a target.",
            stacklevel=2,
        )
    return rows


class PackRows:
    """Packs the rows of a plan: a function of a batch of bin numbers, for `map` of datasets or `map_batches` of Ray.

    A corpus over many machines needs no more than this: `datasets.Dataset.from_dict({"bin": range(len(plan))}).map(
    rows, batched=True, remove_columns="bin")`, or `ray.data.range(len(plan)).map_batches(rows)`.

    Args:
        dataset: the data set, or a function that opens it, where the work is done elsewhere.
        plan: the plan, or its file.
        collator: packs the examples of a row.
    """

    def __init__(
        self,
        dataset: Any,
        plan: PackingPlan | str | os.PathLike[str],
        collator: PackingCollator = _PLAIN,
    ) -> None:
        self.dataset, self.plan, self.collator = dataset, plan, collator
        self._opened: tuple[Any, PackingPlan] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __call__(self, batch: Mapping[str, Any]) -> "pyarrow.Table":
        """The packed rows of the bins in the one column of `batch`, as columns of lists.

        Raises:
            TypeError, ValueError: as `PackingCollator`; or input_ids, labels or position_ids are no int32, in which
                they are written.
        """
        import pyarrow

        (bins,) = batch.values()
        if self._opened is None:
            plan = self.plan if isinstance(self.plan, PackingPlan) else PackingPlan.load(self.plan)
            self._opened = (self.dataset() if callable(self.dataset) else self.dataset, plan)
            _check_plan(plan, self._opened[0])
        dataset, plan = self._opened
        with _one_thread():
            rows = pack_rows(dataset, plan, [int(bin_) for bin_ in bins], self.collator)
        # As a table, since Ray would make of arrays a type of its own, which nothing else reads.
        return pyarrow.table(
            {name: pyarrow.array([_narrow(name, row[name]).numpy() for row in rows]) for name in rows[0]}
        )


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of a plan over a data set, packed when they are asked for; `len` is the number of bins.

    Args:
        dataset: a sequence of examples.
        plan: which of them make a row.
        collator: packs the examples of a row.

    Raises:
        ValueError: the plan is damaged, or of another number of examples.
    """

    def __init__(self, dataset: Any, plan: PackingPlan, collator: PackingCollator = _PLAIN) -> None:
        _check_plan(plan, dataset)
        self.dataset, self.plan, self.collator = dataset, plan, collator

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, bin_: int) -> dict[str, Tensor]:
        return pack_rows(self.dataset, self.plan, [bin_], self.collator)[0]

    def __getitems__(self, bins: Sequence[int]) -> list[dict[str, Tensor]]:
        return pack_rows(self.dataset, self.plan, list(bins), self.collator)

    def __repr__(self) -> str:
        return f"PackedDataset({self.plan!r})"


def _check_plan(plan: PackingPlan, dataset: Any) -> None:
    """Refuse a plan that is damaged, or has not the number of examples of the data set."""
    plan.check()
    if len(dataset) != plan.num_examples:
        raise ValueError(
            f"the plan was made of {plan.num_examples} examples, the data set has {len(dataset)}; make the plan from "
            "the lengths of this data set."
        )


def pack_rows(
    dataset: Any, plan: PackingPlan, bins: Sequence[int], collator: PackingCollator
) -> list[dict[str, Tensor]]:
    """The rows of some bins: name -> (tokens,)."""
    content = [plan[bin_] for bin_ in bins]
    found = iter(_fetch(dataset, [piece.example for pieces in content for piece in pieces]))
    return [
        packed_row(collator, [_piece(next(found), piece, plan, collator) for piece in pieces]) for pieces in content
    ]


def _piece(given: Any, piece: Piece, plan: PackingPlan, collator: PackingCollator) -> Example:
    """The tokens of a piece of an example.

    Raises:
        ValueError: the example has not the tokens that the plan counted.
    """
    example = read_example(given, f"example {piece.example}", collator.start_position)
    counted = int(plan.counted[piece.example])
    if example.tokens != counted:
        raise ValueError(
            f"{example.name} has {example.tokens} tokens where the plan counted {counted}; make the plan from the "
            "lengths of this data set."
        )
    return example.cut(piece.start, piece.stop)


def _without_target(rows: PackedDataset, of_targets: Tensor) -> int:
    """How many rows have no target, from the number of targets of each example, int64 (examples,)."""
    plan, collator = rows.plan, rows.collator
    found = of_targets[plan.examples]
    if plan.starts is not None:
        for at in (plan.lengths != plan.counted[plan.examples]).nonzero().flatten().tolist():
            number, start = int(plan.examples[at]), int(plan.starts[at])
            piece = Piece(number, start, start + int(plan.lengths[at]))
            found[at] = targets(_piece(rows.dataset[number], piece, plan, collator), collator.ignored_first)
    return int((plan.per_bin(found) == 0).sum())


class _Without:
    """A sequence of examples without some columns."""

    def __init__(self, dataset: Any, names: Iterable[str]) -> None:
        self.dataset, self.names = dataset, frozenset(names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = mapping_with_tokens(self.dataset[index], f"example {index}")
        return {name: values for name, values in example.items() if name not in self.names}


def _chosen(dataset: Any, columns: Collection[str] | None) -> Any:
    """The data set without the columns that are not packed."""
    if not len(dataset) or (is_datasets(dataset) and "input_ids" not in dataset.column_names):
        return dataset  # refused when its tokens are counted
    if is_datasets(dataset):
        dataset = without_format(dataset)
        holding = {field.name: of_numbers(field.type) for field in dataset.features.arrow_schema}
        return dataset.remove_columns([*left_out(holding, columns, stacklevel=4)])
    try:
        given = dataset[0]
    except (KeyError, IndexError) as error:
        raise TypeError(
            f"dataset must give its examples by their numbers from 0 on, got a {type(dataset).__name__} that has no 0; "
            "of a pandas.DataFrame give datasets.Dataset.from_pandas(frame)."
        ) from error
    first = mapping_with_tokens(given, "example 0")
    names = left_out({name: holds_tokens(values) for name, values in first.items()}, columns, stacklevel=4)
    return _Without(dataset, names) if names else dataset


def _fetch(dataset: Any, indices: list[int]) -> list[Mapping[str, Any]]:
    if is_datasets(dataset):
        columns = dataset[indices]
        return [{name: columns[name][at] for name in columns} for at in range(len(indices))]
    return [dataset[index] for index in indices]


def plan_for(
    given: PackingPlan | str | os.PathLike[str] | None, lengths: Tensor, capacity: int, said: dict[str, Any]
) -> PackingPlan:
    """The plan to follow: given, read, or made (and written)."""
    if not isinstance(given, (PackingPlan, str, os.PathLike, type(None))):
        raise TypeError(f"plan must be a PackingPlan or the path of its file, got {type(given).__name__}.")
    if given is None:
        return pack(lengths, capacity, **said)
    if not isinstance(given, PackingPlan) and not Path(given).exists():
        made = pack(lengths, capacity, **said)
        made.save(given)
        return made
    plan = given if isinstance(given, PackingPlan) else PackingPlan.load(given)
    plan.check(lengths)
    _check_made_by(plan, {"capacity": capacity, **said})
    return plan


def _check_made_by(plan: PackingPlan, said: dict[str, Any]) -> None:
    """Refuse a plan that was made with other arguments than those given now."""
    made_by = {"capacity": plan.capacity, **plan.made_by}
    if made_by.get("open_bins") is None:
        said.pop("open_bins", None)  # of no effect on the plan's method
    other = [
        f"{name}={made_by.get(name)!r}, asked for is {said[name]!r}" for name in said if said[name] != made_by.get(name)
    ]
    if other:
        raise ValueError(
            f"the plan was made with {'; '.join(other)}. Give the arguments of the plan, or leave them out (all but "
            "the capacity); or make another plan, in another file."
        )


def _written(dataset: Any, plan: PackingPlan, collator: PackingCollator, num_proc: int | None, progress: bool) -> Any:
    """A `datasets.Dataset` of the packed rows, written by its own `map`."""
    import datasets

    bins = datasets.Dataset.from_dict({"bin": range(len(plan))})
    before = datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:
        return bins.map(
            PackRows(dataset, plan, collator), batched=True, batch_size=64, remove_columns=["bin"], num_proc=num_proc,
            desc="packing rows", load_from_cache_file=False,
        )  # fmt: skip
    finally:
        if not before:
            datasets.enable_progress_bars()


def _narrow(name: str, values: Tensor) -> Tensor:
    """Half the bytes for the columns that packing itself makes."""
    if name not in ("input_ids", "labels", "position_ids"):
        return values
    found = values.int()
    if not torch.equal(found.long(), values):
        raise ValueError(f"field {name!r} holds {int(values.abs().max())}, rows are written as int32; correct it.")
    return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch in one thread: in a forked process a pool of threads that the parent had would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
