"""The picture of a packed mask; needs matplotlib."""

import os
from typing import TYPE_CHECKING

from packattn.requirements import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from packattn.mask import PackedMask

# Okabe and Ito's palette, told apart by colour-blind readers too; neighbours alternate.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot_mask(mask: "PackedMask", path: str | os.PathLike[str] | None, ax: "Axes | None") -> "Axes":
    """Draw `mask`, queries down and keys across; each group of connected tokens has its own colour.

    Args:
        path: where the picture is written; None: nowhere.
        ax: where the mask is drawn; None: on a figure of its own.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the mask is too large to be made dense.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("PackedMask.plot", "matplotlib", "plot") from error
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise TypeError(f"path must be the name of a file, got {type(path).__name__}; axes are given by name, ax=.")
    if not isinstance(ax, (Axes, type(None))):
        raise TypeError(f"ax must be matplotlib axes, got {type(ax).__name__}.")
    dense = mask.to_dense().cpu()
    # Two neighbouring keys are connected when some query sees both.
    k_start, q_start, q_end = mask.k_start.cpu(), mask.q_start.cpu(), mask.q_end.cpu()
    connected = q_start[1:] < q_end[:-1]
    group = (~connected).cumsum(0)
    shade = group.new_zeros(mask.tokens_k)
    shade[1:] = group % len(_COLOURS)
    if ax is None:
        side = min(8.0, max(3.0, k_start.numel() / 12))
        # A picture that is written belongs to no session of pyplot, which would keep it.
        make = plt.figure if path is None else Figure
        ax = make(figsize=(side, side), layout="constrained").subplots()
    colours = ListedColormap(["#F4F4F4", *_COLOURS])
    ax.imshow(
        (dense * (shade + 1)).numpy(), cmap=colours, vmin=0, vmax=len(_COLOURS), interpolation="nearest", aspect="equal"
    )
    if max(dense.shape) <= 64:
        ax.set_xticks([x - 0.5 for x in range(mask.tokens_k + 1)], minor=True)
        ax.set_yticks([y - 0.5 for y in range(mask.tokens + 1)], minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    for side_name in ("top", "right"):
        ax.spines[side_name].set_visible(False)
    if path is not None:
        ax.figure.figure.savefig(path, dpi=120)  # of axes in a part of a figure, the whole
    return ax
