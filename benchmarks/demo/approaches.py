"""The four ways of the paper (arXiv 2407.09105) to make batches of examples of many lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packattn import PackingCollator

Batch = dict[str, Tensor]
Examples = Sequence[Sequence[int]]
_IGNORED = -100


def pad(examples: Examples) -> Batch:
    """One row an example, filled up to the longest."""
    rows = [torch.tensor(ids) for ids in examples]
    fill = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": fill(rows, batch_first=True),
        "attention_mask": fill([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": fill(rows, batch_first=True, padding_value=_IGNORED),
    }


def pack(examples: Examples) -> Batch:
    """All examples in one row, with position ids that restart."""
    return PackingCollator()([{"input_ids": ids} for ids in examples])


def pack_without_position_ids(examples: Examples) -> Batch:
    """All examples in one row, as if it were one text: each example sees those before it."""
    batch = pack(examples)
    del batch["position_ids"]
    return batch


def minibatches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Examples in order, `size` to a step."""
    return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Examples packed beforehand, each into the first row of at most `capacity` tokens that it fits; a row a step."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        slot = next((slot for slot, left in enumerate(room) if left >= length), len(bins))
        if slot == len(bins):
            bins.append([])
            room.append(capacity)
        bins[slot].append(index)
        room[slot] -= length
    return bins


@dataclass(frozen=True)
class Approach:
    """How examples become batches, and whether packattn isolates them.

    Attributes:
        offline: rows are packed beforehand from the whole data set; otherwise one mini-batch at a time.
        patched: the model is patched by packattn; otherwise it is plain transformers.
    """

    name: str
    colour: str
    collate: Callable[[Examples], Batch]
    offline: bool
    patched: bool

    def plan(self, lengths: Sequence[int], minibatch: int, capacity: int) -> list[list[int]]:
        """The indices of the examples of each optimiser step."""
        return first_fit(lengths, capacity) if self.offline else minibatches(lengths, minibatch)


# Okabe and Ito's palette, told apart by colour-blind readers too.
PADDING = Approach("padding", "#999999", pad, offline=False, patched=False)
NAIVE = Approach("packing without position ids", "#D55E00", pack_without_position_ids, offline=True, patched=False)
OFFLINE = Approach("offline packing + position ids", "#56B4E9", pack, offline=True, patched=True)
ONLINE = Approach("online packing + position ids", "#0072B2", pack, offline=False, patched=True)
APPROACHES = (PADDING, NAIVE, OFFLINE, ONLINE)
# What transformers makes of a packed batch by itself; not trained, only probed for leaks.
UNPATCHED = Approach("plain transformers, position ids", "#CC79A7", pack, offline=False, patched=False)
