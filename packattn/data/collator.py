"""PackingCollator: a mini-batch of examples, end to end in one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_IGNORED = -100
_MADE_HERE = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class PackingCollator:
    """Pack examples of any lengths into one row without padding; a `data_collator` for transformers' Trainer as it is.

    The boundaries are marked by `position_ids` that restart, so the model must keep the examples apart:
    `packattn.patch(model)`. The first label of each example is ignored, since the last token of the example before
    would have to predict it; so the labels that are not -100 are exactly the tokens predicted, and a mean over them is
    the mean over the examples run alone, weighted by their tokens.

    Args:
        start_position: position of each example's first token: 0, or 2 for models of the RoBERTa family.

    >>> batch = PackingCollator()([{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22]}])
    >>> for name, values in batch.items():
    ...     print(name, values.tolist())
    input_ids [[11, 12, 13, 21, 22]]
    labels [[-100, 12, 13, -100, 22]]
    position_ids [[0, 1, 2, 0, 1]]
    """

    start_position: int = 0

    def __post_init__(self) -> None:
        if type(self.start_position) is not int or self.start_position < 0:
            raise ValueError(f"start_position must be an int of at least 0, got {self.start_position!r}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pack `examples`, in their order.

        Args:
            examples: mappings with the same fields, each field a list, tensor or array with one value per token.
                input_ids: integers, at least one.
                labels: integers, optional; without them the labels are the input_ids, as for causal language models.
                attention_mask: optional, all ones; it is checked and dropped.
                Any other field (token_type_ids, loss weights, ...) is packed alike and keeps its dtype.

        Returns:
            input_ids, labels and position_ids, int64, then the other fields, all of shape (1, total tokens).

        Raises:
            TypeError: an example is not a mapping, or a field holds something other than numbers of the right kind.
            ValueError: there are no examples, or an example is empty, has padding, or has fields that do not fit.
        """
        examples = list(examples)
        if not examples:
            raise ValueError("examples must hold at least one example, got none.")
        for index, example in enumerate(examples):
            _check_fields(index, example, examples[0])
        columns = {
            name: [_values(index, name, example[name]) for index, example in enumerate(examples)]
            for name in examples[0]
        }
        lengths = [len(ids) for ids in columns["input_ids"]]
        for name, column in columns.items():
            for index, (values, length) in enumerate(zip(column, lengths, strict=True)):
                _check_values(index, name, values, length)
        columns.pop("attention_mask", None)

        for name in ("input_ids", "labels"):
            if name in columns:
                columns[name] = [values.long() for values in columns[name]]
        input_ids = torch.cat(columns.pop("input_ids"))
        labels = torch.cat(columns.pop("labels")) if "labels" in columns else input_ids.clone()
        counts = torch.tensor(lengths, device=input_ids.device)
        starts = counts.cumsum(0) - counts
        labels[starts] = _IGNORED
        inside = torch.arange(len(input_ids), device=input_ids.device) - starts.repeat_interleave(counts)
        positions = inside + self.start_position
        packed = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        packed |= {name: torch.cat(column) for name, column in columns.items()}
        return {name: values[None] for name, values in packed.items()}


def _check_fields(index: int, example: object, first: Mapping[str, Any]) -> None:
    if not isinstance(example, Mapping):
        raise TypeError(
            f"example {index} must be a mapping with input_ids, got {type(example).__name__}; wrap the token ids as "
            "{'input_ids': ids}."
        )
    if example.keys() != first.keys():
        raise ValueError(
            f"example {index} has fields {', '.join(example)} where example 0 has {', '.join(first)}; give every "
            "example the same fields."
        )
    if "input_ids" not in example:
        raise ValueError(
            f"example {index} has no input_ids, only {', '.join(map(str, example)) or 'nothing'}; tokenize first, "
            "and keep the column input_ids."
        )
    made = [name for name in _MADE_HERE if name in example]
    if made:
        raise ValueError(
            f"example {index} has {made[0]}, which packing decides; remove it (an example that is itself a packed row "
            "is given to the model as it is)."
        )


def _values(index: int, name: str, given: object) -> Tensor:
    """One field of one example as a tensor of numbers, any shape."""
    try:
        return given if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(given)
        raise TypeError(
            f"example {index}, field {name!r} must hold one number per token, got {type(given).__name__} "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'}; remove the field (Trainer does so for columns that "
            "the model's forward does not take)."
        ) from error


def _check_values(index: int, name: str, values: Tensor, length: int) -> None:
    where = f"example {index}, field {name!r}"
    if values.ndim == 0:
        raise ValueError(
            f"{where} must hold one value per token, got the single value {values.item()}; remove it, or use a padded "
            "batch: a label for a whole example cannot be packed."
        )
    if values.ndim != 1:
        raise ValueError(
            f"{where} must have shape (tokens,), got {tuple(values.shape)}; give one example without a batch dimension."
        )
    if name == "input_ids" and length == 0:
        raise ValueError(f"{where} is empty; leave out examples without tokens.")
    if len(values) != length:
        raise ValueError(
            f"{where} must hold one value for each of the {length} input_ids, got {len(values)}; align it with "
            "input_ids, or remove it."
        )
    integers_only = name in ("input_ids", "labels")
    if integers_only and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        raise TypeError(f"{where} must hold integers, got {values.dtype}; convert it.")
    if name == "attention_mask" and not bool((values == 1).all()):
        raise ValueError(
            f"{where} marks {int((values != 1).sum())} of {length} tokens as padding; tokenize with padding=False: "
            "packing needs none."
        )
