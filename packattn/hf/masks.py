"""From what transformers passes to a mask function to a PackedMask.

The pre-hook of `packattn.hf.patch` replaces `attention_mask` by `carry(...)`: an int32 tensor (rows, 2, n) of position
ids and padding. Of three dimensions, it passes transformers' mask builders untouched, and its last dimension is the
number of keys that they expect; here it is turned into spans.
"""

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils

from packattn.attention import schedule
from packattn.boundaries import Boundaries, no_hole, unchecked_boundaries
from packattn.errors import UnsupportedMaskError
from packattn.hf.conditions import Conditions
from packattn.hf.running import RUNNING, past_the_hooks
from packattn.mask import PackedMask, block_starts


def carry(position_ids: Tensor, attention_mask: Tensor | None, rows: int) -> Tensor:
    """Position ids and padding as one int32 tensor (rows, 2, n)."""
    positions = position_ids.expand(rows, -1).int()
    real = torch.ones_like(positions) if attention_mask is None else (attention_mask != 0).int()
    return torch.stack([positions, real], 1)


class Carried(NamedTuple):
    """What `carry` made, for models that flatten an attention_mask of fewer than four dimensions."""

    tensor: Tensor

    @property
    def ndim(self) -> int:
        """4, as of a mask that is not touched."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(rows, 1, n, n), as of a dense mask."""
        rows, _, n = self.tensor.shape
        return (rows, 1, n, n)


def is_carried(attention_mask: object) -> bool:
    """Whether an attention_mask is what `carry` made: decided by its shape and dtype."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 3 and attention_mask.dtype == torch.int32


def packed_mask(
    *,
    q_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | PackedMask | Carried | None = None,
    **others: Any,
) -> PackedMask | Tensor:
    """The mask function that packattn registers with transformers.

    A carried attention_mask gives a PackedMask over the flattened rows. Any other belongs to a forward over a cache
    that holds tokens (see `packattn.hf.patch`), and gets transformers' own dense bool mask.

    Raises:
        UnsupportedMaskError: a mask function that is not one of those that packattn knows to be spans.
    """
    if isinstance(attention_mask, PackedMask):
        return attention_mask  # a model around this one made it
    if isinstance(attention_mask, Carried):
        attention_mask = attention_mask.tensor
    if not is_carried(attention_mask):
        _refuse_unhooked(q_length, **others)
        others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense: Tensor = masking_utils.sdpa_mask(
            q_length=q_length, mask_function=mask_function, attention_mask=attention_mask, **others
        )
        return dense
    assert attention_mask is not None
    _refuse_ambiguous(mask_function, **others)
    mask = _ordered(_spans(mask_function, attention_mask), **others)
    running = None if torch.compiler.is_compiling() else RUNNING.get()
    if running is not None:
        running.masks.append(mask.k_start)
    return mask


def _spans(mask_function: Callable[..., Tensor], carried: Tensor) -> PackedMask:
    position_ids, real = carried.unbind(1)
    found = unchecked_boundaries(position_ids, real)
    parts = _parts(mask_function)
    names = {name for name, _ in parts}
    windows = [value for name, value in parts if name.startswith("sliding_window")]
    window = min(windows) if windows else None
    blocks = next((value.flatten() for name, value in parts if name.endswith("blocks")), None)
    conditions, running = Conditions(), None if torch.compiler.is_compiling() else RUNNING.get()
    conditions.require(*no_hole(found))
    if blocks is not None:
        conditions.require(*_one_run_of_each(found, blocks))
    conditions.enforce(running is not None and running.first)
    plain = names - {"blocks", "outer_blocks"}
    if plain == {"causal"} or (plain == {"causal", "sliding_window"} and "outer_blocks" not in names):
        return PackedMask.causal(found, window=window, blocks=blocks)
    if plain == {"causal", "sliding_window"} and blocks is not None:
        return _with_whole_blocks(PackedMask.causal(found, window=window, blocks=blocks), found, blocks)
    if names == {"causal", "chunk"}:
        (chunk,) = [value for name, value in parts if name == "chunk"]
        # transformers counts chunks from the first token of a row, wherever its positions begin.
        index = torch.arange(found.seq_start.numel(), device=found.seq_start.device)
        return PackedMask.chunked(found, chunk, index - found.seq_start)
    if plain == {"bidirectional"} or names == {"bidirectional", "sliding_window_bidirectional"}:
        return PackedMask.bidirectional(found, window=window)
    raise UnsupportedMaskError(
        f"packattn does not know this model's mask to be one span of keys per token: {' and '.join(sorted(names))}. "
        "Train this model unpacked, one example a row, without packattn.patch."
    )


def _refuse_unhooked(q_length: int, kv_length: int = 0, q_offset: int | Tensor = 0, **_: Any) -> None:
    """Without a cache that holds tokens or room, the hooks carry boundaries here: nothing carried, no hook has run."""
    # Static caches count on the device, and have room, except for a prompt as long as their window.
    if isinstance(q_offset, Tensor) or q_offset > 0 or kv_length != q_length:
        return
    if torch.compiler.is_compiling() or (RUNNING.get() is None and not _before_a_forward()):
        raise RuntimeError(past_the_hooks("a model of attn_implementation='packattn'"))


def _before_a_forward() -> bool:
    """Whether generate makes the masks for a static cache, which it then calls the model with."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != masking_utils.create_masks_for_generate.__name__:
        frame = frame.f_back
    return frame is not None


