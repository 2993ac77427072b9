"""One example: its columns of one value per token, read and checked the same way by everything that packs."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
LABELS = ("labels", "label", "label_ids")
MASKS = ("completion_mask", "assistant_masks")
# Columns that say where sequences lie and what is a target, beside those that models take.
PACKING_COLUMNS = ("position_ids", "seq_lengths", *MASKS)
# The columns that decide what a row means; all others are carried along.
READ = ("input_ids", *LABELS, *MASKS, "attention_mask", "position_ids", "seq_lengths")
_MADE_BY_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Example(NamedTuple):
    """An example that was read.

    Attributes:
        name: the example in messages, "example 3".
        fields: the names of the columns that it was given with.
        columns: name -> (tokens,): input_ids, labels (-100 where nothing is to be predicted) and position_ids, int64;
            then the other columns, with the dtypes that they came with.
        label: the label of the whole example, shape (), int64 or floating; None where there is none.
    """

    name: str
    fields: tuple[str, ...]
    columns: dict[str, Tensor]
    label: Tensor | None

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.columns["input_ids"])

    def cut(self, start: int, stop: int) -> "Example":
        """The tokens `start` to `stop`; a sequence that begins before `start` begins at it, with the first position."""
        if start == 0 and stop == self.tokens:
            return self
        columns = {field: values[start:stop] for field, values in self.columns.items()}
        positions = self.columns["position_ids"][0] + _since(begins(columns["position_ids"]))
        return self._replace(columns=columns | {"position_ids": positions})


def read_example(example: object, name: str, start_position: int = 0) -> Example:
    """Read and check one example.

    Masks of the loss are honoured: `completion_mask` and `assistant_masks`, as TRL names them. Without labels, the
    labels are the input_ids where every mask is 1 and -100 elsewhere; labels that are given must agree with the masks.

    Args:
        example: a mapping of columns, each a list, tensor or array with one number per token:
            input_ids: integers, at least one.
            labels (or label, label_ids): integers; or one number for the whole example. Without: the input_ids.
            completion_mask, assistant_masks: 0 where a token is no target, else 1.
            attention_mask: all ones.
            position_ids: integers; the example is itself a packed row, whose positions say where its sequences begin.
            seq_lengths: integers, the lengths of the sequences of a packed row in place of position_ids (TRL).
            Any other column: numbers.
        name: how messages call the example, for instance "example 3".
        start_position: position of the first token of a sequence.

    Raises:
        TypeError: the example is not a mapping with input_ids, or a column holds something other than numbers of the
            right kind.
        ValueError: the example is empty or has padding, or its columns do not fit each other.
    """
    given = mapping_with_tokens(example, name)
    made = [field for field in _MADE_BY_PACKING if field in given]
    if made:
        raise ValueError(f"{name} has {made[0]}, which packing decides; remove it, and ask the collator for it.")
    columns = {str(field): _numbers(name, field, values) for field, values in given.items()}
    fields, label = tuple(columns), _take_label(name, columns)
    lengths = columns.pop("seq_lengths", None)
    ids = columns["input_ids"]
    for field, values in columns.items():
        _check_shape(f"{name}, field {field!r}", field, values, ids)
    input_ids = _integers(name, "input_ids", columns.pop("input_ids"))
    _check_padding(name, columns.pop("attention_mask", None))
    labels = _masked(name, input_ids, columns, label)
    positions = _positions(name, input_ids, columns.pop("position_ids", None), lengths, start_position)
    first = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    return Example(name, fields, first | columns, label)


def check_same(example: Example, first: Example) -> None:
    """Refuse an example that has other fields than the first one, or a label of another kind."""
    if {*example.fields} != {*first.fields}:
        raise ValueError(
            f"{example.name} has fields {', '.join(example.fields)} where {first.name} has {', '.join(first.fields)}; "
            "give every example the same fields."
        )
    if (example.label is None) != (first.label is None):
        labelled = first if example.label is None else example
        raise ValueError(
            f"{labelled.name}, field 'labels' must hold one value per token, got the single value "
            f"{labelled.label}; give every example one label, or every token."
        )


def mapping_with_tokens(example: object, name: str) -> Mapping[str, Any]:
    """The example, if it is a mapping with input_ids.

    Raises:
        TypeError: it is no mapping.
        ValueError: it has no input_ids.
    """
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{name} must be a mapping with input_ids, got {type(example).__name__}; wrap the token ids as "
            "{'input_ids': ids}."
        )
    if "input_ids" not in example:
        raise ValueError(
            f"{name} has no input_ids, only {', '.join(map(str, example)) or 'nothing'}; tokenize first, and keep the "
            "column input_ids."
        )
    return example


def holds_tokens(values: object) -> bool:
    """Whether a column's value may hold one number per token: a flat list, tensor or array of numbers."""
    ndim = getattr(values, "ndim", None)
    if ndim is not None:
        return bool(ndim == 1) and getattr(getattr(values, "dtype", None), "kind", "i") not in "OSUMm"
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        return False
    return not values or (isinstance(values[0], Number) or getattr(values[0], "ndim", None) == 0)


