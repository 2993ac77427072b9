"""pack: lengths in, an index plan out. No token is read or copied."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from packattn import ops  # noqa: F401  (registers torch.ops.packattn)
from packattn.data.fit import LARGEST_CAPACITY, Bin, HistogramPlan, Limits, fit_histogram
from packattn.data.plan import PackingPlan, fingerprint
from packattn.data.values import lengths_tensor, whole

Method = Literal["mixed", "first-fit", "best-fit", "next-fit", "best-fit-decreasing"]
Overlong = Literal["error", "split", "drop"]
# The share of the tokens that "mixed" holds back, in its shortest examples, to fill what the others leave open. With a
# fifth, every real length set of benchmarks/lengths fills to 99.5 %, and bins differ no more than those of first-fit.
_HELD_BACK = 0.2


def pack(
    lengths: Iterable[int] | Tensor,
    capacity: int,
    *,
    method: Method = "mixed",
    seed: int | None = 0,
    max_per_bin: int | None = None,
    max_square: int | None = None,
    overlong: Overlong = "error",
    open_bins: int = 64,
) -> PackingPlan:
    """Put examples of the given lengths into bins of at most `capacity` tokens.

    Args:
        lengths: tokens of each example, integers of at least 1: a list, an array, a tensor, a column.
        capacity: tokens that a bin may hold, at most 2**24.
        method:
            "mixed": in random order, each into the bin that it fills best; but the shortest examples, a fifth of all
                tokens, come last and fill the gaps. Bins are full, and alike: long and short are mixed in each.
            "first-fit": in random order, each into the first bin where it fits. Alike, slightly less full.
            "best-fit": into the bin that it fills best among at most `open_bins` open ones; keeps near what was near.
            "next-fit": into the last bin or a new one. Keeps the order; fills worst.
            "best-fit-decreasing": longest first; fills best, but puts like with like: bins of one long example, bins
                of many short ones, of unequal attention work (Krell et al., 2021, on the histogram of the lengths).
        seed: shuffles the examples before packing and the bins afterwards; None keeps the order of the data.
        max_per_bin: sequences that a bin may hold. None: any number.
        max_square: the largest sum of squared lengths (attention work) that a bin may hold. None: any.
        overlong: what becomes of an example that no empty bin takes: "error"; "split" into pieces that fit, the tokens
            at a cut then lose their context; "drop". Both are counted in the plan.
        open_bins: for "best-fit" only.

    Raises:
        TypeError, ValueError: an argument or a length is not as described; the message names the example.

    >>> plan = pack([5, 3, 4, 2, 6], capacity=10, method="best-fit", seed=None)
    >>> [[piece.example for piece in bin] for bin in plan]
    [[0, 1, 3], [2, 4]]
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}.")
    limits = make_limits(capacity, max_per_bin, max_square)
    if method == "best-fit":
        whole("open_bins", open_bins, 1)
    if seed is not None:
        whole("seed", seed, 0)
    found = lengths_tensor(lengths)
    examples, starts, sizes, dropped = _cut(found, limits, overlong)
    if examples.numel() == 0:
        raise ValueError(f"all {found.numel()} examples are longer than {longest(limits)} tokens and were dropped.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if generator is not None:
        order = torch.randperm(examples.numel(), generator=generator)
        examples, sizes = examples[order], sizes[order]
        starts = None if starts is None else starts[order]
        del order
    bins, count = _walk(sizes, limits, method, open_bins)
    if generator is not None:
        bins = torch.randperm(count, generator=generator)[bins]
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(bins, minlength=count), 0, out=offsets[1:])
    by_bin = _sorted(bins)
    del bins
    return PackingPlan(
        capacity=capacity,
        offsets=offsets,
        examples=examples[by_bin],
        starts=None if starts is None else starts[by_bin],
        lengths=sizes[by_bin],
        dropped=dropped,
        dropped_tokens=int(found[dropped].sum()),
        fingerprint=fingerprint(found),
        made_by={
            "method": method, "seed": seed, "max_per_bin": max_per_bin, "max_square": max_square,
            "overlong": overlong, "open_bins": open_bins if method == "best-fit" else None,
        },
    )  # fmt: skip


