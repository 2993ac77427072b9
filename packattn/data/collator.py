"""PackingCollator: a mini-batch of examples, end to end in one row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from packattn.data.values import whole

_IGNORED = -100
_INTEGERS = ("input_ids", "labels", "position_ids")
_MADE_HERE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class PackingCollator:
    """Pack examples of any lengths into one row without padding; a `data_collator` for transformers' Trainer as it is.

    The boundaries are marked by `position_ids` that restart, so the model must keep the examples apart:
    `packattn.patch(model)`. The first label of each example is ignored, since the last token of the example before
    would have to predict it; so the labels that are not -100 are exactly the tokens predicted, and a mean over them is
    the mean over the examples run alone, weighted by their tokens. Models that do not shift their labels (masked
    language models, token classification) learn from the first token too: `keep_first_labels`. Models with one result
    per sequence (sequence classification) take examples with one `label` each.

    Rows of one static size (for compiled graphs, or kernels that are tuned by shape) come from `pad_to` or
    `pad_to_multiple_of`: the row ends in one dead segment, whose tokens have an attention_mask of 0, the first
    position and no label. They see nothing and are no sequence, so the segment costs no attention, whatever its size.

    Args:
        start_position: position of each example's first token: 0, or 2 for models of the RoBERTa family.
        pad_to: tokens of every row.
        pad_to_multiple_of: the tokens of a row are rounded up to a multiple of this.
        pad_token_id: what the dead segment is made of; any token of the vocabulary.
        return_flash_attn_kwargs: also give cu_seq_lens_q and cu_seq_lens_k, int32 (sequences + 1,), and max_length_q
            and max_length_k, ints, for kernels of the flash-attn kind. To them, and to seq_idx, a dead segment is a
            last sequence, since they leave the output of a token that is in none unwritten.
        return_seq_idx: also give seq_idx, int32 (1, tokens), the number of each token's sequence, for Mamba kernels.
        keep_first_labels: leave the labels as they are, of which each example must then have its own.

    >>> batch = PackingCollator()([{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22]}])
    >>> for name, values in batch.items():
    ...     print(name, values.tolist())
    input_ids [[11, 12, 13, 21, 22]]
    labels [[-100, 12, 13, -100, 22]]
    position_ids [[0, 1, 2, 0, 1]]
    """

    start_position: int = 0
    _: KW_ONLY
    pad_to: int | None = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    return_flash_attn_kwargs: bool = False
    return_seq_idx: bool = False
    keep_first_labels: bool = False

    def __post_init__(self) -> None:
        whole("start_position", self.start_position, 0)
        whole("pad_token_id", self.pad_token_id, 0)
        for name in ("pad_to", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        if self.pad_to is not None and self.pad_to_multiple_of is not None:
            raise ValueError("give pad_to or pad_to_multiple_of, not both.")

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Pack `examples`, in their order.

        Args:
            examples: mappings with the same fields, each field a list, tensor or array with one value per token; or
                lists of such mappings (the bins of a plan), which are taken one after another.
                input_ids: integers, at least one.
                labels: integers, optional; without them the labels are the input_ids, as for causal language models.
                    Or one number for the example, by the name of `label` too.
                position_ids: integers, optional: the example is itself a packed row, whose positions say where its
                    sequences begin.
                attention_mask: optional, all ones; it is checked and dropped.
                Any other field (token_type_ids, loss weights, ...) is packed alike and keeps its dtype.

        Returns:
            input_ids, labels and position_ids, int64, then the other fields, all of shape (1, total tokens); with
            padding also attention_mask, int64; then what the arguments ask for. Labels of whole examples are
            (examples,), int64 or floating as they came.

        Raises:
            TypeError: examples are not a sequence of mappings, or a field holds something other than numbers of the
                right kind.
            ValueError: there are no examples, or an example is empty, has padding, or has fields that do not fit; they
                do not fit into `pad_to`.
        """
        if isinstance(examples, Mapping):
            raise TypeError(
                f"examples must be a sequence of mappings, one for each example, got one {type(examples).__name__} of "
                "columns; give [{'input_ids': ids} for ids in columns['input_ids']]."
            )
        examples = list(_flat(examples))
        if not examples:
            raise ValueError("examples must hold at least one example, got none.")
        for index, example in enumerate(examples):
            _check_fields(index, example, examples[0])
        if self.keep_first_labels and "labels" not in examples[0]:
            raise ValueError(
                "keep_first_labels=True needs examples with labels; without, input_ids are the labels, as "
                "for causal language models, which would have to predict the first of every example."
            )
        columns = {
            name: [_values(index, name, example[name]) for index, example in enumerate(examples)]
            for name in examples[0]
        }
        labels_of_examples = _labels_of_examples(columns)
        lengths = [len(ids) for ids in columns["input_ids"]]
        for name, column in columns.items():
            for index, (values, length) in enumerate(zip(column, lengths, strict=True)):
                _check_values(index, name, values, length, self.start_position)
        columns.pop("attention_mask", None)

        for name in _INTEGERS:
            if name in columns:
                columns[name] = [values.long() for values in columns[name]]
        input_ids = torch.cat(columns.pop("input_ids"))
        labels = torch.cat(columns.pop("labels")) if "labels" in columns else input_ids.clone()
        if "position_ids" in columns:
            positions = torch.cat(columns.pop("position_ids"))
            jumps = positions[1:] != positions[:-1] + 1
            starts = torch.cat([jumps.new_ones(1), jumps]).nonzero().flatten()
        else:
            counts = torch.tensor(lengths, device=input_ids.device)
            starts = counts.cumsum(0) - counts
            positions = torch.arange(len(input_ids), device=input_ids.device) - starts.repeat_interleave(counts)
            positions += self.start_position
        if not self.keep_first_labels:
            labels[starts] = _IGNORED
        packed = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        packed |= {name: torch.cat(column) for name, column in columns.items()}
        batch = self._finished(packed, starts)
        return batch if labels_of_examples is None else batch | {"labels": labels_of_examples}

    def _finished(self, packed: dict[str, Tensor], starts: Tensor) -> dict[str, Any]:
        """Pad the row, and add what other kernels want to know of the sequences that begin at `starts`."""
        real = len(packed["input_ids"])
        dead = self._size(real) - real
        if self.pad_to is not None or self.pad_to_multiple_of is not None:
            packed["attention_mask"] = torch.ones_like(packed["input_ids"])
        if dead:
            filler = {"input_ids": self.pad_token_id, "labels": _IGNORED, "position_ids": self.start_position}
            for name, values in packed.items():
                packed[name] = torch.cat([values, values.new_full((dead,), filler.get(name, 0))])
            starts = torch.cat([starts, starts.new_tensor([real])])
        batch: dict[str, Any] = {name: values[None] for name, values in packed.items()}
        cu_seqlens = torch.cat([starts, starts.new_tensor([real + dead])])
        if self.return_seq_idx:
            index = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
            batch["seq_idx"] = index.repeat_interleave(cu_seqlens.diff())[None]
        if self.return_flash_attn_kwargs:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cu_seqlens.int()
            batch["max_length_q"] = batch["max_length_k"] = int(cu_seqlens.diff().max())
        return batch

    def _size(self, tokens: int) -> int:
        """The tokens of the row that holds `tokens` real ones."""
        if self.pad_to_multiple_of is not None:
            return -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.pad_to is not None and tokens > self.pad_to:
            raise ValueError(
                f"the examples hold {tokens} tokens, more than pad_to={self.pad_to}; give fewer, or raise pad_to to "
                "the capacity or token budget that they were chosen by."
            )
        return self.pad_to or tokens


