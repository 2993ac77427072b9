"""patch: put packed attention into a Hugging Face model through transformers' own interfaces.

An attention function and a mask function are registered under the name "packattn"; the model is told to use them; and
hooks carry position ids and padding to the mask function. Layers that mix along the row without attention run on one
row per sequence (see `packattn.hf.plan` for what is done where).
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, TracebackType
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from packattn.data.examples import PACKING_COLUMNS
from packattn.errors import UnsupportedModelError
from packattn.hf.by_sequence import by_sequence
from packattn.hf.carry import Carry
from packattn.hf.continuous import wrap_continuous_batching
from packattn.hf.guard import Check, CheckResult, Mark
from packattn.hf.hooks import NAME, Enter, Leave, entered, entering, leaving, with_padding_token
from packattn.hf.inputs import EXPLICIT, modules_around, takes_rows
from packattn.hf.plan import Plan, make_plan
from packattn.hf.probe import Probe, first_by_structure, first_position
from packattn.hf.watch import Watch, leave_hooks


class Patch:
    """What `patch` did to a model; a context manager that undoes it.

    Attributes:
        how: "spans" (packed attention in every layer), "by sequence" (some layers run on one row per sequence) or
            "rows" (all layers do). reasons: why, where it is not spans.
    """

    def __init__(self, model: nn.Module, plan: Plan, restore: list[Callable[[], None]]) -> None:
        self._model = model
        self._plan = plan
        self._restore = restore
        self.reasons = list(plan.rows)
        self.how = "rows" if plan.rows else "by sequence" if plan.mixes else "spans"

    def remove(self) -> None:
        """Put the model back as it was. Calling it again does nothing."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        if not self._restore:
            return f"Patch({type(self._model).__name__}, removed)"
        lines = [f"Patch({type(self._model).__name__})"]
        name, builder = self._plan.builders[0]
        probed = [f"  not probed: {self._plan.not_probed}"] if self._plan.not_probed else []
        if self._plan.rows:
            if self._plan.unknown:
                lines.append(f"  {type(self._plan.stack).__name__}: one sequence at a time, unpadded, because")
            else:
                lines.append(
                    f"  {name or type(builder).__name__}: one row per sequence, equal lengths together: a run of"
                )
                lines.append(
                    "  all layers for every length in the batch, unpadded, in transformers' attention, because"
                )
            return "\n".join(lines + [f"    {reason}" for reason in self._plan.rows] + probed)
        for name, builder in self._plan.builders:
            lines.append(f"  masks   {name or type(builder).__name__}: spans from position_ids")
        lines += _counted(self._plan.attention, "packed_attention")
        lines += _counted([(name, m) for name, m, _ in self._plan.by_sequence], "one row per sequence")
        return "\n".join(lines + probed)


def _counted(layers: list[tuple[str, nn.Module]], what: str) -> list[str]:
    counts: dict[str, int] = {}
    for _, module in layers:
        counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return [f"  {count:>3} x    {name}: {what}" for name, count in counts.items()]


