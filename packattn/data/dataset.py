"""pack_dataset: rows of packed examples, from a data set of any kind and an index plan."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from packattn.data.collator import PackingCollator, packed_row
from packattn.data.examples import Example, mapping_with_tokens, read_example
from packattn.data.packing import Method, Overlong, PackingPlan, Piece, pack
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
    seed: int | None = 0,
    max_per_bin: int | None = None,
    max_square: int | None = None,
    overlong: Overlong = "error",
    open_bins: int = 64,
    lengths: Iterable[int] | Tensor | None = None,
    plan: PackingPlan | str | os.PathLike[str] | None = None,
    collator: PackingCollator = _PLAIN,
    num_proc: int | None = None,
    progress: bool = True,
) -> Any:
    """Pack a whole data set beforehand, into rows of at most `capacity` tokens, whatever the order of its examples.

    The rows hold input_ids, labels, position_ids and further fields of one value per token, and are given to training
    one or several at a time through a `PackingCollator`, like examples. Fewer rows mean fewer optimiser steps:
    `packing_report` says what that costs, `BalancedPackingSampler` is the way that keeps the steps.

    Args:
        dataset: what has examples, mappings with input_ids: a `datasets.Dataset`; a sequence (a list, a torch Dataset);
            or anything to iterate over, a `datasets.IterableDataset` among them.
        capacity, method, seed, max_per_bin, max_square, overlong, open_bins: as for `pack`; the method is "mixed". What
            can only be iterated over is packed as it comes, in its order, by "best-fit" over `open_bins` bins.
        lengths: tokens of the examples, where they are known; otherwise they are counted.
        plan: a plan to follow in place of packing anew, or a file: read if it is there, else written. A plan of other
            data is refused.
        collator: packs the examples of a row.
        num_proc: processes that write the rows of a `datasets.Dataset`.
        progress: show progress bars.

    Returns:
        A `datasets.Dataset` of rows for one, a `PackedDataset` for a sequence (rows are packed when they are asked
        for), a `PackedStream` for anything else.

    Raises:
        TypeError, ValueError: as `pack`; arguments do not fit this kind of data.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        if lengths is not None or plan is not None or num_proc is not None or method not in (None, "best-fit"):
            raise ValueError(
                "what can only be iterated over is packed as it comes: leave out lengths, plan, num_proc and any "
                'method but "best-fit", or give a data set with a length.'
            )
        return PackedStream(
            dataset, capacity, max_per_bin=max_per_bin, max_square=max_square, overlong=overlong, open_bins=open_bins,
            collator=collator,
        )  # fmt: skip
    counted = lengths_tensor(count_tokens(dataset, progress) if lengths is None else lengths)
    if counted.numel() != len(dataset):
        raise ValueError(f"lengths must hold one length for each of {len(dataset)} examples, got {counted.numel()}.")
    options: dict[str, Any] = {
        "method": method or "mixed", "seed": seed, "max_per_bin": max_per_bin, "max_square": max_square,
        "overlong": overlong, "open_bins": open_bins,
    }  # fmt: skip
    found = _plan(plan, counted, capacity, options)
    if not _is_datasets(dataset):
        return PackedDataset(dataset, found, collator)
    return _written(dataset, found, collator, num_proc, progress)


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
        """The packed rows of the bins in the one column of `batch`: columns of lists, integers as int32."""
        import pyarrow

        (bins,) = batch.values()
        if self._opened is None:
            plan = self.plan if isinstance(self.plan, PackingPlan) else PackingPlan.load(self.plan)
            self._opened = (self.dataset() if callable(self.dataset) else self.dataset, plan)
        dataset, plan = self._opened
        with _one_thread():
            rows = pack_rows(dataset, plan, [int(bin_) for bin_ in bins], self.collator)
        # As a table, since Ray would make of arrays a type of its own, which nothing else reads.
        return pyarrow.table({name: pyarrow.array([_narrow(row[name]).numpy() for row in rows]) for name in rows[0]})


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of a plan over a data set, packed when they are asked for; `len` is the number of bins.

    Args:
        dataset: a sequence of examples.
        plan: which of them make a row.
        collator: packs the examples of a row.
    """

    def __init__(self, dataset: Any, plan: PackingPlan, collator: PackingCollator = _PLAIN) -> None:
        self.dataset, self.plan, self.collator = dataset, plan, collator

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, bin_: int) -> dict[str, Tensor]:
        return pack_rows(self.dataset, self.plan, [bin_], self.collator)[0]

    def __getitems__(self, bins: Sequence[int]) -> list[dict[str, Tensor]]:
        return pack_rows(self.dataset, self.plan, list(bins), self.collator)

    def __repr__(self) -> str:
        return f"PackedDataset({self.plan!r})"


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
    counted = plan.counted(piece)
    if example.tokens != counted:
        raise ValueError(
            f"{example.name} has {example.tokens} tokens where the plan counted {counted}; make the plan from the "
            "lengths of this data set."
        )
    return example.cut(piece.start, piece.stop)


def count_tokens(dataset: Any, progress: bool) -> Tensor | list[int]:
    """The number of input_ids of every example. Of a `datasets.Dataset` only the offsets are read, not the tokens."""
    if _is_datasets(dataset):
        import pyarrow.compute

        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"dataset has no column input_ids, only {', '.join(dataset.column_names)}; tokenize first."
            )
        column = dataset.select_columns("input_ids").with_format("arrow")
        found: list[int] = []
        for table in shown(column.iter(10_000), -(-len(dataset) // 10_000), "counting tokens", progress):
            found.extend(pyarrow.compute.list_value_length(table["input_ids"]).to_pylist())
        return found
    numbers = shown(range(len(dataset)), len(dataset), "counting tokens", progress)
    return [len(mapping_with_tokens(dataset[index], f"example {index}")["input_ids"]) for index in numbers]


def shown(values: Iterable[Any], total: int | None, what: str, progress: bool) -> Iterable[Any]:
    """`values` with a progress bar, where tqdm is installed."""
    if not progress:
        return values
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return values
    bar: Iterable[Any] = tqdm(values, total=total, desc=what, unit_scale=True)
    return bar


def _fetch(dataset: Any, indices: list[int]) -> list[Mapping[str, Any]]:
    if _is_datasets(dataset):
        columns = dataset[indices]
        return [{name: columns[name][at] for name in columns} for at in range(len(indices))]
    return [dataset[index] for index in indices]


def _plan(
    given: PackingPlan | str | os.PathLike[str] | None, lengths: Tensor, capacity: int, options: dict[str, Any]
) -> PackingPlan:
    """The plan to follow: given, read, or made (and written)."""
    path = Path(given) if isinstance(given, (str, os.PathLike)) else None
    if path is None or path.exists():
        found = given if isinstance(given, PackingPlan) else None if path is None else PackingPlan.load(path)
        if found is not None:
            found.check(lengths)
            if found.capacity != capacity:
                raise ValueError(f"the plan has a capacity of {found.capacity}, asked for is {capacity}.")
            return found
    made = pack(lengths, capacity, **options)
    if path is not None:
        made.save(path)
    return made


def _written(dataset: Any, plan: PackingPlan, collator: PackingCollator, num_proc: int | None, progress: bool) -> Any:
    """A `datasets.Dataset` of the packed rows, written by its own `map`."""
    import datasets

    if dataset.format["type"] is not None:
        dataset = dataset.with_format(None)
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


def _is_datasets(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset`; if so, datasets has been imported."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(dataset, module.Dataset)


def _narrow(values: Tensor) -> Tensor:
    return values.int() if values.dtype == torch.int64 else values


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch in one thread: in a forked process a pool of threads that the parent had would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
