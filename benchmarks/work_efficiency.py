"""Work counted, not timed: useful over executed score pairs, and launched over useful programs, on real lengths.

A pair of a query and a key is useful where the causal mask of its sequence shows it; a kernel executes whole blocks.
Counted for the same stream of sequences, drawn from benchmarks/lengths:

packattn            tiles over the packed stream, the query heads of a group in the rows; launch table of a family
FlashAttention-2    varlen: tiles of 128 queries of one sequence and head, blocks of 64 keys; backward: 128 keys by 128
                    queries (head dim 64) or 64 queries (128); grid of ceil(longest / 128) tiles for every sequence
FlexAttention       a block mask of 128 x 128 over the packed stream: every block with a visible pair is executed
padding             batches of 4 padded to their longest, the tiles of FlashAttention-2, causal

The backward figure weighs dQ (3 products a pair) and dK/dV (4) by their products. FlashAttention-2 does both in one
pass with 5 products; so where both executed the same pairs, ours would do 7/5 of its products. `products` counts that
too: executed multiply-adds of both passes over the 7 useful ones (2 forward, 5 backward).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import packs
from packattn.kernels.table import FAMILIES, tile_for

SCHEMES = ("packattn", "FlashAttention-2", "FlexAttention", "padding")
COLORS = ("#0b6e4f", "#7a869a", "#c58b2a", "#c9c9c9")
_PRODUCTS = {"packattn": (2, 7), "FlashAttention-2": (2, 5), "FlexAttention": (2, 7), "padding": (2, 5)}


class Work(NamedTuple):
    """Pairs and programs of a pass, summed over the query heads of one key head."""

    useful: int
    executed: int
    launched: int
    useful_programs: int

    @property
    def efficiency(self) -> float:
        return self.useful / self.executed


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    return -(-x // size)


def _useful(lengths: np.ndarray, group: int) -> int:
    return int((lengths * (lengths + 1) // 2).sum()) * group


def packed_tiles(lengths: np.ndarray, group: int, rows: int, block: int, keys: bool) -> Work:
    """Tiles of `rows` of the stream, a row for each head of a query; with `keys` keys."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    ends = starts + np.repeat(lengths, lengths)
    index = np.arange(len(starts))
    low, high = (index, ends) if keys else (starts, index + 1)
    each = 1 if keys else group
    first = np.arange(0, len(starts) * each, rows)
    last = np.minimum((first + rows - 1) // each, len(starts) - 1)
    executed = int(_blocks(high[last] - low[first // each], block).sum()) * block * rows * (group // each)
    return Work(_useful(lengths, group), executed, len(first), len(first))


def sequence_tiles(lengths: np.ndarray, group: int, rows: int, block: int, longest: int, keys: bool) -> Work:
    """Tiles of one sequence and head, `rows` of ceil(longest / rows) a sequence; with `keys` tiles of keys."""
    executed = tiles = 0
    for length in lengths.tolist():
        first = np.arange(0, length, rows)
        tiles += len(first)
        if keys:
            executed += int((_blocks(np.full_like(first, length), block) - first // block).sum()) * block * rows
        else:
            executed += int(_blocks(np.minimum(first + rows, length), block).sum()) * block * rows
    launched = int(_blocks(np.array(longest), rows)) * len(lengths)
    return Work(_useful(lengths, group), executed * group, launched * group, tiles * group)


def block_mask(lengths: np.ndarray, group: int, block: int = 128) -> Work:
    """Blocks of a block mask over the stream."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    first = np.arange(0, len(starts), block)
    executed = int((first // block - starts[first] // block + 1).sum()) * block * block
    return Work(_useful(lengths, group), executed * group, len(first) * group, len(first) * group)


def padded(lengths: np.ndarray, group: int, rows: int, block: int, keys: bool, batch: int = 4) -> Work:
    """Batches padded to their longest, in data order."""
    works = []
    for begin in range(0, len(lengths), batch):
        part = lengths[begin : begin + batch]
        full = sequence_tiles(np.full_like(part, part.max()), group, rows, block, int(part.max()), keys)
        real = sequence_tiles(part, group, rows, block, int(part.max()), keys)
        works.append(full._replace(useful=real.useful, useful_programs=real.useful_programs))
    return Work(*(sum(values) for values in zip(*works, strict=True)))


def count(scheme: str, lengths: np.ndarray, group: int, dim: int, family: str) -> tuple[Work, Work, float]:
    """(forward, backward, products): the two passes, and executed over useful multiply-adds of both."""
    if scheme == "packattn":
        forward_tile, dq_tile, dkdv_tile = (
            tile_for(family, name, dim, torch.bfloat16, group) for name in ("forward", "dq", "dkdv")
        )
        forward, dq = (
            packed_tiles(lengths, group, tile.block_m, tile.block_n, keys=False) for tile in (forward_tile, dq_tile)
        )
        dkdv = packed_tiles(lengths, group, dkdv_tile.block_n, dkdv_tile.block_m, keys=True)
        # Both passes go over the useful pairs, 3 and 4 products each: the mean by products.
        executed = (3 * dq.executed + 4 * dkdv.executed) // 7
        launched = dq.launched + dkdv.launched
        backward = Work(dq.useful, executed, launched, launched)
    elif scheme == "FlexAttention":
        forward = backward = block_mask(lengths, group)
    else:
        queries = 128 if dim <= 64 else 64
        longest = int(lengths.max())
        if scheme == "FlashAttention-2":
            forward = sequence_tiles(lengths, group, 128, 64, longest, keys=False)
            backward = sequence_tiles(lengths, group, 128, queries, longest, keys=True)
        else:
            forward = padded(lengths, group, 128, 64, keys=False)
            backward = padded(lengths, group, 128, queries, keys=True)
    first, second = _PRODUCTS[scheme]
    products = (first * forward.executed + second * backward.executed) / (7 * forward.useful)
    return forward, backward, products


def streams(tokens: int) -> dict[str, np.ndarray]:
    """Streams drawn from every set, as it is and with lengths capped at 4,096."""
    return {
        name if longest is None else f"{name}, at most {longest:,}": np.array(packs.draw(name, tokens, longest))
        for name in packs.NAMES
        for longest in (None, 4096)
        if longest is None or max(packs.lengths(name)) > longest
    }


def draw(counts: dict[str, dict[str, tuple[Work, Work, float]]], title: str, path: Path) -> None:
    """Bars of useful over executed pairs: a row of bars for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(10, 6.5), sharex=True, layout="constrained")
    for axis, which, label in zip(axes, (0, 1), ("forward", "backward"), strict=True):
        for i, (scheme, color) in enumerate(zip(SCHEMES, COLORS, strict=True)):
            values = [found[scheme][which].efficiency for found in counts.values()]
            bars = axis.bar(np.arange(len(values)) + 0.2 * (i - 1.5), values, 0.19, color=color, label=scheme)
            axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6.5, padding=1)
        axis.set_ylim(0, 1.08)
        axis.set_ylabel(f"useful / executed pairs, {label}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=4, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.14))
    axes[1].set_xticks(range(len(counts)), [name.replace(", ", ",\n") for name in counts], fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262_144, help="length of a stream")
    parser.add_argument("--family", choices=FAMILIES, default="sm80", help="whose launch table")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = streams(options.tokens)
    for dim, group in ((64, 3), (128, 8)):
        print(f"\nhead dim {dim}, {group} query heads a key head, {options.tokens:,} tokens, tiles of {options.family}")
        print("useful / executed pairs; programs: launched / useful; products: executed / useful of both passes")
        head = f"{'':32}" + "".join(f"{scheme:>31}" for scheme in SCHEMES)
        print(head + f"{'ours / FA2':>16}\n{'':32}" + "   forward  back  progr. prod." * 4 + "    forward  back")
        counts = {}
        for name, lengths in drawn.items():
            found = {scheme: count(scheme, lengths, group, dim, options.family) for scheme in SCHEMES}
            counts[name] = found
            line = f"{name:32}"
            for forward, backward, products in found.values():
                programs = forward.launched / forward.useful_programs
                line += f"{forward.efficiency:10.3f} {backward.efficiency:5.3f} {programs:7.1f} {products:5.2f} "
            (ours, ours_back, _), (flash, flash_back, _) = found["packattn"], found["FlashAttention-2"]
            ratios = (ours.efficiency / flash.efficiency, ours_back.efficiency / flash_back.efficiency)
            print(line + f"{ratios[0]:10.2f} {ratios[1]:5.2f}")
        path = options.out / f"work_efficiency_{dim}_{group}.png"
        draw(counts, f"Score pairs that count, head dim {dim}, {group} query heads a key head", path)
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
