"""The hooks that `patch` puts on a model: module-level callables, so that a patched model can be pickled.

A call of the model goes through `Enter` (what came, where the sequences lie), `Carry` on the module that builds masks,
`Mark` on every attention layer and `Check` when the layers are done (both in `packattn.hf.guard`), and `Leave`. Under
torch.compile, where no host value is needed, `Enter` only gives positions where the caller said otherwise where
sequences lie, and `Carry` works from the arguments of its own module.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.inputs import (
    agree,
    cache_of,
    check,
    first_or_later,
    given_sequences,
    goes_on_by_index,
    holds_tokens,
    is_called,
    is_prepared,
    modules_around,
    no_loss_across,
    no_restarts,
    no_transforms,
    own_positions,
    refuse_callers,
    refuse_packed,
    refuse_trace,
    same_sequences,
    sign,
    spoils,
    text_positions,
    tokens_of,
)
from packattn.hf.layout import Layout
from packattn.hf.masks import Carried, carry
from packattn.hf.plan import Plan, finds_last_by_padding
from packattn.hf.probe import probe_late
from packattn.hf.running import RUNNING, SUSPENDED, Running, keep_running_in_checkpoints, past_the_hooks
from packattn.mask import PackedMask

NAME = "packattn"
_CACHES = ("cache", "past_key_values", "cache_params", "state")


@dataclass
class Enter:
    """Forward pre-hook on the outermost model, and on the builders for calls that go straight to them."""

    plan: Plan
    names: list[str]
    takes_positions: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling() and not self.plan.needs_layout:
            return _with_positions(self, args, kwargs)
        if torch.compiler.is_compiling():
            untraced: tuple[tuple[Any, ...], dict[str, Any]] | None = _enter_untraced(self, module, args, kwargs)
            return untraced
        return _enter(self, module, args, kwargs)


def _with_positions(
    hook: Enter, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give positions to a compiled text model that was told its sequences otherwise: other arguments may get lost."""
    arguments = dict(zip(hook.names, args, strict=False)) | kwargs
    tokens, position_ids = tokens_of(arguments), arguments.get("position_ids")
    if not isinstance(tokens, Tensor):
        return None
    _unchanged_in_a_trace(hook.plan)
    if why := _spoiled_in_a_trace(hook.plan, arguments.get("input_ids") is None and position_ids is None):
        raise NotImplementedError(why)
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        no_loss_across(arguments, position_ids, arguments.get("attention_mask"), hook.plan.shifts_labels)
    if position_ids is not None or hook.plan.text_plane:
        return None
    given = given_sequences(arguments, tokens)
    if given is None:
        return None
    no_loss_across(arguments, given, arguments.get("attention_mask"), hook.plan.shifts_labels)
    return (), arguments | {"position_ids": given + hook.plan.first_position}


def _spoiled(plan: Plan, tokens_only: bool) -> str:
    """What `refuse_callers` would raise of a module around the patched model; empty: there is none."""
    around = modules_around(plan.entries, partial(spoils, tokens_only=tokens_only))
    return spoils(around[0], tokens_only) if around else ""


def _unchanged(plan: Plan) -> bool:
    plan.unchanged()
    return True


# Traces have no callers to look at: asked once for each graph, outside of it.
_unchanged_in_a_trace: Callable[..., bool] = torch.compiler.assume_constant_result(_unchanged)  # type: ignore[no-untyped-call]
_spoiled_in_a_trace: Callable[..., str] = torch.compiler.assume_constant_result(_spoiled)  # type: ignore[no-untyped-call]


