"""PackedMask: what each token of a packed stream may see, as one contiguous span of keys per query."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from packattn.arguments import INTEGERS, described, whole
from packattn.boundaries import Boundaries
from packattn.errors import UnsupportedMaskError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST_DENSE = 16_384
_MOST = 2**31 - 1  # what int32 holds: a window or chunk beyond is as wide as any stream
_BLOCKS = (torch.int8, torch.int16, *INTEGERS)


class LaunchOrder(NamedTuple):
    """The order in which GPU kernels launch their tiles, and whose tiles they are: those of another shape differ.

    Attributes:
        tiles: int32, those of the forward pass, dQ and dK/dV, end to end.
        group: query heads of a key head.
        head_dim: the larger of those of q and v.
        dtype: of q.
    """

    tiles: Tensor
    group: int
    head_dim: int
    dtype: torch.dtype


class PackedMask(NamedTuple):
    """Query i sees the keys `k_start[i] <= j < k_end[i]`; both ends never decrease along the stream.

    Because they never decrease, the transpose is a span too: key j is seen by the queries
    `q_start[j] <= i < q_end[j]`. These four vectors are all that the kernels know of sequences, causality and windows.
    Padding sees nothing and is seen by nothing; its output is 0.

    Attributes:
        k_start, k_end: int32 (tokens,), contiguous.
        q_start, q_end: int32 (tokens_k,), contiguous.
        order: the order in which GPU kernels launch their tiles (packattn.schedule); None: as they lie.
    """

    k_start: Tensor
    k_end: Tensor
    q_start: Tensor
    q_end: Tensor
    order: LaunchOrder | None = None

    @classmethod
    def causal(
        cls,
        boundaries: Boundaries | None = None,
        *,
        lengths: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        tokens: int | None = None,
        window: int | None = None,
        blocks: Tensor | None = None,
    ) -> "PackedMask":
        """Each token sees itself and what came before it in its sequence.

        Give one of: boundaries; lengths (ints, end to end); cu_seqlens (int, (n + 1,)) with tokens, its last value.

        Args:
            window: tokens visible, the token itself included: `i - window + 1 <= j`. None: all.
            blocks: signed int (tokens,): runs of equal values >= 0 within a sequence see each other in both directions
                (the prefix of a prefix-LM, the tokens of an image); negative values are causal.

        Raises:
            TypeError, ValueError: an argument that does not fit, named.
            UnsupportedMaskError: blocks are not such a tensor.

        >>> PackedMask.causal(lengths=[2, 3]).k_start.tolist()
        [0, 0, 2, 2, 2]
        """
        found = _one_source(boundaries, lengths, cu_seqlens, tokens)
        index = _index(found)
        start, end = found.seq_start, index + 1
        if window is not None:
            # By the distance to the start, which no window makes overflow.
            start = index - (index - start).clamp(max=min(whole("window", window, 1), _MOST) - 1)
        if blocks is not None:
            end = torch.maximum(end, _block_ends(found, index, blocks))
        return cls._within(found, start, end)

    @classmethod
    def bidirectional(
        cls,
        boundaries: Boundaries | None = None,
        *,
        lengths: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        tokens: int | None = None,
        window: int | None = None,
    ) -> "PackedMask":
        """Each token sees its whole sequence, or the tokens at a distance of at most `window`. Sources as in causal.

        >>> PackedMask.bidirectional(lengths=[2, 3]).k_end.tolist()
        [2, 2, 5, 5, 5]
        """
        found = _one_source(boundaries, lengths, cu_seqlens, tokens)
        index = _index(found)
        start, end = found.seq_start, found.seq_end
        if window is not None:
            reach = min(whole("window", window, 0), _MOST - 1)
            start = index - (index - start).clamp(max=reach)
            end = index + (end - index).clamp(max=reach + 1)
        return cls._within(found, start, end)

    @classmethod
    def chunked(cls, boundaries: Boundaries, chunk_size: int, position_ids: Tensor) -> "PackedMask":
        """Causal attention within chunks of positions, as Llama 4: token i sees back to `i - position % chunk_size`.

        Args:
            position_ids: int32 or int64, as many elements as the stream has tokens.

        Raises:
            TypeError, ValueError: an argument that does not fit, named.
        """
        index = _index(_checked(boundaries))
        if not isinstance(position_ids, Tensor) or position_ids.dtype not in INTEGERS:
            raise TypeError(f"position_ids must be an int32 or int64 tensor, got {described(position_ids)}.")
        if position_ids.numel() != index.numel() or position_ids.device != index.device:
            raise ValueError(
                f"position_ids must hold one position for each of the {index.numel()} tokens, on {index.device}, got "
                f"{described(position_ids)}."
            )
        inside = position_ids.reshape(-1) % min(whole("chunk_size", chunk_size, 1), _MOST)
        return cls._within(boundaries, torch.maximum(boundaries.seq_start, index - inside.int()), index + 1)

    @classmethod
    def from_spans(cls, k_start: Tensor, k_end: Tensor, tokens_k: int) -> "PackedMask":
        """A mask from explicit spans, also over keys of another stream; empty spans are allowed.

        Args:
            k_start, k_end: int32 (tokens,): `0 <= k_start <= k_end <= tokens_k`, neither ever decreasing. These are
                checked by an assertion on the device.
            tokens_k: number of keys.

        Raises:
            TypeError, ValueError: an argument that does not fit, named.
            RuntimeError: the values of the spans are not as described, by an assertion on their device.
        """
        tokens_k = whole("tokens_k", tokens_k, 0, _MOST)
        for name, span in (("k_start", k_start), ("k_end", k_end)):
            if not isinstance(span, Tensor) or span.dtype != torch.int32 or span.ndim != 1:
                raise ValueError(f"{name} must be an int32 tensor of shape (tokens,), got {described(span)}.")
            if span.shape != k_start.shape or span.device != k_start.device:
                raise ValueError(f"{name} must be as k_start, {described(k_start)}, got {described(span)}.")
        valid = (
            (k_start >= 0).all()
            & (k_start <= k_end).all()
            & (k_end <= tokens_k).all()
            & (k_start.diff() >= 0).all()
            & (k_end.diff() >= 0).all()
        )
        torch._assert_async(valid, f"spans must satisfy 0 <= k_start <= k_end <= {tokens_k} and never decrease.")
        return cls._transposed(k_start.contiguous(), k_end.contiguous(), tokens_k)

    @classmethod
    def _within(cls, found: Boundaries, k_start: Tensor, k_end: Tensor) -> "PackedMask":
        """Spans that hold their own token, except for padding, whose sequence is empty."""
        k_end = torch.minimum(k_end, found.seq_end)
        return cls._transposed(torch.minimum(k_start, k_end), k_end, k_end.numel())

    @classmethod
    def _transposed(cls, k_start: Tensor, k_end: Tensor, tokens_k: int) -> "PackedMask":
        keys = torch.arange(tokens_k, dtype=torch.int32, device=k_start.device)
        q_start = torch.searchsorted(k_end, keys, right=True, out_int32=True)
        q_end = torch.searchsorted(k_start, keys, right=True, out_int32=True)
        return cls(k_start, k_end, q_start, q_end)

    @property
    def tokens(self) -> int:
        """Number of queries."""
        return self.k_start.shape[0]

    @property
    def tokens_k(self) -> int:
        """Number of keys."""
        return self.q_start.shape[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the dense mask that this stands for, (1, 1, tokens, tokens_k), as transformers reads it."""
        return (1, 1, self.tokens, self.tokens_k)

    @property
    def ndim(self) -> int:
        """4, as of the dense mask that this stands for."""
        return 4

    def to_dense(self) -> Tensor:
        """The mask as bool (tokens, tokens_k), for small streams: pictures and tests.

        Raises:
            ValueError: more than 16,384 queries or keys.
        """
        if max(self.tokens, self.tokens_k) > _LARGEST_DENSE:
            raise ValueError(
                f"to_dense is for streams of at most {_LARGEST_DENSE} tokens, got {self.tokens} queries and "
                f"{self.tokens_k} keys; the kernels never need it."
            )
        keys = torch.arange(self.tokens_k, device=self.k_start.device)
        return (self.k_start[:, None] <= keys) & (keys < self.k_end[:, None])

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the mask, queries down and keys across, one colour per key sequence; write the picture to `path` where
        it is given.

        Args:
            path: a file; its ending says the format.
            ax: matplotlib axes to draw on; None: a figure of its own.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: path or ax is something else.
            ValueError: more than 16,384 queries or keys.
        """
        from packattn.plot import plot_mask

        return plot_mask(self, path, ax)

    def __repr__(self) -> str:
        sizes = f"queries={self.tokens}, keys={self.tokens_k}"
        if type(self.k_start) is not Tensor or self.tokens == 0:
            return f"PackedMask({sizes}, device={self.k_start.device})"
        spans = self.k_end - self.k_start
        pairs = int(spans.sum(dtype=torch.int64))
        share = pairs / max(self.tokens * self.tokens_k, 1)
        return (
            f"PackedMask({sizes}, pairs={pairs} ({share:.1%} of dense), longest span={int(spans.max())}, "
            f"device={self.k_start.device})"
        )


def _one_source(
    boundaries: Boundaries | None, lengths: Sequence[int] | None, cu_seqlens: Tensor | None, tokens: int | None
) -> Boundaries:
    given = [
        name
        for name, value in (("boundaries", boundaries), ("lengths", lengths), ("cu_seqlens", cu_seqlens))
        if value is not None
    ]
    if len(given) != 1 or (tokens is None) != (cu_seqlens is None):
        raise ValueError(
            "give exactly one of boundaries, lengths, or cu_seqlens with tokens; got "
            f"{', '.join(given) or 'none'}{'' if tokens is None else ' and tokens'}."
        )
    if boundaries is not None:
        return _checked(boundaries)
    if lengths is not None:
        return Boundaries.from_lengths(lengths)
    assert cu_seqlens is not None
    assert tokens is not None
    return Boundaries.from_cu_seqlens(cu_seqlens, tokens)


def _checked(boundaries: object) -> Boundaries:
    if not isinstance(boundaries, Boundaries):
        raise TypeError(
            f"boundaries must be what packattn.boundaries returns, got {described(boundaries)}; lengths and cu_seqlens "
            "are given by name."
        )
    return boundaries


def _index(boundaries: Boundaries) -> Tensor:
    return torch.arange(boundaries.seq_start.numel(), dtype=torch.int32, device=boundaries.seq_start.device)


def block_starts(boundaries: Boundaries, index: Tensor, blocks: Tensor) -> Tensor:
    """Where a run of equal values of `blocks` begins within its sequence: bool (tokens,)."""
    changes = boundaries.seq_start == index
    changes[1:] |= blocks[1:] != blocks[:-1]
    return changes


def _block_ends(boundaries: Boundaries, index: Tensor, blocks: Tensor) -> Tensor:
    """One past the last token of each token's bidirectional block, 0 for causal tokens: int32 (tokens,)."""
    if (
        not isinstance(blocks, Tensor)
        or blocks.dtype not in _BLOCKS
        or blocks.shape != index.shape
        or blocks.device != index.device
    ):
        raise UnsupportedMaskError(
            f"blocks must be an int tensor of shape ({index.numel()},) on {index.device}, signed, since tokens of no "
            f"block are negative (of a bool mask: torch.where(mask, 0, -1)), got {described(blocks)}."
        )
    changes = block_starts(boundaries, index, blocks)
    ends = torch.where(changes, index, index.numel()).roll(-1)
    ends[-1:] = index.numel()
    ends = ends.flip(0).cummin(0).values.flip(0)
    return torch.where(blocks >= 0, ends, 0)
