"""Draw the blocks that the forward kernel visits over a packed stream: `python -m benchmarks.tile_picture`."""

import argparse
from pathlib import Path

import numpy as np

from packattn import PackedMask

LENGTHS = (90, 22, 9, 47, 14, 74)
ROWS, GROUP, BLOCK = 128, 4, 16
UNMASKED, MASKED, SEEN = "#0b6e4f", "#e0a93b", "#17202a"


def blocks_of_tile(mask: PackedMask, first_token: int, last_token: int, block: int) -> list[tuple[int, int, bool]]:
    """(first key, one past the last, masked) of every block of a tile of queries, in the order of the kernel."""
    start, end = mask.k_start.tolist(), mask.k_end.tolist()
    lo, hi = start[first_token], end[last_token]
    begin, stop = start[last_token], end[first_token]
    if begin >= stop:  # several sequences: the keys before the second one
        later = [start[i] for i in range(first_token, last_token + 1) if start[i] > lo]
        begin, stop = lo, min([stop, *later])
    begin = lo + -(-max(begin - lo, 0) // block) * block
    stop = begin + max(stop - begin, 0) // block * block
    unmasked = [(n, n + block, False) for n in range(begin, stop, block)]
    rest = [*range(lo, begin, block), *range(stop, hi, block)]
    return unmasked + [(n, min(n + block, hi), True) for n in rest]


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    mask = PackedMask.causal(lengths=LENGTHS)
    tokens, step = sum(LENGTHS), ROWS // GROUP
    figure, axis = pyplot.subplots(figsize=(7.2, 7.2), layout="constrained")
    counts = {True: 0, False: 0}
    for tile in range(-(-tokens // step)):
        m0, m1 = tile * step, min(tile * step + step, tokens)
        for n0, n1, masked in blocks_of_tile(mask, m0, m1 - 1, BLOCK):
            counts[masked] += 1
            color = MASKED if masked else UNMASKED
            axis.add_patch(
                patches.Rectangle((n0, m0), n1 - n0, m1 - m0, facecolor=color, alpha=0.55, edgecolor="white", lw=0.8)
            )
        axis.axhline(m1, color="#c9c9c9", lw=0.6, zorder=0)
    rows = np.arange(tokens)
    for ends in (mask.k_start, mask.k_end):
        axis.step(np.append(ends.numpy(), ends[-1]), np.append(rows, tokens), color=SEEN, lw=1.1, where="pre")
    axis.set_xlim(0, tokens)
    axis.set_ylim(tokens, 0)
    axis.set_aspect("equal")
    axis.set_xlabel("keys of the packed stream")
    axis.set_ylabel(f"queries, in tiles of {step} tokens x {GROUP} heads")
    axis.set_title(
        f"Six causal sequences, {counts[False] + counts[True]} blocks of {step} x {BLOCK}: no tile is empty, "
        "no sequence is a special case",
        fontsize=10, loc="left",
    )  # fmt: skip
    axis.legend(
        handles=[
            patches.Patch(facecolor=UNMASKED, alpha=0.55, label="without mask arithmetic"),
            patches.Patch(facecolor=MASKED, alpha=0.55, label="with the mask"),
            patches.Patch(facecolor="none", edgecolor=SEEN, label="the span of each token"),
        ],
        loc="upper right", fontsize=9, frameon=False,
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/tiles.png"))
    options = parser.parse_args()
    draw(options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