def pack_histogram(
    counts: Mapping[int, int], capacity: int, *, max_per_bin: int | None = None, max_square: int | None = None
) -> HistogramPlan:
    """Bins for a corpus that is given as a histogram, {tokens: examples}, because it is too large to sort.

    The bins are those of `pack(method="best-fit-decreasing")`. Time depends on the number of different lengths only.
    `plan.compositions()` lists what the bins hold, `plan.assign(lengths)` says for the examples, part by part as they
    come, which bin each goes into.

    Raises:
        TypeError, ValueError: a length or count is not an integer, a length is below 1 or longer than a bin takes.

    >>> pack_histogram({6: 1, 5: 1, 4: 1, 3: 1, 2: 1}, capacity=10).compositions()
    [({6: 1, 4: 1}, 1), ({5: 1, 3: 1, 2: 1}, 1)]
    """
    limits = make_limits(capacity, max_per_bin, max_square)
    if not isinstance(counts, Mapping) or not counts:
        raise TypeError(f"counts must map lengths to numbers of examples, got {counts!r}.")
    for length, count in counts.items():
        whole("a length in counts", length, 1)
        whole(f"the count of length {length}", count, 0)
    if max(counts) > longest(limits):
        raise ValueError(
            f"counts hold examples of {max(counts)} tokens where a bin takes at most {longest(limits)}; count them "
            "apart, or raise the capacity."
        )
    if not any(counts.values()):
        raise ValueError("counts must hold at least one example, got none.")
    return fit_histogram({length: count for length, count in counts.items() if count}, limits)


def make_limits(capacity: int, max_per_bin: int | None, max_square: int | None) -> Limits:
    """The checked limits of a bin."""
    whole("capacity", capacity, 1, LARGEST_CAPACITY)
    for name, value in (("max_per_bin", max_per_bin), ("max_square", max_square)):
        if value is not None:
            whole(name, value, 1)
    return Limits(capacity, max_per_bin or 0, max_square or 0)


def longest(limits: Limits) -> int:
    """The longest example that an empty bin takes."""
    return Bin().room(limits)


def too_long_error(name: str, tokens: int, most: int, others: int = 0) -> ValueError:
    """What to raise for an example that no bin takes, and `others` like it."""
    more = f", and {others} more are too long" if others else ""
    return ValueError(
        f"{name} has {tokens} tokens where a bin takes at most {most}{more}; raise the capacity, or choose "
        'overlong="split" or overlong="drop".'
    )


def _cut(lengths: Tensor, limits: Limits, overlong: Overlong) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Examples, starts and lengths of the pieces to pack, and the examples that are dropped."""
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {overlong!r}.")
    most, examples = longest(limits), torch.arange(lengths.numel())
    too_long = (lengths > most).nonzero().flatten()
    none = examples[:0]
    if too_long.numel() == 0:
        return examples, None, lengths, none
    if overlong == "drop":
        kept = (lengths <= most).nonzero().flatten()
        return kept, None, lengths[kept], too_long
    if overlong == "split":
        pieces = (lengths + most - 1) // most
        examples = examples.repeat_interleave(pieces)
        starts = (torch.arange(examples.numel()) - (pieces.cumsum(0) - pieces)[examples]) * most
        return examples, starts, (lengths[examples] - starts).clamp(max=most), none
    first = int(too_long[0])
    raise too_long_error(f"example {first}", int(lengths[first]), most, too_long.numel() - 1)


def _walk(sizes: Tensor, limits: Limits, method: Method, open_bins: int) -> tuple[Tensor, int]:
    """The bin of each piece, and the number of bins."""
    if method == "best-fit-decreasing":
        counted = torch.bincount(sizes)
        counts = {int(size): int(counted[size]) for size in counted.nonzero().flatten()}
        plan = fit_histogram(counts, limits)
        return plan.assign(sizes), plan.num_bins
    if method == "mixed":
        counted = torch.bincount(sizes)
        shorter = (counted * torch.arange(counted.numel())).cumsum(0)
        late = sizes < int((shorter <= _HELD_BACK * shorter[-1]).sum())
        last = late.nonzero().flatten()
        order = torch.cat([late.logical_not().nonzero().flatten(), last[_sorted(-sizes[last])]])
        bins = torch.empty_like(sizes)
        bins[order] = torch.ops.packattn.pack_best_fit(sizes[order], *limits, 0)
    elif method == "first-fit":
        bins = torch.ops.packattn.pack_first_fit(sizes, *limits)
    else:
        bins = torch.ops.packattn.pack_best_fit(sizes, *limits, 1 if method == "next-fit" else open_bins)
    return bins, int(bins.max()) + 1


def _sorted(values: Tensor) -> Tensor:
    """The order that sorts `values`, equal ones as they came; 32 bits sort in half the time."""
    return values.int().argsort(stable=True) if values.numel() < 2**31 else values.argsort(stable=True)
