"""The walks that fill bins, on lengths alone: first-fit and best-fit in order, best-fit-decreasing on a histogram.

All limits of a bin fold into one number, its room: the longest sequence that it can still take. csrc/packing.cpp has
the first two walks in C++ (5 to 20 million lengths a second), and tests hold them to each other.
"""

import bisect
import itertools
import math
from collections import deque
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

LARGEST_CAPACITY = 2**24
_T = TypeVar("_T")


class Limits(NamedTuple):
    """What a bin may hold; 0 is no limit.

    Attributes:
        capacity: tokens.
        max_per_bin: sequences.
        max_square: sum of squared lengths, which is what attention costs.
    """

    capacity: int
    max_per_bin: int = 0
    max_square: int = 0


class Bin(NamedTuple):
    """What a bin holds: tokens, sum of squared lengths, sequences."""

    tokens: int = 0
    square: int = 0
    sequences: int = 0

    def plus(self, length: int, times: int = 1) -> "Bin":
        """The bin with `times` more sequences of this length."""
        return Bin(self.tokens + times * length, self.square + times * length * length, self.sequences + times)

    def room(self, limits: Limits) -> int:
        """The longest sequence that the bin can still take; 0 if none."""
        if limits.max_per_bin and self.sequences >= limits.max_per_bin:
            return 0
        left = limits.capacity - self.tokens
        return min(left, math.isqrt(limits.max_square - self.square)) if limits.max_square else left

    def times(self, length: int, limits: Limits) -> int:
        """How many sequences of this length the bin can still take."""
        bounds = [(limits.capacity - self.tokens) // length]
        if limits.max_square:
            bounds.append((limits.max_square - self.square) // (length * length))
        if limits.max_per_bin:
            bounds.append(limits.max_per_bin - self.sequences)
        return min(bounds)


class _ByRoom(Generic[_T]):
    """Things in order of their room; of the same room, first in first out."""

    def __init__(self) -> None:
        self.rooms: list[int] = []
        self.queues: dict[int, deque[_T]] = {}

    def push(self, room: int, thing: _T) -> None:
        if room not in self.queues:
            bisect.insort(self.rooms, room)
            self.queues[room] = deque()
        self.queues[room].append(thing)

    def pop(self, room: int) -> _T | None:
        """Take out the oldest thing of the smallest room that is at least `room`."""
        at = bisect.bisect_left(self.rooms, room)
        if at == len(self.rooms):
            return None
        found = self.rooms[at]
        thing = self.queues[found].popleft()
        if not self.queues[found]:
            del self.rooms[at], self.queues[found]
        return thing


class BestFit:
    """Best-fit, one length at a time, with at most `open_bins` open bins (0: any number; 1: next-fit).

    A length goes into the open bin that it fills best. If it fits in none and no further bin may be open, the fullest
    is closed.
    """

    def __init__(self, limits: Limits, open_bins: int = 0) -> None:
        self.limits, self.open_bins = limits, open_bins
        self.opened = 0
        self.bins: dict[int, Bin] = {}
        self._by_room: _ByRoom[int] = _ByRoom()

    def place(self, length: int) -> tuple[int, list[int]]:
        """The bin that takes this length, and the bins that are closed from now on, in that order."""
        closed = []
        bin_ = self._by_room.pop(length)
        if bin_ is None:
            if self.open_bins and len(self.bins) == self.open_bins:
                fullest = self._by_room.pop(1)
                assert fullest is not None
                del self.bins[fullest]
                closed.append(fullest)
            bin_ = self.opened
            self.opened += 1
            self.bins[bin_] = Bin()
        self.bins[bin_] = self.bins[bin_].plus(length)
        room = self.bins[bin_].room(self.limits)
        if room:
            self._by_room.push(room, bin_)
        else:
            del self.bins[bin_]
            closed.append(bin_)
        return bin_, closed


def best_fit(lengths: Tensor, capacity: int, max_per_bin: int, max_square: int, open_bins: int) -> Tensor:
    """The operator `packattn::pack_best_fit` in Python: the bin of each length, int64 (n,)."""
    walk = BestFit(Limits(capacity, max_per_bin, max_square), open_bins)
    return torch.tensor([walk.place(length)[0] for length in lengths.tolist()], dtype=torch.int64)


def first_fit(lengths: Tensor, capacity: int, max_per_bin: int, max_square: int) -> Tensor:
    """The operator `packattn::pack_first_fit` in Python: the bin of each length, int64 (n,)."""
    limits = Limits(capacity, max_per_bin, max_square)
    leaves = 1 << max(lengths.numel() - 1, 1).bit_length()
    largest = [0] * (2 * leaves)
    bins: list[Bin] = []
    taken = []
    for length in lengths.tolist():
        if largest[1] < length:
            bin_ = len(bins)
            bins.append(Bin())
        else:
            node = 1
            while node < leaves:
                node = 2 * node + (largest[2 * node] < length)
            bin_ = node - leaves
        bins[bin_] = bins[bin_].plus(length)
        node = leaves + bin_
        largest[node] = bins[bin_].room(limits)
        while node := node >> 1:
            largest[node] = max(largest[2 * node], largest[2 * node + 1])
        taken.append(bin_)
    return torch.tensor(taken, dtype=torch.int64)


class HistogramPlan(NamedTuple):
    """Bins for a histogram of lengths: placement i puts `per_bin[i]` sequences of `length[i]` tokens into each of the
    `bins[i]` bins that begin at bin `first[i]`, except that the last bin of a length's last placement may take fewer.

    Attributes:
        limits: what a bin may hold.
        length, first, bins, per_bin: int64 (placements,), lengths from long to short.
        num_bins: bins in all.
    """

    limits: Limits
    length: Tensor
    first: Tensor
    bins: Tensor
    per_bin: Tensor
    num_bins: int

    @property
    def tokens(self) -> int:
        """Tokens in all bins."""
        return int((self.length * self.bins * self.per_bin).sum())

    @property
    def fill(self) -> float:
        """Tokens in the bins over the tokens that they could hold."""
        return self.tokens / (self.num_bins * self.limits.capacity)

    def compositions(self) -> list[tuple[dict[int, int], int]]:
        """What the bins hold: pairs of {length: sequences} and the number of bins that hold just this."""
        starts = sorted({*self.first.tolist(), *(self.first + self.bins).tolist(), self.num_bins})
        holds: dict[int, dict[int, int]] = {start: {} for start in starts}
        rows = zip(self.length.tolist(), self.first.tolist(), self.bins.tolist(), self.per_bin.tolist(), strict=True)
        for length, first, bins, per_bin in rows:
            at = bisect.bisect_left(starts, first)
            while starts[at] < first + bins:
                holds[starts[at]][length] = holds[starts[at]].get(length, 0) + per_bin
                at += 1
        return [(holds[begin], end - begin) for begin, end in itertools.pairwise(starts)]

    def assign(self, lengths: Tensor, seen: dict[int, int] | None = None) -> Tensor:
        """The bin of each length, int64 (n,): the i-th sequence of a length takes that length's i-th place.

        Args:
            lengths: int64 (n,), a part or all of what was counted.
            seen: how many sequences of each length came before, updated here; for a corpus that comes in parts.

        Raises:
            ValueError: there are more sequences of a length than the histogram counted.
        """
        seen = {} if seen is None else seen
        order = lengths.int().argsort(stable=True)
        values, counts = torch.unique_consecutive(lengths[order], return_counts=True)
        places = self.bins * self.per_bin
        before_placement = places.cumsum(0) - places
        begin: dict[int, int] = {}
        total: dict[int, int] = {}
        for length, before, count in zip(self.length.tolist(), before_placement.tolist(), places.tolist(), strict=True):
            begin.setdefault(length, before)
            total[length] = total.get(length, 0) + count
        wanted = torch.empty_like(counts)
        for at, (value, count) in enumerate(zip(values.tolist(), counts.tolist(), strict=True)):
            done = seen.get(value, 0)
            if done + count > total.get(value, 0):
                raise ValueError(
                    f"lengths hold at least {done + count} sequences of {value} tokens, the histogram "
                    f"{total.get(value, 0)}; make the plan from the histogram of these lengths."
                )
            wanted[at] = begin[value] + done
            seen[value] = done + count
        within = torch.arange(lengths.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = wanted.repeat_interleave(counts) + within
        placement = torch.searchsorted(before_placement, place, right=True) - 1
        taken = torch.empty_like(lengths)
        taken[order] = self.first[placement] + (place - before_placement[placement]) // self.per_bin[placement]
        return taken


def fit_histogram(counts: dict[int, int], limits: Limits) -> HistogramPlan:
    """Best-fit-decreasing on counted lengths: time and memory depend on the different lengths, not on the sequences.

    It is the longest-pack-first histogram packing of Krell et al. (2021, arXiv 2107.02027). The longest sequences come
    first, each into the bin that it fills best; bins with the same content are one group, and a group takes a whole
    count at once. A group only ever splits, so a group's bins are neighbours.
    """
    groups: _ByRoom[tuple[int, int, Bin]] = _ByRoom()
    placements: list[tuple[int, int, int, int]] = []
    opened = 0

    def fill(length: int, first: int, bins: int, per_bin: int, content: Bin) -> None:
        if bins and per_bin:
            placements.append((length, first, bins, per_bin))
        after = content.plus(length, per_bin)
        if bins and (room := after.room(limits)):
            groups.push(room, (first, bins, after))

    for size in sorted(counts, reverse=True):
        left = counts[size]
        while left:
            group = groups.pop(size)
            if group is None:
                group = opened, -(-left // Bin().times(size, limits)), Bin()
                opened += group[1]
            begin, count, content = group
            times = content.times(size, limits)
            whole = min(count, left // times)
            left -= whole * times
            fill(size, begin, whole, times, content)
            partial = int(whole < count and left > 0)
            fill(size, begin + whole, partial, left, content)
            fill(size, begin + whole + partial, count - whole - partial, 0, content)
            left = 0 if partial else left
    length, first, bins, per_bin = torch.tensor(placements, dtype=torch.int64).T.contiguous()
    return HistogramPlan(limits, length, first, bins, per_bin, opened)