def _enter(
    hook: Enter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    before = _before(hook.plan)
    if before is SUSPENDED or (before is not None and before.plan is hook.plan and module not in hook.plan.entries):
        return None
    if getattr(module, "_is_replica", False):
        raise NotImplementedError(
            "nn.DataParallel on several devices copies the layers in every call, which packattn's hooks do not follow. "
            "Use DistributedDataParallel."
        )
    arguments = dict(zip(hook.names, args, strict=False)) | kwargs
    tokens = tokens_of(arguments)
    if not isinstance(tokens, Tensor):
        return None  # arguments of other names: what comes in is seen where they reach the model inside
    hook.plan.unchanged()
    if hook.plan.not_probed:
        probe_late(hook.plan, tokens)
    refuse_callers(hook.plan.entries, arguments.get("input_ids") is None and arguments.get("position_ids") is None)
    running = Running(plan=hook.plan, owner=module, before=before)
    RUNNING.set(running)
    try:
        return _arguments(hook, running, module, arguments, tokens)
    except BaseException:
        RUNNING.set(before)
        raise


def _before(plan: Plan) -> Running | None:
    """What a call is nested in, without what an interrupt left behind: torch calls no hook after a KeyboardInterrupt.

    Layers by sequence end it themselves (`leaving`), also where compiled frames do not tell who is called.
    """
    before = RUNNING.get()
    while before is not None and before.plan is plan and not plan.needs_layout and not is_called(before.owner):
        before = before.before
    return before


def _arguments(
    hook: Enter, running: Running, module: nn.Module, arguments: dict[str, Any], tokens: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not prepare(running, arguments, tokens):
        return None
    if running.layout is not None and _stays_padded(hook, module, arguments, running.layout):
        running.layout, running.packed = None, False
    if running.layout is not None and module in hook.plan.heads:
        _check_labels(arguments.get("labels"), len(running.layout.starts))
        if not hook.plan.by_length(module):
            _unpack(running, module, arguments)
    elif running.layout is not None:
        if "use_cache" in hook.names:
            arguments["use_cache"] = False
        for name in _CACHES:
            if (cache := arguments.pop(name, None)) is not None and running.position_ids is not None:
                sign(cache, running.position_ids, running.real)  # left empty, which the next forward would not notice
    if not hook.takes_positions:
        arguments.pop("position_ids", None)
    return (), arguments


_enter_untraced: Callable[..., Any] = torch.compiler.disable(_enter)  # type: ignore[no-untyped-call]


def prepare(running: Running, arguments: dict[str, Any], tokens: Tensor) -> bool:
    """Fill in what a forward is; False where it is left to transformers."""
    position_ids, attention_mask = arguments.get("position_ids"), arguments.get("attention_mask")
    cache = cache_of(arguments)
    refuse_packed(cache)
    if holds_tokens(cache) or (cache is not None and is_prepared(attention_mask)):
        for positions in (position_ids, given_sequences(arguments, tokens)):
            no_restarts(positions, attention_mask, tokens)
        return False
    check(tokens, position_ids, attention_mask)
    given, plan = given_sequences(arguments, tokens), running.plan
    first = plan.first_position if plan is not None else 0
    if position_ids is None:
        counted = None if goes_on_by_index(running.owner, cache) else attention_mask
        position_ids = (given if given is not None else own_positions(tokens, counted)) + first
    elif position_ids.ndim == 3:
        position_ids = text_positions(position_ids, given, plan is not None and plan.text_plane)
    elif first and cache is None:  # generate counts from 0
        first_or_later(position_ids, attention_mask, first)
    if given is not None:
        agree(position_ids, given, attention_mask)
    rows = tokens.shape[0]
    running.position_ids = position_ids.expand(rows, -1)
    running.real = attention_mask.expand(rows, -1) if attention_mask is not None else None
    running.packed = True
    no_loss_across(arguments, running.position_ids, running.real, plan is not None and plan.shifts_labels)
    if running.plan is not None and running.plan.needs_layout:
        refuse_trace()
        no_transforms(torch._C._functorch.is_batchedtensor(running.position_ids))
        layout = Layout.of(running.position_ids, running.real)
        if layout.packed or (running.plan.mixes and not layout.full):
            running.layout = layout
    return True


def _stays_padded(hook: Enter, module: nn.Module, arguments: dict[str, Any], layout: Layout) -> bool:
    """Whether rows of one padded sequence each are left to transformers, for their caches."""
    if layout.packed:
        return False
    if module in hook.plan.heads and len(layout.starts) < layout.rows:
        raise ValueError(
            f"{type(module).__name__} makes one result of every sequence, and {layout.rows - len(layout.starts)} of "
            f"the {layout.rows} rows hold padding alone. Leave them out."
        )
    cached = arguments.get("use_cache")
    if cached is None and "use_cache" in hook.names and not module.training:
        assert isinstance(module, PreTrainedModel)
        cached = getattr(module.config.get_text_config(), "use_cache", False)
    return bool(cached) or cache_of(arguments) is not None


def _unpack(running: Running, module: nn.Module, arguments: dict[str, Any]) -> None:
    """One row per sequence, for a model that makes one result of a row: its layers then run on padded rows."""
    layout = running.layout
    assert layout is not None
    (group,) = layout.one
    assert isinstance(module, PreTrainedModel)
    if arguments.get("input_ids") is None and len(set(layout.lengths)) > 1 and finds_last_by_padding(module):
        raise NotImplementedError(
            f"{type(module).__name__} finds the last token of a sequence by its padding token, which inputs_embeds do "
            "not tell. Pass input_ids, or sequences of one length."
        )
    pad = getattr(module.config.get_text_config(), "pad_token_id", None) or 0
    for name, value in list(arguments.items()):
        if name == "input_ids" and value is not None:
            arguments[name] = group.take(value, pad)
        elif name not in ("labels", "attention_mask"):
            arguments[name] = group.argument(name, value, whole=True)
    arguments["attention_mask"] = group.real.long()
    running.position_ids = group.take(running.position_ids) if running.position_ids is not None else None
    running.real, running.layout = group.real.long(), None


def _check_labels(labels: Any, sequences: int) -> None:
    if isinstance(labels, Tensor) and labels.shape[0] != sequences:
        raise ValueError(
            f"labels must hold one label for each of the {sequences} packed sequences, in their order, got shape "
            f"{tuple(labels.shape)}."
        )


def entered(module: nn.Module, forward: Callable[..., Any], plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model with one result per row, which `Enter` must have unpacked."""
    if not plan.removed:
        _assert_entered(module)
    return forward(*args, **kwargs)


def _assert_running(module: nn.Module) -> None:
    if RUNNING.get() is None:
        raise RuntimeError(past_the_hooks(type(module).__name__))


_assert_entered: Callable[..., None] = torch.compiler.disable(_assert_running)  # type: ignore[no-untyped-call]


@dataclass
class Leave:
    """Forward hook that ends what `Enter` began, also after an error."""

    plan: Plan

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _leave(module)
        elif self.plan.needs_layout:
            _leave_untraced(module)


def leaving(
    module: nn.Module, forward: Callable[..., Any], plan: Plan, lost: frozenset[str], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a module that `Enter` is on: torch.compile does not call `Leave` after an error.

    Args:
        lost: names of arguments that say where sequences lie, and that only `Enter` hands on.
    """
    if args and args[0] is module:  # Accelerate binds the forward of a model that it unwraps once more
        args = args[1:]
    if not plan.removed and not lost.isdisjoint(kwargs):
        _assert_entered(module)
    try:
        return forward(*args, **kwargs)
    except BaseException:
        _leave_untraced(module)
        raise


def _leave(module: nn.Module) -> None:
    running = RUNNING.get()
    if running is not None and running.owner is module:
        RUNNING.set(running.before)


_leave_untraced: Callable[..., None] = torch.compiler.disable(_leave)  # type: ignore[no-untyped-call]


@dataclass
class Carry:
    """Forward pre-hook on a builder: boundaries in place of the attention_mask."""

    plan: Plan
    names: list[str]
    four: bool

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        compiling = torch.compiler.is_compiling() and not self.plan.needs_layout
        running = None if compiling else RUNNING.get()
        if module.training and self.plan.needs_layout:
            keep_running_in_checkpoints(module)
        if running is SUSPENDED:
            return None
        if module.config._attn_implementation != NAME:
            raise RuntimeError(
                f"{type(module).__name__} attends by {module.config._attn_implementation!r}, set after packattn.patch: "
                "packed sequences would not be isolated. Call .remove() of the Patch first, or patch again after."
            )
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if arguments.get("output_attentions") or module.config.output_attentions:
            raise NotImplementedError(
                "output_attentions=True: packattn never forms the attention weights. Leave it out, or remove the patch."
            )
        if arguments.get("is_causal") and any(
            not getattr(layer, "is_causal", True) for _, layer in self.plan.attention
        ):
            raise NotImplementedError(
                f"is_causal=True: of {type(module).__name__}, which looks both ways, transformers' implementations of "
                "attention make different things then. Leave it out, or remove the patch."
            )
        tokens = tokens_of(arguments)
        if not isinstance(tokens, Tensor) or holds_masks(arguments.get("attention_mask")):
            return None
        if running is None:  # compiled, or called without the model around it
            _assert_unchanged(self.plan)
            running = Running(plan=self.plan)
            if not prepare(running, arguments, tokens):
                return None
        if not running.packed or running.position_ids is None:
            return None
        if arguments.get("encoder_hidden_states") is not None:
            raise NotImplementedError(
                "encoder_hidden_states: cross-attention of a packed row is not supported by packattn. Remove the patch."
            )
        same_sequences(arguments.get("position_ids"), running.position_ids, running.real)
        carried = carry(running.position_ids, running.real, tokens.shape[0])
        arguments["attention_mask"] = Carried(carried) if self.four else carried
        if module.training and not compiling:
            _warn_of_noise(self.plan.builders[-1][1])
        if running.real is not None and module is self.plan.builders[-1][1]:
            _fill_padding(module, arguments, running.real)
        if "position_ids" in self.names and arguments.get("position_ids") is None:
            arguments["position_ids"] = running.position_ids  # before a model derives them from the mask
        return (), arguments


def _fill_padding(module: PreTrainedModel, arguments: dict[str, Any], real: Tensor) -> None:
    """Another token, or embeddings of ones, in the place of padding whose embedding is kept at zero.

    Padding sees no other token here, so that its state would stay zero: where a model divides by its norm (Gemma-3n),
    all gradients would be NaN. Nothing sees what stands there.
    """
    padding = getattr(module.get_input_embeddings(), "padding_idx", None)
    if padding is None:
        return
    if isinstance(ids := arguments.get("input_ids"), Tensor):
        arguments["input_ids"] = ids.where(real != 0, padding + 1 if padding == 0 else padding - 1)
    elif isinstance(embeddings := arguments.get("inputs_embeds"), Tensor):
        arguments["inputs_embeds"] = embeddings.where(real[..., None] != 0, 1.0)


def _warn_of_noise(builder: PreTrainedModel) -> None:
    """Say once that NEFTune's noise, which Trainer puts on the embeddings, does not know the sequences of a row."""
    if hasattr(builder.get_input_embeddings(), "neftune_noise_alpha"):
        warnings.warn(
            "NEFTune divides its noise by the square root of the length of the row, so that a packed sequence gets "
            "less of it than alone. Raise neftune_noise_alpha, or leave it out.",
            stacklevel=2,
        )


def _assert_unchanged(plan: Plan) -> None:
    """What `Check` finds in every eager forward, found while a model is traced: once for each graph."""
    for (name, layer), forward in zip(plan.attention, plan.forwards, strict=True):
        if type(layer).forward is not forward:
            raise RuntimeError(
                f"the forward of {name} was replaced after packattn.patch: packed sequences would not be isolated "
                "there. Apply it before, or leave it out."
            )


def holds_masks(attention_mask: Any) -> bool:
    """Whether a model around this one has made its masks already."""
    if isinstance(attention_mask, dict):
        return any(isinstance(mask, PackedMask) for mask in attention_mask.values())
    return isinstance(attention_mask, (PackedMask, Carried))