def patch(model: nn.Module, *, trusted: Collection[type] = ()) -> Patch:
    """Isolate packed sequences in a Hugging Face model: rows whose position_ids restart, in every call.

    The model takes `input_ids` and `position_ids` of shape (rows, n), and an `attention_mask` (rows, n) if there is
    padding. Rows without position_ids are one sequence each. Forwards over a cache that holds tokens (generate) are
    not packed, and run as transformers does them.

    A model runs on packed rows if packattn knows all its parts: those of transformers and torch, and adapters of PEFT,
    that were proven. With others it runs one sequence at a time.

    Args:
        model: a transformers PreTrainedModel, or a module that wraps one.
        trusted: classes of your own that you vouch for: each gives every token a result that depends on this token
            alone, or on others by transformers' attention interface (ALL_ATTENTION_FUNCTIONS), and no loss across
            sequences. Of weights of another library: a weight and nothing else.

    Returns:
        Patch: `.remove()` undoes it, as does leaving a `with` block.

    Warns:
        UserWarning: the layers of this model cannot run on a packed row, and run on one row per sequence: exact, but
            without what packing saves. The message lists every reason, and every class that packattn does not know.

    Raises:
        UnsupportedModelError: packed sequences cannot be isolated in this model; the message lists every reason, and
            the model is left as it was.
        TypeError: no transformers model, or trusted holds anything but classes.
        ValueError: the model is patched already.
    """
    if isinstance(trusted, type) or not all(isinstance(kind, type) for kind in trusted):
        raise TypeError(f"trusted must be a list of classes, such as [MyLayer], got {trusted!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module that holds a transformers model, got {type(model).__name__}.")
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not pretrained:
        raise TypeError(f"model must be or hold a transformers PreTrainedModel, got {type(model).__name__}.")
    if is_patched(model):
        raise ValueError("model is patched already; call .remove() of the Patch that packattn.patch returned first.")
    plan = make_plan(model, trusted)
    plan.refused += _results_of_rows_around(model)
    if plan.refused:
        raise _unsupported(model, plan.refused)
    builder = plan.builders[-1][1]
    plan.first_position = first_by_structure(builder)
    probe = Probe(plan)
    plan.not_probed = probe.missing
    restore: list[Callable[[], None]] = []
    undo = Patch(model, plan, restore).remove
    try:
        _apply(plan, restore)
        if problem := probe.problem():
            undo()
            own = first_position(builder)
            if own != plan.first_position:  # which shows where the model begins to count, and nothing else
                plan.first_position = own
                _apply(plan, restore)
                problem = probe.problem()
                undo()
            if problem and not plan.rows:
                plan.by_rows([problem])
                _apply(plan, restore)
                problem = probe.problem()
                undo()
            if problem:
                raise _unsupported(model, [*plan.rows, problem])
            _apply(plan, restore)
    except BaseException:
        undo()
        raise
    plan.first_forward = True  # those of the probe are not the user's
    plan.unchanged = Watch(model, plan, trusted).check
    restore.append(partial(leave_hooks, model))
    _warn(model, plan)
    return Patch(model, plan, restore)


def _unsupported(model: nn.Module, reasons: list[str]) -> UnsupportedModelError:
    listed = "\n".join(f"  - {reason}" for reason in reasons)
    return UnsupportedModelError(
        f"packattn cannot isolate packed sequences in {type(model).__name__}:\n{listed}\nTrain it unpacked, one "
        "example a row."
    )


def _warn(model: nn.Module, plan: Plan) -> None:
    """Say what the user may not expect of how the model runs."""
    name = type(model).__name__
    if plan.unknown:
        warnings.warn(
            f"packattn runs {type(plan.stack).__name__} of {name} on one sequence at a time, which is exact but saves "
            f"nothing: {'; '.join(plan.rows)}. Where these classes work token by token, or attend by transformers' "
            "attention interface, vouch for them: packattn.patch(model, trusted=[...]).",
            stacklevel=3,
        )
    elif plan.rows:
        warnings.warn(
            f"packattn runs the layers of {name} on one row per sequence, once for every length in the batch, which is "
            "exact but saves little: " + "; ".join(plan.rows),
            stacklevel=3,
        )
    if plan.changed:
        warnings.warn(
            f"this transformers is newer than those that packattn was proven on, and {', '.join(plan.changed)} of "
            f"{name} changed since: {plan.not_probed or 'a small forward found packed sequences isolated'}. Run "
            "packattn.verify(model), or take an older transformers.",
            stacklevel=3,
        )


def _results_of_rows_around(model: nn.Module) -> list[str]:
    """Reasons not to patch a model inside of others that make one result, or one loss, of every row."""
    return [
        f"it is a part of a {type(head).__name__}, which works out one result of every row: call packattn.patch on that"
        for head in modules_around([model], takes_rows)
    ]


def is_patched(model: nn.Module) -> bool:
    """Whether hooks of a patch are on the model."""
    return any(isinstance(hook, Enter) for module in model.modules() for hook in module._forward_pre_hooks.values())


def configs_of(pretrained: list[PreTrainedModel]) -> list[PreTrainedConfig]:
    """The configs that say how the models attend, each once."""
    return list({id(module.config): module.config for module in pretrained}.values())


