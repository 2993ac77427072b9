"""Where packed sequences begin and end: the one home of the boundary rule.

A token begins a sequence when it is the first of its row or its position is not the previous position + 1. A token
whose attention_mask is 0 is padding: it belongs to no sequence, and after it a new one begins.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packattn import ops  # noqa: F401  (registers torch.ops.packattn)
from packattn.arguments import INTEGERS, described, whole

_MASKS = (torch.bool, *INTEGERS)
_MOST = 2**31 - 1  # tokens of a stream


class Boundaries(NamedTuple):
    """The sequences of a packed stream, as tensors of static size on the device of the position ids.

    Rows are flattened: token `col` of row `row` is element `row * n + col` of the stream.

    Attributes:
        seq_start: int32 (tokens,), the first token of each token's sequence; of padding, of its run of padding.
        seq_end: int32 (tokens,), one past the last token of each token's sequence; of padding its seq_start, so that
            it sees nothing.
        cu_seqlens: int32 (tokens + 1,), cumulative lengths of the sequences, the tail filled with their sum. They count
            the tokens that are not padding, as kernels of the flash-attn kind take them after unpadding; without
            padding they are where the sequences begin.
        summary: int32 (4,), number of sequences, longest length, number of holes, number of padding tokens.
    """

    seq_start: Tensor
    seq_end: Tensor
    cu_seqlens: Tensor
    summary: Tensor

    @property
    def num_seqs(self) -> Tensor:
        """Number of sequences: int32 ()."""
        return self.summary[0]

    @property
    def max_seqlen(self) -> Tensor:
        """Length of the longest sequence: int32 ()."""
        return self.summary[1]

    def exact_cu_seqlens(self) -> Tensor:
        """The cu_seqlens without the filled tail: int32 (num_seqs + 1,). Waits for the device to read one number."""
        return self.cu_seqlens[: int(self.num_seqs) + 1]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> "Boundaries":
        """Boundaries of sequences of the given lengths (ints >= 1), end to end.

        Raises:
            TypeError, ValueError: a length that is not such a number, by its index; 2**31 tokens or more in all.

        >>> Boundaries.from_lengths([2, 3]).seq_start.tolist()
        [0, 0, 2, 2, 2]
        """
        if not isinstance(lengths, Iterable) or isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a sequence of ints, got {described(lengths)}.")
        counts = [whole(f"lengths[{index}]", length, 1) for index, length in enumerate(lengths)]
        tokens = whole("the sum of lengths", sum(counts), 0, _MOST)
        cu_seqlens = torch.zeros(len(counts) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(counts, dtype=torch.int32), 0, dtype=torch.int32, out=cu_seqlens[1:])
        return cls.from_cu_seqlens(cu_seqlens.to(device), tokens=tokens)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, tokens: int) -> "Boundaries":
        """Boundaries of cumulative lengths, on their device, without reading them back.

        Args:
            cu_seqlens: int32 or int64 (n + 1,), from 0 to `tokens`, non-decreasing; equal neighbours (empty sequences,
                a filled tail) are allowed.
            tokens: the length of the stream, the last of cu_seqlens.

        Raises:
            TypeError, ValueError: an argument that is not as described.
            RuntimeError: the values of cu_seqlens are not as described, by an assertion on their device.
        """
        check_cu_seqlens("cu_seqlens", cu_seqlens)
        tokens = whole("tokens", tokens, 0, _MOST)
        steps = cu_seqlens.diff()
        valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (steps >= 0).all()
        torch._assert_async(valid, f"cu_seqlens must rise from 0 to tokens={tokens} without falling.")
        position_of = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        if cu_seqlens.numel() == 1:
            starts = ends = cu_seqlens.new_empty(0)
        else:
            index = torch.searchsorted(cu_seqlens[1:].contiguous(), position_of, right=True)
            starts, ends = cu_seqlens[index], cu_seqlens[index + 1]
        return cls(*_from_spans(starts.int(), ends.int()))


def check_cu_seqlens(name: str, cu_seqlens: object) -> None:
    """Refuse what is not an integer tensor of one dimension, with the end of the last sequence at least."""
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.ndim != 1
        or cu_seqlens.dtype not in INTEGERS
        or cu_seqlens.numel() == 0
    ):
        raise ValueError(
            f"{name} must be an integer tensor of shape (num_seqs + 1,), int32 or int64, got {described(cu_seqlens)}."
        )


def boundaries(position_ids: Tensor, attention_mask: Tensor | None = None) -> Boundaries:
    """Find the packed sequences in rows of position ids, on their device, without reading a value back.

    A sequence begins at the first token of a row and wherever the position is not the previous one + 1 (the rule by
    which transformers detects packing). Padding by `attention_mask` may stand before or after the sequences; a hole
    inside one is refused by an assertion on the device, since its mask is not a span.

    Args:
        position_ids: int32 or int64, (rows, n) or (n,); (1, n) is taken for every row of the attention_mask.
        attention_mask: bool, int32 or int64, (rows, n): nonzero for tokens, 0 for padding. None: no padding.

    Returns:
        Boundaries over the stream of rows * n tokens.

    Raises:
        TypeError: a dtype that cannot be a position or a mask.
        ValueError: shapes or devices that do not fit together.

    >>> boundaries(torch.tensor([0, 1, 2, 0, 1])).cu_seqlens.tolist()
    [0, 3, 5, 5, 5, 5]
    """
    found = unchecked_boundaries(position_ids, attention_mask)
    if attention_mask is not None:
        torch._assert_async(*no_hole(found))
    return found


def no_hole(found: Boundaries) -> tuple[Tensor, str]:
    """The condition that padding lies between sequences only, bool () on the device, and the message of its error."""
    message = (
        "attention_mask has a hole: padding inside a sequence whose positions continue after it. Such a mask is not "
        "one span of keys per token; move the padding before or after the sequence."
    )
    return found.summary[2] == 0, message


def unchecked_boundaries(position_ids: Tensor, attention_mask: Tensor | None = None) -> Boundaries:
    """As `boundaries`, with `no_hole` left to the caller."""
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in INTEGERS:
        raise TypeError(f"position_ids must be an int32 or int64 tensor, got {described(position_ids)}.")
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.ndim != 2:
        raise ValueError(
            f"position_ids must have shape (rows, n) or (n,), got {tuple(position_ids.shape)}; of positions with "
            "several planes (M-RoPE) give the plane that counts the text, or build the mask from lengths."
        )
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dtype not in _MASKS:
            raise TypeError(
                f"attention_mask must be a bool, int32 or int64 tensor, got {described(attention_mask)}; convert it "
                "with `attention_mask.bool()`."
            )
        if attention_mask.ndim == 1:
            attention_mask = attention_mask[None]
        if position_ids.shape[0] == 1 and attention_mask.ndim == 2:
            position_ids = position_ids.expand(attention_mask.shape[0], -1)
        if attention_mask.shape != position_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of position_ids, {tuple(position_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        if attention_mask.device != position_ids.device:
            raise ValueError(
                f"attention_mask must be on the device of position_ids, {position_ids.device}, got "
                f"{attention_mask.device}."
            )
    if position_ids.numel() > _MOST:
        raise ValueError(f"position_ids must hold fewer than 2**31 tokens, got {position_ids.numel()}.")
    return Boundaries(*torch.ops.packattn.boundaries(position_ids, attention_mask))


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Cumulative lengths of the packed sequences: int32 (tokens + 1,), the tail filled with `tokens`.

    Kernels of the flash-attn kind take the filled tail as empty sequences. Nothing is read back to the host;
    `boundaries(position_ids).exact_cu_seqlens()` cuts the tail off and has to wait for the device.

    >>> cu_seqlens_from_position_ids(torch.tensor([[0, 1, 0]])).tolist()
    [0, 2, 3, 3]
    """
    return boundaries(position_ids).cu_seqlens


