"""PackingCollator: a mini-batch of examples, end to end in one row."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from packattn.data.examples import IGNORED, LABELS, Example, begins, check_same, read_example, without_first
from packattn.data.values import whole


@dataclass(frozen=True)
class PackingCollator:
    """Pack examples of any lengths into one row without padding; a `data_collator` for transformers' Trainer as it is.

    The boundaries are marked by `position_ids` that restart, so the model must keep the examples apart:
    `packattn.patch(model)`. The first label of each example is ignored, since the last token of the example before
    would have to predict it; so the labels that are not -100 are exactly the tokens predicted, and a mean over them is
    the mean over the examples run alone, weighted by their tokens. Models that do not shift their labels (masked
    language models, token classification) learn from the first token too: `keep_first_labels`. Models with one result
    per sequence (sequence classification) take examples with one `label` each. Tokens where a `completion_mask` or
    `assistant_masks` is 0 are no targets.

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
        mask_first: so many labels at the beginning of each sequence are ignored: k for a model whose heads predict up
            to k tokens ahead (multi-token prediction), since tokens of the sequence before would have to predict them.

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
    mask_first: int = 1

    def __post_init__(self) -> None:
        whole("start_position", self.start_position, 0)
        whole("pad_token_id", self.pad_token_id, 0)
        whole("mask_first", self.mask_first, 1)
        for name in ("pad_to", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        if self.pad_to is not None and self.pad_to_multiple_of is not None:
            raise ValueError("give pad_to or pad_to_multiple_of, not both.")
        if self.keep_first_labels and self.mask_first > 1:
            raise ValueError(f"give keep_first_labels=True or mask_first={self.mask_first}, not both.")

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Pack `examples`, in their order.

        Args:
            examples: mappings with the same fields, each field a list, tensor or array with one value per token; or
                lists of such mappings (the bins of a plan), which are taken one after another.
                input_ids: integers, at least one.
                labels: integers, optional; without them the labels are the input_ids, as for causal language models.
                    Or one number for the example. `label` and `label_ids` are other names of it.
                completion_mask, assistant_masks: optional, 0 where a token is no target, else 1; its label is -100.
                    Labels that are given beside a mask must agree with it.
                position_ids: integers, optional: the example is itself a packed row, whose positions say where its
                    sequences begin; or seq_lengths, the lengths of its sequences, as TRL packs.
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

        Warns:
            UserWarning: once, the first time that a row has no target.
        """
        if isinstance(examples, Mapping):
            raise TypeError(
                f"examples must be a sequence of mappings, one for each example, got one {type(examples).__name__} of "
                "columns; give [{'input_ids': ids} for ids in columns['input_ids']]."
            )
        found = _flat(examples)
        batch = self.joined([read_example(one, f"example {at}", self.start_position) for at, one in enumerate(found)])
        if batch["labels"].ndim > 1 and bool((batch["labels"] == IGNORED).all()) and not hasattr(self, "_warned"):
            object.__setattr__(self, "_warned", True)
            warnings.warn(
                "a batch has no target: all its labels are -100 (masked, or the first of an example), so it teaches "
                "nothing, and a mean over its targets is NaN. Leave out examples without a target. This is said once.",
                stacklevel=2,
            )
        return batch

    def joined(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Pack examples that were read, in their order; returns and raises as a call does."""
        if not examples:
            raise ValueError("examples must hold at least one example, got none.")
        for example in examples[1:]:
            check_same(example, examples[0])
        if self.keep_first_labels and not {*LABELS} & {*examples[0].fields}:
            raise ValueError(
                "keep_first_labels=True needs examples with labels; without, input_ids are the labels, as "
                "for causal language models, which would have to predict the first of every example."
            )
        packed = {name: torch.cat([example.columns[name] for example in examples]) for name in examples[0].columns}
        starts = begins(packed["position_ids"])
        packed["labels"] = without_first(packed["labels"], starts, self.ignored_first)
        batch = self._finished(packed, starts.nonzero().flatten())
        labels = [example.label for example in examples if example.label is not None]
        return batch | {"labels": torch.stack(labels)} if labels else batch

    @property
    def ignored_first(self) -> int:
        """The labels at the beginning of each sequence that are ignored."""
        return 0 if self.keep_first_labels else self.mask_first

    def _finished(self, packed: dict[str, Tensor], starts: Tensor) -> dict[str, Any]:
        """Pad the row, and add what other kernels want to know of the sequences that begin at `starts`."""
        real = len(packed["input_ids"])
        dead = self._size(real) - real
        if self.pad_to is not None or self.pad_to_multiple_of is not None:
            packed["attention_mask"] = torch.ones_like(packed["input_ids"])
        if dead:
            filler = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": self.start_position}
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


def packed_row(collator: PackingCollator, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Some examples as a row of a data set, each field (tokens,).

    Raises:
        ValueError: the examples have one label each, which are no field of a row.
    """
    batch = collator.joined(examples)
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
