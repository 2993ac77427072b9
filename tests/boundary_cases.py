"""Rows of position ids for the tests of the boundary rule, and the rule as a plain loop."""

from itertools import accumulate

import torch


def obvious(position_ids, attention_mask=None):
    """seq_start, seq_end, cu_seqlens, summary by a loop that only states the rule."""
    rows, n = position_ids.shape
    tokens = rows * n
    positions = position_ids.flatten().tolist()
    real = [True] * tokens if attention_mask is None else [bool(x) for x in attention_mask.flatten().tolist()]
    wrap = 2 ** (8 * position_ids.element_size())
    goes_on = [i % n > 0 and (positions[i] - positions[i - 1] - 1) % wrap == 0 for i in range(tokens)]
    seq_start, seq_end, lengths = [], [], []
    i = 0
    while i < tokens:
        begin = i
        while i == begin or (i < tokens and real[i] == real[begin] and (goes_on[i] or not real[i])):
            i += 1
        seq_start += [begin] * (i - begin)
        seq_end += [i if real[begin] else begin] * (i - begin)
        lengths += [i - begin] * real[begin]
    holes = 0
    for i in range(tokens):
        if i % n and real[i] and not real[i - 1]:
            run = i
            while goes_on[run]:
                run -= 1
            holes += any(real[run:i])
    cu_seqlens = list(accumulate(lengths, initial=0))
    cu_seqlens += cu_seqlens[-1:] * (tokens + 1 - len(cu_seqlens))
    summary = [len(lengths), max(lengths, default=0), holes, real.count(False)]
    return [torch.tensor(x, dtype=torch.int32) for x in (seq_start, seq_end, cu_seqlens, summary)]


def random_rows(seed, rows=None, n=None):
    """Random packed rows with jumps, offsets and repeats, and sometimes padding: (position_ids, attention_mask)."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows, n = rows or integer(1, 4), n or integer(1, 90)
    share = (0.02, 0.2, 0.7)[seed % 3]
    jumps = torch.rand(rows, n, generator=generator) < share
    steps = torch.where(jumps, torch.randint(-5, 6, (rows, n), generator=generator), 1)
    position_ids = steps.cumsum(1) + integer(0, 5)
    if seed % 2:
        position_ids = position_ids.int()
    kind = seed % 5
    if kind == 0:
        return position_ids, None
    real = torch.rand(rows, n, generator=generator) > 0.3
    if kind == 1:
        real = torch.arange(n) < torch.randint(0, n + 1, (rows, 1), generator=generator)
    if kind == 2:
        real = torch.arange(n) >= torch.randint(0, n + 1, (rows, 1), generator=generator)
    return position_ids, real.to((torch.bool, torch.int32, torch.int64)[seed % 3])