def boundaries_torch(position_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `packattn::boundaries` in plain torch, for any device: no data-dependent shape, no sync."""
    rows, n = position_ids.shape
    if rows * n == 0:
        empty = torch.empty(0, dtype=torch.int32, device=position_ids.device)
        return empty, empty.clone(), empty.new_zeros(1), empty.new_zeros(4)
    jumps = torch.ones_like(position_ids, dtype=torch.bool)
    jumps[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    index = torch.arange(rows * n, device=position_ids.device, dtype=torch.int32)
    if attention_mask is None:
        return _from_spans(*_runs(jumps.flatten(), index))
    real = (attention_mask != 0).flatten()
    before = torch.cat([~real[:1], real[:-1]])  # whether the token before is real; the first token always changes it
    begin, end = _runs((jumps.flatten() & real) | (real != before), index)
    # A hole: the first real token after padding whose run of positions holds an earlier real token.
    run_start, _ = _runs(jumps.flatten(), index)
    last_real = torch.where(real, index, -1).cummax(0).values
    earlier = torch.cat([last_real.new_full((1,), -1), last_real[:-1]])
    holes = (real & ~before & (earlier >= run_start)).sum(dtype=torch.int32)
    return _from_spans(begin, torch.where(real, end, begin), holes)


def _runs(starts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of the run each element lies in, from a flag on the first element of every run."""
    begin = torch.where(starts, index, 0).cummax(0).values
    following = torch.where(starts, index, index.numel()).roll(-1)
    following[-1] = index.numel()
    return begin, following.flip(0).cummin(0).values.flip(0)


def _from_spans(begin: Tensor, end: Tensor, holes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = begin.numel()
    index = torch.arange(tokens, device=begin.device, dtype=torch.int32)
    real = end > begin
    starts = (begin == index) & real
    zero = torch.zeros(1, dtype=torch.int32, device=begin.device)
    before = torch.cat([zero, real.cumsum(0, dtype=torch.int32)])  # real tokens before each, and in all
    # Tokens that start nothing are scattered into the last slot with the value that it holds anyway.
    cu_seqlens = before[-1].repeat(tokens + 1)
    slot = torch.where(starts, starts.cumsum(0) - 1, tokens)
    cu_seqlens.scatter_(0, slot, torch.where(starts, before[:-1], before[-1]))
    summary = torch.stack(
        [
            starts.sum(dtype=torch.int32),
            (end - begin).amax() if tokens else zero[0],
            zero[0] if holes is None else holes,
            tokens - before[-1],
        ]
    )
    return begin, end, cu_seqlens, summary
