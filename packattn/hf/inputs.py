"""What a call of a patched model may bring, and the errors that say what it may not."""

import gc
import inspect
import re
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedModel

from packattn.boundaries import Boundaries
from packattn.hf.cache import is_prepared
from packattn.hf.conditions import Conditions
from packattn.mask import PackedMask

_OF_A_ROW = re.compile(r"For(SequenceClassification|QuestionAnswering|MultipleChoice)$")
PROMPTS = "PEFT prompt learning puts virtual tokens before the row and drops position_ids"
# What a model makes tokens of that are no text.
_MEDIA = ("pixel_values", "pixel_values_videos", "image_embeds", "video_embeds", "image_grid_thw", "video_grid_thw")
# What says where sequences lie beside position_ids.
EXPLICIT = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
# All arguments that describe the sequences of a row to its layers: a layer that sees one sequence a row needs none.
OF_SEQUENCES = (*EXPLICIT, "max_length_q", "max_length_k")


def refuse_callers(entries: Collection[nn.Module], tokens_only: bool) -> None:
    """Raise where a module around the patched one, put there after the patch, spoils packed rows.

    Args:
        entries: the patched models. tokens_only: embeddings came, and nothing that says where sequences lie.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(caller, nn.Module) and caller not in entries and (why := spoils(caller, tokens_only)):
            raise NotImplementedError(why)


def modules_around(models: Collection[nn.Module], kind: Callable[[Any], Any]) -> list[Any]:
    """The modules of a kind that hold one of the models. Modules do not know what holds them; the garbage collector
    does."""

    def around() -> list[Any]:
        found = (o for o in gc.get_objects() if issubclass(type(o), nn.Module) and o not in models and kind(o))
        return [o for o in found if any(inner in models for inner in o.modules())]

    if not around():
        return []
    gc.collect()  # what nobody holds any more
    return around()


def spoils(module: nn.Module, tokens_only: bool) -> str:
    """Why packed rows would be spoilt by a module around a patched model; empty: they are not."""
    if (why := of_adapters(module)) and (tokens_only or why is not PROMPTS):
        return (
            f"{why}, so that packed sequences would not be isolated. Remove the patch, and train this model unpacked."
        )
    if takes_rows(module):
        return (
            f"{type(module).__name__} works out one result of every row, around a model that was patched by "
            f"itself. Call .remove() of the Patch, and packattn.patch on the {type(module).__name__}."
        )
    return ""


def is_called(module: nn.Module | None) -> bool:
    """Whether this runs within a call of the module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


