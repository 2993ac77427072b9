"""The picture of a packed mask (needs matplotlib: `pip install packattn[plot]`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from packattn.mask import PackedMask

# Okabe and Ito's palette, told apart by colour-blind readers too; neighbours alternate.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot_mask(mask: "PackedMask", ax: "Axes | None" = None) -> "Axes":
    """Draw `mask`, queries down and keys across; each group of connected tokens has its own colour.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the mask is too large to be made dense.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
    except ImportError as error:
        raise ImportError("PackedMask.plot needs matplotlib: pip install packattn[plot]") from error

    dense = mask.to_dense().cpu()
    # Two neighbouring keys are connected when some query sees both.
    k_start, q_start, q_end = mask.k_start.cpu(), mask.q_start.cpu(), mask.q_end.cpu()
    connected = q_start[1:] < q_end[:-1]
    group = (~connected).cumsum(0)
    shade = group.new_zeros(mask.tokens_k)
    shade[1:] = group % len(_COLOURS)
    if ax is None:
        side = min(8.0, max(3.0, k_start.numel() / 12))
        ax = plt.subplots(figsize=(side, side), layout="constrained")[1]
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
    return ax