def _apply(plan: Plan, restore: list[Callable[[], None]]) -> None:
    builders = [builder for _, builder in plan.builders]
    inner = builders[-1]
    plan.removed = False
    restore.append(partial(setattr, plan, "removed", True))
    for module in dict.fromkeys([*plan.entries, *builders]):
        hook = Enter(
            plan, list(inspect.signature(module.forward).parameters), "position_ids" not in _lost(module, inner)
        )
        restore.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    if plan.rows:
        for config in configs_of([*builders, *plan.entries]):
            if config._attn_implementation == NAME:  # loaded so
                restore.append(_set_implementation(inner, config, "eager"))
        assert plan.stack is not None
        restore.append(_wrap(plan.stack, by_sequence, plan, plan.together))
    else:
        configs = configs_of([*builders, *plan.entries])
        before = [(c, "sdpa" if c._attn_implementation == NAME else c._attn_implementation) for c in configs]
        for entry in plan.entries:
            restore += wrap_continuous_batching(entry, plan, before)
        for config in configs:
            restore.append(_set_implementation(inner, config, NAME))
        for builder in builders:
            four = bool(re.search(r"attention_mask\.(view|reshape)\(", inspect.getsource(type(builder))))
            carry = Carry(plan, list(inspect.signature(builder.forward).parameters), four)
            restore.append(builder.register_forward_pre_hook(carry, with_kwargs=True).remove)
        restore.append(builders[0].register_forward_hook(Check(plan), with_kwargs=True).remove)
        for entry in plan.entries:
            if entry not in builders:
                check = CheckResult(plan, list(inspect.signature(entry.forward).parameters))
                restore.append(entry.register_forward_hook(check, with_kwargs=True).remove)
        for _, module in plan.attention:
            restore.append(module.register_forward_pre_hook(Mark()).remove)
        for _, module, kind in plan.by_sequence:
            restore.append(_wrap(module, by_sequence, plan, kind))
    for entry in plan.heads:
        if not plan.by_length(entry):
            restore.append(_wrap(entry, entered, plan))
        elif not plan.rows or entry is not plan.stack:
            restore.append(_wrap(entry, by_sequence, plan, plan.together))
        restore.append(_wrap(entry, with_padding_token, plan))
    for module in dict.fromkeys([*plan.entries, *builders]):
        restore.append(module.register_forward_hook(Leave(plan), always_call=True).remove)
        if plan.needs_layout or "position_ids" not in inspect.signature(module.forward).parameters:
            lost = _lost(module, inner) if plan.needs_layout else frozenset()
            restore.append(_wrap(module, leaving, plan, lost))
        restore.append(_wrap(module, entering, plan))


def _lost(module: nn.Module, inner: nn.Module) -> frozenset[str]:
    """What says where sequences lie, and does not reach the inner model through the arguments of a module."""
    parameters = inspect.signature(module.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    reached = {*parameters, *(inspect.signature(inner.forward).parameters if passes_on else ())}
    return frozenset({"position_ids", *EXPLICIT} - reached)


@dataclass(eq=False)
class _Held:
    """A config while models that share it are patched: what it said before the first, and what is left of them."""

    before: str | None
    models: WeakSet[nn.Module] = field(default_factory=WeakSet)


# By the id of a config, which lives as long as a Patch that can put it back.
_HELD: WeakValueDictionary[int, _Held] = WeakValueDictionary()


def _set_implementation(model: nn.Module, config: PreTrainedConfig, name: str) -> Callable[[], None]:
    """Let the config of a model say how it attends, until the last of those that share it is put back."""
    held = _HELD.setdefault(id(config), _Held(config._attn_implementation))
    held.models.add(model)

    def restore() -> None:
        held.models.discard(model)
        if not held.models:
            config._attn_implementation_internal = held.before

    config._attn_implementation_internal = name
    return restore


class _Forward(partial[Any]):
    """What stands in the place of a forward, with the signature of that.

    Trainer drops columns that the signature does not name. It reads of every patched model that it takes the columns
    that say where sequences lie and what is a target: without position_ids packed rows would lose their boundaries
    (Mamba, BLOOM), without completion_mask prompts would be trained on. generate reads the own signature, since it
    would make position_ids.
    """

    own_signature: inspect.Signature

    @property
    def __signature__(self) -> inspect.Signature:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_set_signature_columns_if_needed":
            frame = frame.f_back
        parameters = dict(self.own_signature.parameters)
        if frame is None:
            return self.own_signature
        rest = [parameters.pop(name) for name, p in self.own_signature.parameters.items() if p.kind is p.VAR_KEYWORD]
        for name in PACKING_COLUMNS:
            parameters.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
        return self.own_signature.replace(parameters=[*parameters.values(), *rest])


def _wrap(module: nn.Module, wrapper: Callable[..., Any], *options: Any) -> Callable[[], None]:
    before = vars(module).get("forward")
    own = before if before is not None else partial(type(module).forward, module)
    forward: Any = _Forward(wrapper, module, own, *options)
    forward.own_signature = inspect.signature(module.forward)
    module.forward = forward

    def restore() -> None:
        if vars(module).get("forward") is not forward:
            return  # something was put around it since (the hooks of Accelerate), and stays
        if before is None:
            del module.forward
        else:
            module.forward = before

    return restore