def of_adapters(module: nn.Module) -> str | None:
    """What an active adapter of PEFT around a model makes of a row as a whole, or None."""
    adapter = getattr(module, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return PROMPTS
    if getattr(adapter, "alora_invocation_tokens", None):
        return "an activated LoRA of PEFT begins once in every row, where its last invocation tokens are"
    return None


def takes_rows(module: nn.Module) -> bool:
    """Whether a model of transformers makes one result, or one loss, of every row of the model inside."""
    return isinstance(module, PreTrainedModel) and bool(_OF_A_ROW.search(type(module).__name__))


def as_called(
    names: list[str], args: tuple[Any, ...], arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward as they came, by position or by name: other hooks look for them there.

    Args:
        names: of the parameters. args: what came by position. arguments: all of them by name; one that was taken out is
            None where it came by position.
    """
    rest = dict(arguments)
    return tuple(rest.pop(name, None) for name in names[: len(args)]), rest


def tokens_of(arguments: dict[str, Any]) -> Any:
    """The input_ids of a forward, or its inputs_embeds."""
    tokens = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if tokens is None else tokens


def sign(cache: Any, position_ids: Tensor, attention_mask: Any) -> None:
    """Leave in a cache whether each of its rows is one sequence: bool () on the device, for `refuse_packed`."""
    cache.packattn_one_sequence_a_row = one_sequence_a_row(position_ids, attention_mask).all()


def refuse_packed(conditions: Conditions, cache: Any) -> None:
    """Require that a cache to be continued was not filled by a packed forward."""
    signed = getattr(cache, "packattn_one_sequence_a_row", None)
    if signed is not None:
        conditions.require(
            signed,
            "the cache comes from a packed forward: a token that continues it would see all sequences of the row. "
            "Pass use_cache=False with packed rows, and fill a cache from rows of one sequence each.",
        )


def _or_padding(steps: Tensor, attention_mask: Any) -> Tensor:
    """bool (rows, n - 1), of each token and the one before it: `steps`, or true where one of the two is padding."""
    if not isinstance(attention_mask, Tensor):
        return steps
    real = attention_mask != 0
    return steps | ~real[:, 1:] | ~real[:, :-1]


def no_restarts(conditions: Conditions, position_ids: Any, attention_mask: Any, tokens: Tensor) -> None:
    """Require that a forward over a cache is not packed."""
    n = tokens.shape[1]
    if not isinstance(position_ids, Tensor) or n == 1:
        return
    whole = position_ids.diff(dim=1) == 1 if position_ids.ndim == 2 else _begins_once(position_ids)
    if is_prepared(attention_mask):  # where padding lies is not known: it may stand before the tokens
        whole = whole | (whole.cumsum(1) == 0)
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= n:
        whole = _or_padding(whole, attention_mask[:, -n:])
    conditions.require(
        whole,
        "position_ids restart in a forward over a cache that is static or holds tokens: packattn isolates packed rows "
        "in forwards without one. Leave out the cache (past_key_values), or give one sequence a row.",
    )


def _begins_once(planes: Tensor) -> Tensor:
    """bool (rows, n - 1), of each token after the first: no second one of the row's lowest position in all planes.

    Within a sequence the planes of M-RoPE (planes, rows, n) rise and fall with the images, but text and images begin
    higher than all before them.
    """
    lowest = (planes == planes.amin((0, 2), keepdim=True)).all(0)
    return ~lowest[:, 1:] | (lowest.cumsum(1)[:, :-1] == 0)


def one_sequence_a_row(position_ids: Tensor, attention_mask: Any) -> Tensor:
    """Whether a row holds no more than one sequence: bool (rows,)."""
    return _or_padding(position_ids.diff(dim=1) == 1, attention_mask).all(1)


def no_loss_across(
    conditions: Conditions, arguments: dict[str, Any], position_ids: Tensor, attention_mask: Any, shifts: bool
) -> None:
    """Require that no loss is asked for across the sequences of a packed row.

    Args:
        position_ids: (rows, n). shifts: the model has a token predict the label of the next one.
    """
    if arguments.get("start_positions") is not None or arguments.get("end_positions") is not None:
        conditions.require(
            one_sequence_a_row(position_ids, attention_mask),
            "start_positions and end_positions ask for a loss over the tokens of a whole row, across the packed "
            "sequences. Leave them out, and compute the loss of each sequence from the logits.",
        )
    if not shifts or arguments.get("labels") is None:
        return
    shifted = arguments.get("shift_labels")
    targets = shifted[:, :-1] if shifted is not None else arguments["labels"][:, 1:]
    if targets.shape[1] == position_ids.shape[1] - 1:
        real = attention_mask != 0 if isinstance(attention_mask, Tensor) else torch.ones_like(position_ids).bool()
        goes_on = (position_ids.diff(dim=1) == 1) & real[:, :-1]
        begins = real & F.pad(~goes_on, (1, 0), value=True)
        later = begins & (begins.cumsum(1) > 1)  # padding may stand before the first
        conditions.require(
            ~later[:, 1:] | (targets == -100),
            "labels have the last token of a sequence predict the first of the next one in its row. Set the label of "
            "every first token to -100, as packattn.PackingCollator does.",
        )


def refuse_trace() -> None:
    """Raise where a forward that reads lengths back to the host is recorded, to be run on other rows."""
    if torch._C._get_tracing_state() is not None or get_proxy_mode() is not None:
        raise NotImplementedError(
            "this model runs layers by sequence, and a trace or export of it would keep the lengths of the example for "
            "all rows. Use torch.compile(model), or trace the model without the patch, on one sequence a row."
        )


def no_transforms(active: bool) -> None:
    """Raise where a transform of torch.func reaches an operator of packattn, or the lengths of sequences."""
    if active:
        raise NotImplementedError(
            "packattn has no rules for torch.func transforms (vmap, grad, jvp). Use autograd and a loop, or remove the "
            "patch and run one sequence a row."
        )


def first_or_later(conditions: Conditions, position_ids: Tensor, attention_mask: Any, first: int) -> None:
    """Require that positions begin where the model's own do."""
    right = position_ids >= first
    if isinstance(attention_mask, Tensor):
        right = right | (attention_mask == 0)
    conditions.require(
        right,
        f"position_ids hold values below {first}, where the positions of this model begin (the RoBERTa family counts "
        f"from after its padding index): use packattn.PackingCollator(start_position={first}).",
    )


def check(conditions: Conditions, tokens: Tensor, position_ids: Any, attention_mask: Any) -> None:
    """Raise on anything that packattn would have to guess about."""
    sdpa = F.scaled_dot_product_attention  # replaced while such a split lasts
    if not torch.compiler.is_compiling() and sdpa.__module__.startswith("torch.distributed"):
        raise NotImplementedError(
            "a row split over ranks (context parallel) is not supported by packattn, whose ranks each hold whole "
            "sequences. Split the examples over the ranks instead: packattn.BalancedPackingSampler."
        )
    rows, n = tokens.shape[:2]
    if rows == 0 or n == 0:
        raise ValueError(f"input_ids must hold at least one row of at least one token, got shape {(rows, n)}.")
    if isinstance(attention_mask, (dict, PackedMask)):
        raise ValueError(
            "attention_mask is a dict of masks that were made before packattn saw position_ids. Pass a 2-D "
            "attention_mask or none."
        )
    for name, value in (("position_ids", position_ids), ("attention_mask", attention_mask)):
        if value is None:
            continue
        if name == "attention_mask" and isinstance(value, Tensor) and value.ndim == 4:
            raise ValueError(
                f"attention_mask of shape {tuple(value.shape)} is dense, but a patched model makes its mask from "
                "position_ids. Pass position_ids that restart with every sequence, and no attention_mask or a 2-D one."
            )
        if not isinstance(value, Tensor) or value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an integer tensor of shape (rows, n) = {(rows, n)}, got {got}.")
        if name == "position_ids" and value.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"position_ids must be int32 or int64, got {value.dtype}, in which positions may wrap around: make "
                "them in one of those."
            )
        if name == "position_ids" and value.ndim == 3 and value.shape[1] in (rows, 1) and value.shape[2] == n:
            continue  # planes of M-RoPE
        if value.ndim != 2 or value.shape[1] != n or value.shape[0] not in (rows, 1):
            raise ValueError(f"{name} must have shape (rows, n) = {(rows, n)}, as the input, got {tuple(value.shape)}.")
        if value.device != tokens.device:
            raise ValueError(f"{name} must be on the device of the input, {tokens.device}, got {value.device}.")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        conditions.require(
            (attention_mask == 0) | (attention_mask == 1),
            "attention_mask holds values other than 0 and 1. Sequences that are numbered in it (1, 1, 2, 2, ...) are "
            "one sequence to transformers: give position_ids that restart, or seq_idx.",
        )


def given_sequences(conditions: Conditions, arguments: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Positions, from 0, of the sequences that a caller gave by number or by cumulative length.

    Args:
        arguments: of the forward: seq_idx, int (rows, n), the number of each token's sequence; cu_seq_lens_q and
            cu_seq_lens_k, int (sequences + 1,), from 0 to rows * n over the flattened rows.
        tokens: (rows, n, ...).

    Returns:
        int64 (rows, n); None: none of them was given.
    """
    rows, n = tokens.shape[:2]
    found: dict[str, Tensor] = {}
    for name in EXPLICIT:
        value = arguments.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an integer tensor, got {got}.")
        if name == "seq_idx":
            if value.shape != (rows, n):
                raise ValueError(f"seq_idx must have shape (rows, n) = {(rows, n)}, got {tuple(value.shape)}.")
            begins = F.pad(value.diff(dim=1) != 0, (1, 0), value=True)
            index = torch.arange(n, device=tokens.device).expand(rows, -1)
            found[name] = index - torch.where(begins, index, 0).cummax(1).values
        else:
            starts = Boundaries.from_cu_seqlens(value.to(tokens.device), rows * n).seq_start.view(rows, n)
            found[name] = torch.arange(rows * n, device=tokens.device).view(rows, n) - starts
            conditions.require(
                found[name][:, 0] == 0, f"{name} holds a sequence that goes on from one row into the next."
            )
    if not found:
        return None
    first, *others = found
    for name in others:
        conditions.require(found[name] == found[first], f"{name} and {first} say different sequences.")
    return found[first]


def own_positions(tokens: Tensor, attention_mask: Any) -> Tensor:
    """Positions, from 0, of rows that are one sequence each: int64 (rows, n) or (1, n), counted from the first token
    that is not padding."""
    index = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if not isinstance(attention_mask, Tensor):
        return index
    return (index - (attention_mask != 0).int().argmax(1, keepdim=True)).clamp(min=0)


def goes_on_by_index(module: nn.Module | None, cache: Any) -> bool:
    """Whether a cache is to be filled by a model that generate gives no position_ids: it then counts padding too."""
    if cache is None or module is None:
        return False
    return "position_ids" not in inspect.signature(type(module).forward).parameters


def text_positions(conditions: Conditions, planes: Tensor, given: Tensor | None, text_first: bool) -> Tensor:
    """Which positions say where the sequences lie, among several planes of them (M-RoPE).

    Args:
        planes: int (planes, rows, n). given: what `given_sequences` found. text_first: the model takes four planes, of
            which the first is that of the text.
    """
    if text_first and planes.shape[0] == 4:
        return planes[0]
    if given is not None:
        return given
    # Text has one position in all planes; the tokens of an image do not, and their planes do not rise by one.
    conditions.require(
        planes == planes[:1],
        f"position_ids {tuple(planes.shape)} have planes (M-RoPE) that differ and do not tell where sequences begin. "
        "Say it by seq_idx (rows, n) or cu_seq_lens_q, or by a plane of text positions before them, (4, rows, n).",
    )
    return planes[0]


def no_text_positions_of_media(arguments: dict[str, Any], position_ids: Any, planes: bool) -> None:
    """Raise where tokens of images or videos would get the positions of text.

    Args:
        arguments: of the forward. planes: the model turns keys by several planes of positions (M-RoPE).
    """
    if not planes or not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    media = [name for name in _MEDIA if arguments.get(name) is not None]
    if media:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} give the tokens of {media[0]} positions of text, but "
            "this model places images by three planes of positions (M-RoPE). Give the planes that model.get_rope_index "
            "makes of each sample, behind a plane of text positions that restart: (4, rows, n); or seq_idx (rows, n) "
            "and no position_ids."
        )


def agree(conditions: Conditions, position_ids: Tensor, given: Tensor, attention_mask: Any) -> None:
    """Require that position_ids begin sequences where the caller said that they begin."""
    steps = position_ids.diff(dim=1)
    right = (given.diff(dim=1) == 1) == (steps == 1)
    right = right | ((steps == 0) & (given.diff(dim=1) == 1))  # a dead segment, all of it at the first position
    conditions.require(
        _or_padding(right, attention_mask),
        "seq_idx or cu_seq_lens begin other sequences than position_ids, which begin one wherever a position is not "
        "the previous one + 1. Let them agree, or leave one of them out.",
    )


def same_sequences(conditions: Conditions, inner: Any, outer: Tensor, attention_mask: Any) -> None:
    """Require that a model around the layers hands on positions of the sequences that it was given."""
    if not isinstance(inner, Tensor) or inner.ndim != 2 or inner.shape[1] != outer.shape[1]:
        return
    right = (inner.diff(dim=1) == 1) == (outer.diff(dim=1) == 1)
    conditions.require(
        _or_padding(right, attention_mask),
        "the model hands position_ids to its layers that begin other sequences than those that it was called with. "
        "Give it the position_ids of the packed row, or call packattn.patch on the model inside.",
    )
