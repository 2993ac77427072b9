"""The hooks that `patch` puts on a model: module-level callables, so that a patched model can be pickled.

A call of the model goes through `Enter` (which reads the inputs and finds the sequences), `Carry` on the module that
builds masks (`packattn.hf.carry`), `Mark` on every attention layer and `Check` when the layers are done (both in
`packattn.hf.guard`), and `Leave`. Under torch.compile, where no host value is needed, `Enter` only converts seq_idx or
cu_seq_lens to position_ids, and `Carry` works from the arguments of its own module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.cache import CACHES, cache_of, holds_tokens, is_paged, is_prepared
from packattn.hf.conditions import Conditions
from packattn.hf.inputs import (
    agree,
    as_called,
    check,
    first_or_later,
    given_sequences,
    goes_on_by_index,
    is_called,
    modules_around,
    no_loss_across,
    no_restarts,
    no_text_positions_of_media,
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
from packattn.hf.plan import Plan, finds_last_by_padding
from packattn.hf.probe import probe_late
from packattn.hf.running import RUNNING, Running, past_the_hooks

NAME = "packattn"


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
    if not isinstance(tokens, Tensor) or is_paged(arguments):
        return None
    _unchanged_in_a_trace(hook.plan)
    if why := _spoiled_in_a_trace(hook.plan, arguments.get("input_ids") is None and position_ids is None):
        raise NotImplementedError(why)
    conditions = Conditions()
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        no_loss_across(conditions, arguments, position_ids, arguments.get("attention_mask"), hook.plan.shifts_labels)
        conditions.enforce()
    no_text_positions_of_media(arguments, position_ids, hook.plan.planes)
    if position_ids is not None or hook.plan.text_plane:
        return None
    given = given_sequences(conditions, arguments, tokens)
    if given is None:
        return None
    no_loss_across(conditions, arguments, given, arguments.get("attention_mask"), hook.plan.shifts_labels)
    conditions.enforce()
    return as_called(hook.names, args, arguments | {"position_ids": given + hook.plan.first_position})


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
    if before is not None and before.plain:
        return None
    if before is not None and before.plan is hook.plan and module not in hook.plan.entries:
        if hook.plan.unknown and before.position_ids is not None:  # an entry that may make positions of its own
            conditions = Conditions()
            same_sequences(conditions, kwargs.get("position_ids"), before.position_ids, before.real)
            conditions.enforce(before.first)
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
    if is_paged(arguments):
        RUNNING.set(Running(plan=hook.plan, owner=module, before=before, plain=True))
        return None
    refuse_callers(hook.plan.entries, arguments.get("input_ids") is None and arguments.get("position_ids") is None)
    hook.plan.unchanged()
    if hook.plan.not_probed:
        probe_late(hook.plan, tokens)
    running = Running(plan=hook.plan, owner=module, before=before)
    RUNNING.set(running)
    try:
        if not _changed(hook, running, module, arguments, tokens):
            return None
        return as_called(hook.names, args, arguments)
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


def _changed(hook: Enter, running: Running, module: nn.Module, arguments: dict[str, Any], tokens: Tensor) -> bool:
    """Change the arguments to what the layers need; False where the forward is left to transformers."""
    if not prepare(running, arguments, tokens):
        return False
    if running.layout is not None and _stays_padded(hook, module, arguments, running.layout):
        running.layout, running.packed = None, False
    if running.layout is not None and module in hook.plan.heads:
        _check_labels(arguments.get("labels"), len(running.layout.starts))
        running.padding_token = _padding_token(module, arguments.get("input_ids"), running.layout)
        if not hook.plan.by_length(module):
            _unpack(running, module, arguments)
    elif running.layout is not None:
        if "use_cache" in hook.names:
            arguments["use_cache"] = False
        for name in CACHES:
            if (cache := arguments.pop(name, None)) is not None and running.position_ids is not None:
                sign(cache, running.position_ids, running.real)  # left empty, which the next forward would not notice
    if not hook.takes_positions:
        arguments.pop("position_ids", None)
    return True


_enter_untraced: Callable[..., Any] = torch.compiler.disable(_enter)  # type: ignore[no-untyped-call]


def prepare(running: Running, arguments: dict[str, Any], tokens: Tensor) -> bool:
    """Fill in what a forward is; False where it is left to transformers."""
    position_ids, attention_mask = arguments.get("position_ids"), arguments.get("attention_mask")
    cache = cache_of(arguments)
    conditions = Conditions()
    refuse_packed(conditions, cache)
    if holds_tokens(cache) or (cache is not None and is_prepared(attention_mask)):
        for positions in (position_ids, given_sequences(conditions, arguments, tokens)):
            no_restarts(conditions, positions, attention_mask, tokens)
        conditions.enforce(running.first)
        return False
    check(conditions, tokens, position_ids, attention_mask)
    given, plan = given_sequences(conditions, arguments, tokens), running.plan
    no_text_positions_of_media(arguments, position_ids, plan is not None and plan.planes)
    first = plan.first_position if plan is not None else 0
    if position_ids is None:
        running.counted = given is None
        padding = None if goes_on_by_index(running.owner, cache) else attention_mask
        position_ids = (given if given is not None else own_positions(tokens, padding)) + first
    elif position_ids.ndim == 3:
        position_ids = text_positions(conditions, position_ids, given, plan is not None and plan.text_plane)
    elif first and cache is None:  # generate counts from 0
        first_or_later(conditions, position_ids, attention_mask, first)
    if given is not None:
        agree(conditions, position_ids, given, attention_mask)
    rows = tokens.shape[0]
    running.position_ids = position_ids.expand(rows, -1)
    running.real = attention_mask.expand(rows, -1) if attention_mask is not None else None
    running.packed = True
    if not running.plainly_unpacked:
        shifts = plan is not None and plan.shifts_labels
        no_loss_across(conditions, arguments, running.position_ids, running.real, shifts)
    conditions.enforce(running.first)
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
    pad = running.padding_token or getattr(module.config.get_text_config(), "pad_token_id", None) or 0
    for name, value in list(arguments.items()):
        if name == "input_ids" and value is not None:
            arguments[name] = group.take(value, pad)
        elif name not in ("labels", "attention_mask"):
            arguments[name] = group.argument(name, value, whole=True)
    arguments["attention_mask"] = group.real.long()
    running.position_ids = group.take(running.position_ids) if running.position_ids is not None else None
    running.real, running.layout = group.real.long(), None


def _padding_token(module: nn.Module, ids: Tensor | None, layout: Layout) -> int | None:
    """A token that no sequence ends with, where a classifier finds the last token by a padding token and has none."""
    assert isinstance(module, PreTrainedModel)
    if not finds_last_by_padding(module) or getattr(module.config.get_text_config(), "pad_token_id", None) is not None:
        return None
    if ids is None:
        return 0
    last = [start + length - 1 for start, length in zip(layout.starts, layout.lengths, strict=True)]
    ends = set(ids.flatten()[last].tolist())
    return next(token for token in range(len(ends) + 1) if token not in ends)


def with_padding_token(module: nn.Module, forward: Callable[..., Any], plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """The forward of a classifier, which `Enter` may have given a padding token for this call."""
    given = [] if plan.removed else _give_padding_token(module)
    try:
        return forward(*args, **kwargs)
    finally:
        if given:
            _take_padding_token(given)


def _give_to_configs(module: nn.Module) -> list[Any]:
    running = RUNNING.get()
    if running is None or running.padding_token is None or not isinstance(module, PreTrainedModel):
        return []
    configs = {id(config): config for config in (module.config, module.config.get_text_config())}
    given = [config for config in configs.values() if getattr(config, "pad_token_id", None) is None]
    for config in given:
        config.pad_token_id = running.padding_token
    return given


def _take_from_configs(configs: list[Any]) -> None:
    for config in configs:
        config.pad_token_id = None


_give_padding_token: Callable[..., Any] = torch.compiler.disable(_give_to_configs)  # type: ignore[no-untyped-call]
_take_padding_token: Callable[..., None] = torch.compiler.disable(_take_from_configs)  # type: ignore[no-untyped-call]


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


def entering(module: nn.Module, forward: Callable[..., Any], plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that `Enter` is on: PEFT and sentence-transformers call it past the hooks."""
    if args and args[0] is module:  # Accelerate binds the forward of a model that it unwraps once more
        args = args[1:]
    if plan.removed or torch.compiler.is_compiling() or RUNNING.get() is not None or is_called(module):
        return forward(*args, **kwargs)
    return module(*args, **kwargs)


def leaving(
    module: nn.Module, forward: Callable[..., Any], plan: Plan, lost: frozenset[str], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a module that `Enter` is on: torch.compile does not call `Leave` after an error.

    Args:
        lost: names of arguments that say where sequences lie, and that only `Enter` hands on.
    """
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
        if running.plan is not None:
            running.plan.first_forward = False
        RUNNING.set(running.before)


_leave_untraced: Callable[..., None] = torch.compiler.disable(_leave)  # type: ignore[no-untyped-call]
