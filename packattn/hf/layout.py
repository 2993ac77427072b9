"""Packed rows as one row per sequence: for layers that mix along the row and know no boundaries.

Such a layer is run on its sequences laid out as rows, in groups of similar or equal length, and the results are put
back in the places of the packed stream. Both ways are one gather, so that gradients are exact.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from packattn.boundaries import boundaries
from packattn.hf.cache import CACHES
from packattn.hf.inputs import OF_SEQUENCES
from packattn.mask import PackedMask

# Rows of a group are padded to its longest; the share of padding in a group stays below this.
_PADDING = 0.2


class Layout:
    """Where the sequences of a packed batch lie, on the host.

    Args:
        starts, lengths: of every sequence, in tokens of the flattened rows; padding belongs to none.
        firsts: position of the first token of every sequence.
        rows, n: shape of the batch. device: of its tensors.
    """

    def __init__(
        self, starts: list[int], lengths: list[int], firsts: list[int], rows: int, n: int, device: torch.device
    ) -> None:
        self.starts, self.lengths, self.firsts = starts, lengths, firsts
        self.rows, self.n, self.device = rows, n, device

    @classmethod
    def of(cls, position_ids: Tensor, real: Tensor | None) -> "Layout":
        """Read the boundaries back from the device: waits for it."""
        rows, n = position_ids.shape
        found = boundaries(position_ids, real)
        starts = torch.unique_consecutive(found.seq_start[found.seq_end > found.seq_start]).long()
        spans = torch.stack([starts, found.seq_end[starts] - starts, position_ids.flatten()[starts]])
        begin, lengths, firsts = spans.tolist()
        return cls(begin, lengths, firsts, rows, n, position_ids.device)

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one sequence."""
        return len({start // self.n for start in self.starts}) < len(self.starts)

    @property
    def full(self) -> bool:
        """Whether every row is one sequence from end to end."""
        return len(self.starts) == self.rows and all(length == self.n for length in self.lengths)

    @cached_property
    def equal(self) -> list["Group"]:
        """Groups of sequences of the same positions: no padding at all, and the same longest position."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, kind in enumerate(zip(self.lengths, self.firsts, strict=True)):
            groups.setdefault(kind, []).append(i)
        return [self._group(members) for members in groups.values()]

    @cached_property
    def alone(self) -> list["Group"]:
        """Groups of one sequence each: nothing can mix over the batch."""
        return [self._group([i]) for i in range(len(self.lengths))]

    @cached_property
    def similar(self) -> list["Group"]:
        """Groups of sequences of similar length, padded on the right."""
        groups: list[list[int]] = []
        for i in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            group = groups[-1] if groups else []
            longest = self.lengths[group[0]] if group else 0
            tokens = sum(self.lengths[j] for j in group) + self.lengths[i]
            if group and 1 - tokens / (longest * (len(group) + 1)) <= _PADDING:
                group.append(i)
            else:
                groups.append([i])
        return [self._group(group) for group in groups]

    @cached_property
    def one(self) -> list["Group"]:
        """All sequences in one group, in their order, padded on the right."""
        return [self._group(list(range(len(self.lengths))))]

    def _group(self, members: list[int]) -> "Group":
        length = max(self.lengths[i] for i in members)
        starts = torch.tensor([self.starts[i] for i in members], device=self.device)[:, None]
        counts = torch.tensor([self.lengths[i] for i in members], device=self.device)[:, None]
        offset = torch.arange(length, device=self.device)
        return Group(self, members, torch.where(offset < counts, starts + offset, self.rows * self.n))


class Group:
    """Some sequences of a layout as rows.

    Attributes:
        members: their numbers. index: int64 (sequences, length), the tokens of the stream; rows * n for padding.
    """

    def __init__(self, layout: Layout, members: list[int], index: Tensor) -> None:
        self.layout, self.members, self.index = layout, members, index

    @property
    def real(self) -> Tensor:
        """bool (sequences, length): False for padding."""
        return self.index < self.layout.rows * self.layout.n

    def take(self, x: Tensor, fill: float = 0) -> Tensor:
        """(rows, n, ...) -> (sequences, length, ...), padding filled."""
        flat = x.expand(self.layout.rows, *x.shape[1:]).flatten(0, 1)
        flat = torch.cat([flat, flat.new_full((1, *flat.shape[1:]), fill)])
        return flat[self.index]

    def argument(self, name: str, value: Any, whole: bool = False) -> Any:
        """What a layer gets in place of an argument that was made for the packed rows.

        Args:
            whole: the layer is a whole model: masks other than attention_mask are inputs of their own.

        Raises:
            NotImplementedError: a tensor that does not hold one value per token.
        """
        rows, n = self.layout.rows, self.layout.n
        if name.endswith("mask") and (value is None or isinstance(value, (Tensor, PackedMask))):
            if value is None or name == "attention_mask" or not whole:
                return None  # the rows hold what it said
            if value.shape in ((rows, n), (1, n)):
                return self.take(value)
            raise self._no_token(name, value)
        if name in OF_SEQUENCES:
            return None  # every row is one sequence
        if isinstance(value, Cache) or name in ("use_cache", *CACHES):
            return False if name == "use_cache" else None
        if isinstance(value, (tuple, list)):
            return type(value)(self.argument(name, part) for part in value)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.ndim >= 2 and value.shape[0] in (rows, 1) and value.shape[1] == n:
            return self.take(value)
        if value.ndim == 3 and value.shape[1] in (rows, 1) and value.shape[2] == n:  # planes of positions
            return torch.stack([self.take(plane) for plane in value])
        if value.shape == (n,):  # a count of the row's tokens
            return torch.arange(self.index.shape[1], device=value.device, dtype=value.dtype)
        raise self._no_token(name, value)

    def _no_token(self, name: str, value: Any) -> NotImplementedError:
        return NotImplementedError(
            f"{name} of shape {tuple(value.shape)} does not hold one value for each of {self.layout.rows} x "
            f"{self.layout.n} packed tokens, so that packattn cannot lay it out by sequence. Leave it out, or train "
            "this model unpacked."
        )


def by_group(
    layout: Layout,
    groups: list[Group],
    call: Callable[[Group], Any],
    pooled: bool = False,
    per_token: dict[str, bool] | None = None,
) -> Any:
    """Call a layer on every group, and put what it returns back in the places of the packed rows.

    Tensors with one value per token, (sequences, length, ...), come back as (rows, n, ...), padding as zeros; tensors
    with one value per sequence as (sequences, ...), in the order of the stream; caches as None; a loss as the mean over
    all sequences. With `pooled`, the result (or the logits among several) is one value per sequence whatever its shape.

    Args:
        per_token: of a layer that nothing is known of: by the name of an output, whether it holds one value per token,
            as calls whose lengths tell it have shown; completed here. Such a layer gives no loss.
    """
    results = [call(group) for group in groups]
    tokens = torch.cat([group.index.flatten() for group in groups])
    back = torch.full((layout.rows * layout.n + 1,), tokens.numel(), device=layout.device)
    back[tokens] = torch.arange(tokens.numel(), device=layout.device)
    sequences = torch.tensor([i for group in groups for i in group.members], device=layout.device).argsort()

    def put_back(parts: list[Any], name: str) -> Any:
        first = parts[0]
        if first is None or isinstance(first, Cache) or name == "mems":  # the cache of XLNet
            return None
        if isinstance(first, Mapping):
            return type(first)(**{key: put_back([part[key] for part in parts], key) for key in first})
        if isinstance(first, (tuple, list)):
            names = [name if per_token is None else f"{name}[{i}]" for i in range(len(first))]
            return type(first)(put_back(list(each), n) for n, *each in zip(names, *parts, strict=True))
        if name == "loss" and isinstance(first, Tensor) and first.ndim == 0 and per_token is None:
            # A mean over the sequences of its group.
            return sum(part * len(group.members) for part, group in zip(parts, groups, strict=True)) / len(sequences)
        if name == "pooler_output" or (pooled and name in ("output", "logits")):
            return torch.cat(parts)[sequences]
        shapes = [group.index.shape for group in groups]
        if all(isinstance(part, Tensor) for part in parts):
            by_token = all(
                p.shape[:2] == n and p.shape[2:] == first.shape[2:] for p, n in zip(parts, shapes, strict=True)
            )
            if by_token and per_token is not None:
                by_token = _tells(name, {shape[1] for shape in shapes}, per_token)
            if by_token:
                flat = torch.cat([part.flatten(0, 1) for part in parts])
            elif (per_token or {}).get(name, True) and all(
                part.shape[:1] == (shape.numel(),) for part, shape in zip(parts, shapes, strict=True)
            ):
                flat = torch.cat(parts)
            elif all(p.ndim <= 2 and p.shape[:1] == shape[:1] for p, shape in zip(parts, shapes, strict=True)):
                if per_token is not None:
                    per_token[name] = False
                return torch.cat(parts)[sequences]
            else:
                raise _unknown(name, first)
            flat = torch.cat([flat, flat.new_zeros((1, *flat.shape[1:]))])[back[:-1]]
            return flat if parts[0].shape[:2] != shapes[0] else flat.view(layout.rows, layout.n, *flat.shape[1:])
        raise _unknown(name, first)

    return put_back(results, "output")


def _tells(name: str, lengths: set[int], per_token: dict[str, bool]) -> bool:
    """Whether an output as wide as the sequences are long holds one value per token: several lengths tell it."""
    if len(lengths) > 1:
        per_token[name] = True
    if name not in per_token:
        raise NotImplementedError(
            f"{name} is as wide as all sequences of this row are long ({lengths.pop()}), so that it may hold one value "
            "per token or several per sequence, which packattn does not guess of a model that it does not know. Run a "
            "row with sequences of several lengths first, or vouch for the class: packattn.patch(model, trusted=[...])."
        )
    return per_token[name]


def _unknown(name: str, value: Any) -> NotImplementedError:
    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    return NotImplementedError(
        f"{name} of {what} holds neither one value per token nor one per sequence, so that packattn cannot put it back "
        "into packed rows. Train this model unpacked."
    )