def left_out(holding: Mapping[str, bool], columns: Collection[str] | None, stacklevel: int) -> frozenset[str]:
    """The columns of a data set that are not packed. A warning names them where they were not chosen.

    Args:
        holding: the columns, and whether each may hold one number per token.
        columns: those to keep beside the ones that `read_example` knows; None: all that hold one number per token.
        stacklevel: where the warning points to, as for `warnings.warn` called in here.

    Raises:
        TypeError, ValueError: `columns` are not names of columns of the data set.
    """
    known = {*READ, *_MADE_BY_PACKING}
    if columns is None:
        names = [name for name, held in holding.items() if not held and name not in known]
        if names:
            warnings.warn(
                f"columns that do not hold one number per token are not packed: {', '.join(names)}. With columns=[...] "
                "(those to keep) the others are left out without this warning.",
                stacklevel=stacklevel,
            )
        return frozenset(names)
    if isinstance(columns, str):
        raise TypeError(f"columns must be a list of names, got the string {columns!r}; give [{columns!r}].")
    kept = {*columns}
    missing = sorted(kept - {*holding})
    if missing:
        raise ValueError(
            f"columns names {', '.join(missing)}, which the data set has not; it has {', '.join(holding)}."
        )
    return frozenset(holding) - known - kept


def begins(positions: Tensor) -> Tensor:
    """Where sequences begin: bool (tokens,), true wherever a position is not the one before + 1."""
    return torch.cat([positions.new_ones(1, dtype=torch.bool), positions[1:] != positions[:-1] + 1])


def targets(example: Example, mask_first: int) -> int:
    """The number of labels to be predicted: without the first `mask_first` ones of each sequence.

    The label of a whole example counts as 1.
    """
    if example.label is not None:
        return 1
    labels = without_first(example.columns["labels"], begins(example.columns["position_ids"]), mask_first)
    return int((labels != IGNORED).sum())


def without_first(labels: Tensor, starts: Tensor, count: int) -> Tensor:
    """`labels` with -100 for the first `count` ones of each sequence; all are (tokens,), `starts` is bool."""
    return labels.masked_fill(_since(starts) < count, IGNORED)


def _since(starts: Tensor) -> Tensor:
    """The index of each token in its sequence, int64 (tokens,); `starts` is true where sequences begin."""
    at = torch.arange(len(starts), device=starts.device)
    return at - torch.where(starts, at, 0).cummax(0).values


def _numbers(name: str, field: str, given: object) -> Tensor:
    """One column as a tensor of numbers, any shape."""
    try:
        return given if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shown = repr(given)
        raise TypeError(
            f"{name}, field {field!r} must hold one number per token, got {type(given).__name__} "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({error}); correct or remove the field "
            "(pack_dataset takes columns=[...], those to keep)."
        ) from error


def _take_label(name: str, columns: dict[str, Tensor]) -> Tensor | None:
    """Bring labels under the name `labels`; the label of the whole example is taken out and returned."""
    found = [field for field in LABELS if field in columns]
    if len(found) > 1:
        raise ValueError(f"{name} has labels twice, as {' and as '.join(found)}; remove one of the columns.")
    if not found:
        return None
    labels = columns.pop(found[0])
    if labels.ndim == 0:
        return labels if labels.is_floating_point() else labels.long()
    columns["labels"] = labels
    return None