def _refuse_ambiguous(
    mask_function: Callable[..., Tensor],
    config: PreTrainedConfig | None = None,
    allow_is_causal_skip: bool = False,
    **_: Any,
) -> None:
    """PaliGemma without token types: its mask is causal, and where transformers leaves it out, its layers are not.

    Raises:
        UnsupportedMaskError: what the sequences would give alone depends on the attention implementation.
    """
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if (
        both_ways
        and allow_is_causal_skip
        and {name for name, _ in _parts(mask_function)} <= {"causal", "sliding_window"}
    ):
        raise UnsupportedMaskError(
            "this model makes a causal mask for layers that look both ways (use_bidirectional_attention), so that "
            "transformers' implementations of attention disagree on what it computes. Pass token_type_ids, which mark "
            "what is bidirectional, or remove the patch."
        )


def _ordered(
    mask: PackedMask, config: PreTrainedConfig | None = None, dtype: torch.dtype = torch.float32, **_: Any
) -> PackedMask:
    """The mask with the launch order of its GPU tiles for most layers of a model; others ignore an order of theirs.

    The order changes no result. A fake tensor is on no GPU that could be asked for its kind.
    """
    if config is None or type(mask.k_start) is not Tensor:
        return mask
    device = mask.k_start.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    try:
        heads = config.num_attention_heads
        heads_k = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except (AttributeError, RuntimeError):  # layers of different shapes: transformers has no one answer
        return mask
    return schedule(mask, heads_q=heads, heads_k=heads_k, head_dim=head_dim, dtype=dtype)


def _one_run_of_each(found: Boundaries, blocks: Tensor) -> tuple[Tensor, str]:
    """The condition that no sequence holds a block twice, whose tokens would see each other across a gap."""
    index = torch.arange(blocks.numel(), device=blocks.device, dtype=torch.int32)
    begins = block_starts(found, index, blocks) & (blocks >= 0)
    runs = torch.where(begins, (found.seq_start.long() << 32) + blocks.long(), -1 - index.long())
    message = (
        "a sequence holds two runs of one bidirectional block (an image or prefix that is taken up again): that is not "
        "one span of keys per token. Give it one run a sequence, or train this model unpacked."
    )
    return runs.sort().values.diff() != 0, message


def _with_whole_blocks(mask: PackedMask, found: Boundaries, blocks: Tensor) -> PackedMask:
    """Blocks that see all of themselves, also what lies before the window."""
    index = torch.arange(mask.tokens, device=blocks.device, dtype=torch.int32)
    starts = torch.where(block_starts(found, index, blocks), index, 0).cummax(0).values
    return PackedMask.from_spans(
        torch.where(blocks >= 0, torch.minimum(mask.k_start, starts), mask.k_start), mask.k_end, mask.tokens_k
    )


