"""The tokens and the targets of the examples of a data set, counted."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from packattn.data.examples import (
    IGNORED,
    LABELS,
    MASKS,
    READ,
    Example,
    check_same,
    mapping_with_tokens,
    read_example,
    targets,
)
from packattn.data.values import lengths_tensor

_BATCH = 10_000


class Counts(NamedTuple):
    """Of every example of a data set, int64 (examples,): its tokens, and its targets, what is to be predicted."""

    tokens: Tensor
    targets: Tensor


def count_examples(dataset: Any, *, start_position: int = 0, mask_first: int = 1, progress: bool = False) -> Counts:
    """Read and check every example of a data set, and count its tokens and targets.

    Of a `datasets.Dataset` only the columns that decide what a target is are read; without any, only offsets are.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of examples.
        start_position, mask_first: as of `PackingCollator`; the first labels of each sequence are no targets.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: an example cannot be read; the message names it. Or the data set has no length.
    """
    if not is_indexed(dataset):
        raise TypeError(
            f"dataset must have a length and numbered examples, got {type(dataset).__name__}; a stream may have no end."
        )
    if is_datasets(dataset):
        dataset = without_format(dataset)
        names = [name for name in dataset.column_names if name in READ]
        if not {*LABELS, *MASKS, "position_ids", "seq_lengths"} & {*names}:
            tokens = lengths_tensor(count_tokens(dataset, progress))
            return Counts(tokens, (tokens - mask_first).clamp(min=0))
        examples = _rows(dataset.select_columns(names).with_format("numpy"))
    else:
        examples = (dataset[index] for index in range(len(dataset)))
    found = torch.empty(2, len(dataset), dtype=torch.int64)
    first: Example | None = None
    for index, given in enumerate(shown(examples, len(dataset), "counting targets", progress)):
        example = read_example(given, f"example {index}", start_position)
        first = first or example
        check_same(example, first)
        found[0, index], found[1, index] = example.tokens, targets(example, mask_first)
    return Counts(*found)


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The examples of a `datasets.Dataset`, read many at a time."""
    for columns in dataset.iter(1_000):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def count_tokens(dataset: Any, progress: bool) -> Tensor | list[int]:
    """The number of input_ids of every example. Of a `datasets.Dataset` only the offsets are read, not the tokens."""
    if not is_datasets(dataset):
        numbers = shown(range(len(dataset)), len(dataset), "counting tokens", progress)
        return [len(mapping_with_tokens(dataset[index], f"example {index}")["input_ids"]) for index in numbers]
    import pyarrow.compute

    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset has no column input_ids, only {', '.join(dataset.column_names)}; tokenize first.")
    kind = dataset.features.arrow_schema.field("input_ids").type
    if not of_numbers(kind):
        raise TypeError(f"dataset's column input_ids must hold lists of numbers, got {kind}; tokenize first.")
    column = dataset.select_columns("input_ids").with_format("arrow")
    found: list[int] = []
    for table in shown(column.iter(_BATCH), -(-len(dataset) // _BATCH), "counting tokens", progress):
        sizes = pyarrow.compute.list_value_length(table["input_ids"])
        found.extend(pyarrow.compute.fill_null(sizes, 0).to_pylist())
    return found


def rows_without_target(rows: Any) -> int:
    """How many rows of a `datasets.Dataset` of packed rows have no label but -100."""
    import pyarrow.compute as pc

    found = 0
    for table in rows.select_columns("labels").with_format("arrow").iter(_BATCH):
        labels = table["labels"].combine_chunks()
        sizes = torch.from_numpy(pc.list_value_length(labels).to_numpy(zero_copy_only=False).copy())
        hit = torch.from_numpy(labels.flatten().to_numpy(zero_copy_only=False) != IGNORED)
        found += int((torch.segment_reduce(hit.float(), "sum", lengths=sizes) == 0).sum())
    return found


def of_numbers(kind: Any) -> bool:
    """Whether an Arrow type is one of lists of numbers."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    held = kind.value_type
    return bool(pa.types.is_integer(held) or pa.types.is_floating(held) or pa.types.is_boolean(held))


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


def without_format(dataset: Any) -> Any:
    """A `datasets.Dataset` of the columns that it is formatted to give, as plain lists.

    Raises:
        ValueError: it makes its examples by a transform.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "dataset makes its examples by a transform (set_transform) whenever they are read; apply it once by "
            "dataset.map, and give the result."
        )
    if not dataset.format["output_all_columns"]:
        dataset = dataset.select_columns(dataset.format["columns"])
    return dataset.with_format(None)


def is_indexed(dataset: Any) -> bool:
    """Whether examples are numbered from 0 to a length; those of a torch IterableDataset are not, also with one."""
    numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return numbered and not isinstance(dataset, IterableDataset)


def is_datasets(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset`; if so, datasets has been imported."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(dataset, module.Dataset)