def packed_row(collator: PackingCollator, examples: Sequence[Any]) -> dict[str, Tensor]:
    """Some examples as a row of a data set, each field (tokens,).

    Raises:
        ValueError: the examples have one label each, which are no field of a row.
    """
    batch = collator(examples)
    if batch["labels"].ndim == 1:
        raise ValueError(
            "examples with one label each cannot be packed beforehand, since rows hold one value per token; give the "
            "examples themselves to training, with PackingCollator as the data_collator."
        )
    return {name: values[0] for name, values in batch.items() if isinstance(values, Tensor) and values.ndim > 1}


def _flat(examples: Sequence[Any]) -> Iterator[Any]:
    """The examples one by one, out of bins where they come in bins."""
    for example in examples:
        if isinstance(example, (list, tuple)) and example and all(isinstance(part, Mapping) for part in example):
            yield from example
        else:
            yield example


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
            f"example {index} has {made[0]}, which packing decides; remove it, and ask the collator for it."
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


def _labels_of_examples(columns: dict[str, list[Tensor]]) -> Tensor | None:
    """Take the labels of whole examples out of the columns, (examples,); None: there are none."""
    names = columns.keys() & {"label", "labels"}
    if len(names) != 1 or any(values.ndim for values in columns[min(names)]):
        return None
    labels = torch.stack(columns.pop(min(names)))
    return labels if labels.is_floating_point() else labels.long()


def _check_values(index: int, name: str, values: Tensor, length: int, start_position: int) -> None:
    where = f"example {index}, field {name!r}"
    if values.ndim == 0:
        raise ValueError(
            f"{where} must hold one value per token, got the single value {values.item()}; remove it. Only the label "
            "of a whole example can be one value, as `label` or `labels` of every example."
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
    if name in _INTEGERS and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        raise TypeError(f"{where} must hold integers, got {values.dtype}; convert it.")
    if name == "attention_mask" and not bool((values == 1).all()):
        raise ValueError(
            f"{where} marks {int((values != 1).sum())} of {length} tokens as padding; tokenize with padding=False: "
            "packing needs none."
        )
    if name == "position_ids" and (values[0] != start_position or (values < start_position).any()):
        raise ValueError(
            f"{where} must begin at the start_position, {start_position}, and nowhere lie below it, got "
            f"{int(values[0])} first and {int(values.min())} as the least; a packed row begins with a whole example."
        )