def _check_shape(where: str, field: str, values: Tensor, ids: Tensor) -> None:
    if values.ndim == 0:
        raise ValueError(
            f"{where} must hold one value per token, got the single value {values.item()}; correct or remove it. "
            "Only the label of a whole example can be one value."
        )
    if values.ndim != 1:
        raise ValueError(
            f"{where} must have shape (tokens,), got {tuple(values.shape)}; give one example without a batch dimension."
        )
    if field == "input_ids" and len(ids) == 0:
        raise ValueError(f"{where} is empty; leave out examples without tokens.")
    if ids.ndim == 1 and len(values) != len(ids):
        raise ValueError(
            f"{where} must hold one value for each of the {len(ids)} input_ids, got {len(values)}; align it with "
            "input_ids, or remove it."
        )


def _integers(name: str, field: str, values: Tensor) -> Tensor:
    """The values as int64."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}, field {field!r} must hold integers, got {values.dtype}; convert it.")
    found = values.long()
    if values.dtype == torch.uint64 and bool((found < 0).any()):
        raise ValueError(f"{name}, field {field!r} holds values beyond int64; correct them.")
    return found


def _check_padding(name: str, mask: Tensor | None) -> None:
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError(
            f"{name}, field 'attention_mask' marks {int((mask != 1).sum())} of {len(mask)} tokens as padding; tokenize "
            "with padding=False: packing needs none."
        )


def _masked(name: str, input_ids: Tensor, columns: dict[str, Tensor], label: Tensor | None) -> Tensor:
    """The labels, int64 (tokens,); they and the masks are taken out of the columns."""
    given = columns.pop("labels", None)
    labels = input_ids if given is None else _integers(name, "labels", given)
    for field in MASKS:
        mask = columns.pop(field, None)
        if mask is None:
            continue
        outside = mask == 0
        if not bool((outside | (mask == 1)).all()):
            wrong = mask[~(outside | (mask == 1))][0].item()
            raise ValueError(f"{name}, field {field!r} must hold 0 and 1 alone, got {wrong}; correct it.")
        if label is not None:
            raise ValueError(f"{name} has one label for the whole example and {field}; remove one of the columns.")
        clash = (outside & (labels != IGNORED)).nonzero().flatten()
        if given is not None and len(clash):
            raise ValueError(
                f"{name} has labels for {len(clash)} tokens where its {field} is 0, the first at token "
                f"{int(clash[0])}; set these labels to -100, or remove one of the columns."
            )
        labels = labels.masked_fill(outside, IGNORED)
    return labels


def _positions(name: str, ids: Tensor, given: Tensor | None, lengths: Tensor | None, start_position: int) -> Tensor:
    """The positions, int64 (tokens,), in which every sequence begins."""
    if given is not None and lengths is not None:
        raise ValueError(f"{name} has position_ids and seq_lengths; remove one of the columns.")
    if given is not None:
        positions = _integers(name, "position_ids", given)
        if positions[0] != start_position or bool((positions < start_position).any()):
            raise ValueError(
                f"{name}, field 'position_ids' must begin at the start_position, {start_position}, and nowhere lie "
                f"below it, got {int(positions[0])} first and {int(positions.min())} as the least; a packed row begins "
                "with a whole example."
            )
        return positions
    positions = torch.arange(start_position, start_position + len(ids), device=ids.device)
    if lengths is None:
        return positions
    sizes = _integers(name, "seq_lengths", lengths)
    if sizes.ndim != 1 or bool((sizes < 1).any()) or int(sizes.sum()) != len(ids):
        raise ValueError(
            f"{name}, field 'seq_lengths' must hold lengths of at least 1 with the sum {len(ids)}, the number of "
            f"input_ids, got {sizes.tolist()} with the sum {int(sizes.sum())}; correct it, or give position_ids."
        )
    return positions - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