def _parts(mask_function: Callable[..., Tensor]) -> list[tuple[str, Any]]:
    """The conjunction that transformers built, as (name, window or chunk size or blocks) pairs.

    A union with the blocks of images is one part: "blocks" where the rest of the conjunction still cuts them,
    "outer_blocks" where they are whole.
    """
    if mask_function is masking_utils.causal_mask_function:
        return [("causal", None)]
    if mask_function is masking_utils.bidirectional_mask_function:
        return [("bidirectional", None)]
    code = mask_function.__code__
    if code is _AND:
        return [part for member in _cell(mask_function, "mask_functions") for part in _parts(member)]
    if code is _OR:
        members = [_parts(member) for member in _cell(mask_function, "mask_functions")]
        if len(members) == 2 and [name for name, _ in members[1]] == ["bidirectional"]:
            return members[1]
        if len(members) == 2 and [name for name, _ in members[1]] == ["sliding_window_bidirectional"]:
            (reach,) = [value for _, value in members[1]]
            # What the causal part sees lies within the window too: nothing is left of it.
            if [name for name, _ in members[0]] == ["sliding_window", "causal"] and members[0][0][1] == reach + 1:
                return [("bidirectional", None), *members[1]]
        if len(members) == 2 and [name for name, _ in members[1]] == ["block"]:
            inner = {name for name, _ in members[0]}
            if inner in ({"causal"}, {"bidirectional"}, {"causal", "sliding_window"}):
                name = "outer_blocks" if "sliding_window" in inner else "blocks"
                return [*members[0], (name, members[1][0][1])]
    if code is _WINDOW:
        return [("sliding_window", _cell(mask_function, "sliding_window"))]
    if code is _BIDIRECTIONAL_WINDOW:
        return [("sliding_window_bidirectional", _cell(mask_function, "sliding_window"))]
    if code is _CHUNK:
        return [("chunk", _cell(mask_function, "chunk_size"))]
    if code is _BLOCKS:
        return [("block", _cell(mask_function, "block_sequence_ids"))]
    name = f"{mask_function.__module__}.{mask_function.__qualname__}"
    if name in _EVERYTHING:
        return [("bidirectional", None)]
    if name in _EXCLUSIVE_WINDOW:
        return [("sliding_window_bidirectional", _cell(mask_function, "sliding_window") - 1)]
    return [(name, None)]


def _cell(function: Callable[..., Tensor], name: str) -> Any:
    """A variable that a closure holds."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents  # type: ignore[index]


def _closure_code(maker: Callable[..., Any]) -> CodeType:
    """The code of the function that `maker` defines and returns: what its closures have in common."""
    inner = [constant for constant in maker.__code__.co_consts if isinstance(constant, CodeType)]
    (code,) = (code for code in inner if not code.co_name.startswith("<"))  # not a generator expression
    return code


# transformers composes its masks from closures of these functions.
_AND = _closure_code(masking_utils.and_masks)
_OR = _closure_code(masking_utils.or_masks)
_WINDOW = _closure_code(masking_utils.sliding_window_overlay)
_BIDIRECTIONAL_WINDOW = _closure_code(masking_utils.sliding_window_bidirectional_overlay)
_CHUNK = _closure_code(masking_utils.chunked_overlay)
# transformers 5.8 has no blocks; its models' own functions for them are refused by name.
_BLOCKS = _closure_code(masking_utils.blockwise_overlay) if hasattr(masking_utils, "blockwise_overlay") else None
# What models define themselves, by name: all keys, and the keys at a distance of less than the window.
_OWN = (("gemma3", "Gemma3TextModel"), ("step3p7", "Step3p7TextModel"))
_EVERYTHING = {f"transformers.models.{m}.modeling_{m}.{name}.forward.<locals>.<lambda>" for m, name in _OWN}
_EXCLUSIVE_WINDOW = {
    f"transformers.models.{m}.modeling_{m}._bidirectional_window_overlay.<locals>.inner_mask" for m, _ in _OWN
}
