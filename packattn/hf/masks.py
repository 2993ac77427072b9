"""From what transformers passes to a mask function to a PackedMask.

The pre-hook of `packattn.hf.patch` replaces `attention_mask` by `carry(...)`: an int32 tensor (rows, 2, n) of position
ids and padding. Of three dimensions, it passes transformers' mask builders untouched, and its last dimension is the
number of keys that they expect; here it is turned into spans.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from packattn.boundaries import boundaries
from packattn.errors import UnsupportedMaskError
from packattn.mask import PackedMask


def carry(position_ids: Tensor, attention_mask: Tensor | None, rows: int) -> Tensor:
    """Position ids and padding as one int32 tensor (rows, 2, n)."""
    positions = position_ids.expand(rows, -1).int()
    real = torch.ones_like(positions) if attention_mask is None else (attention_mask != 0).int()
    return torch.stack([positions, real], 1)


def is_carried(attention_mask: object) -> bool:
    """Whether an attention_mask is what `carry` made: decided by its shape and dtype."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 3 and attention_mask.dtype == torch.int32


def packed_mask(
    *, q_length: int, mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, **others: Any
) -> PackedMask | Tensor:
    """The mask function that packattn registers with transformers.

    A carried attention_mask gives a PackedMask over the flattened rows. Any other belongs to a forward over a cache
    that holds tokens (see `packattn.hf.patch`), and gets transformers' own dense bool mask.

    Raises:
        UnsupportedMaskError: a mask function that is not one of those that packattn knows to be spans.
    """
    if not is_carried(attention_mask):
        others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense: Tensor = masking_utils.sdpa_mask(
            q_length=q_length, mask_function=mask_function, attention_mask=attention_mask, **others
        )
        return dense
    assert attention_mask is not None
    position_ids, real = attention_mask.unbind(1)
    found = boundaries(position_ids, real)
    parts = _parts(mask_function)
    names = {name for name, _ in parts}
    sizes = [size for _, size in parts if size is not None]
    if names == {"causal"}:
        return PackedMask.causal(found)
    if names == {"causal", "sliding_window_overlay"}:
        return PackedMask.causal(found, window=min(sizes))
    if names == {"causal", "chunked_overlay"} and len(sizes) == 1:
        return PackedMask.chunked(found, sizes[0], position_ids)
    if names == {"bidirectional"}:
        return PackedMask.bidirectional(found)
    if names == {"bidirectional", "sliding_window_bidirectional_overlay"}:
        return PackedMask.bidirectional(found, window=min(sizes))
    raise UnsupportedMaskError(
        f"packattn does not know this model's mask to be one span of keys per token: {' and '.join(sorted(names))}. "
        "Train this model unpacked, one example a row, without packattn.patch."
    )


def _parts(mask_function: Callable[..., Tensor]) -> list[tuple[str, int | None]]:
    """The conjunction that transformers built, as (name, window or chunk size) pairs.

    transformers composes closures: a conjunction holds its members, an overlay its size.
    """
    if mask_function is masking_utils.causal_mask_function:
        return [("causal", None)]
    if mask_function is masking_utils.bidirectional_mask_function:
        return [("bidirectional", None)]
    maker = mask_function.__qualname__.partition(".")[0]
    closure = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True))
    if mask_function.__module__ != masking_utils.__name__:
        return [(f"{mask_function.__module__}.{mask_function.__qualname__}", None)]
    if maker == "and_masks":
        return [part for member in closure["mask_functions"].cell_contents for part in _parts(member)]
    if maker in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return [(maker, closure["sliding_window"].cell_contents)]
    if maker == "chunked_overlay":
        return [(maker, closure["chunk_size"].cell_contents)]
    return [(maker, None)]
