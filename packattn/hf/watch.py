"""Whether a patched model is still made of the parts that were planned: some microseconds in every forward."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from torch import nn

from packattn.hf.known import Part, describe, globals_of, may_change, name_of_hook
from packattn.hf.plan import Plan, parts_of

_OF_TOKENS = ("tokens", "shifts", "beside")


@dataclass
class OnlyLooks:
    """A user's hook that was put on after the patch: it may look at what passes by, and not change it."""

    hook: Callable[..., Any]
    kind: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.hook(*args, **kwargs) is not None:
            raise RuntimeError(
                f"{self.kind} with {name_of_hook(self.hook)} of its own, which was put on after packattn.patch and "
                "returned something: packed sequences may not be isolated. Return None, patch again after it, or vouch "
                "for it by the class that it is on: packattn.patch(model, trusted=[...])."
            )


def leave_hooks(model: nn.Module) -> None:
    """Put back the hooks that `OnlyLooks` stands for."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                if isinstance(hook, OnlyLooks):
                    hooks[key] = hook.hook


class Watch:
    """The modules of a model, the forwards that were put on them, and the types of their weights.

    Args:
        model: the outermost module that was patched. plan: what runs where in it. trusted: as for `patch`.
    """

    def __init__(self, model: nn.Module, plan: Plan, trusted: Collection[type] = ()) -> None:
        self.model, self.plan, self.trusted = model, plan, trusted
        self.look()

    def look(self) -> None:
        """Take what is there now for what is to be there."""
        self.modules = list(self.model.modules())
        made = {id(module): _made_of(module, part) for module, part, _ in self._parts()}
        self.kept = [made.get(id(module)) for module in self.modules]
        self._view()
        self.before = self._now()

    def _view(self) -> None:
        """Where to look, which a copy of the model has to find again."""
        self.kinds: list[type[nn.Module]] = list(dict.fromkeys(map(type, self.modules)))
        self.states = [vars(module) for module in self.modules]
        self.children = [module._modules for module in self.modules]
        self.weights = [module._parameters for module in self.modules]
        self.hooks = [hooks for m in self.modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self.judged = {key for hooks in self.hooks for key in hooks}  # of all hooks of the process, by torch
        self.adapted = [m._forward_pre_hooks for m in self.modules if _is_of_peft(m)]
        functions = {(id(names), name): (names, name) for m in self.modules for names, name in globals_of(m)}
        self.names = [names for names, _ in functions.values()], [name for _, name in functions.values()]
        self.functions = self._functions()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "plan", "trusted", "modules", "kept", "before")
        return {name: vars(self)[name] for name in kept}

    def _now(self) -> list[list[Any]]:
        return [
            list(map(type, self.modules)),
            list(map(dict.get, self.states, repeat("forward"))),
            list(chain.from_iterable(map(dict.values, self.children))),
            list(map(type, chain.from_iterable(map(dict.values, self.weights)))),
            [kind.forward for kind in self.kinds],
            list(map(len, self.states)),
            list(chain.from_iterable(self.hooks)),
        ]

    def _functions(self) -> list[Any]:
        return list(map(dict.get, *self.names))

    def _parts(self) -> Iterator[tuple[nn.Module, Part | None, bool]]:
        return parts_of(self.model, {*self.plan.builders[-1][1].modules()}, self.trusted)

    def check(self) -> None:
        """Raise where the model is not the one that was planned; parts that are known to be of tokens may join it.

        Raises:
            RuntimeError: the message names what was put into the model.
            NotImplementedError: the call names an adapter for each row.
        """
        if "states" not in vars(self):
            self._view()
        if any(self.adapted):
            hooks = chain.from_iterable(map(dict.values, self.adapted))
            if any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
                raise NotImplementedError(
                    "adapter_names: PEFT takes one adapter for each row of a batch, and a packed row holds many "
                    "examples. Leave it out, and set one adapter for the call."
                )
        if self._now() == self.before and self._functions() == self.functions:
            return
        planned = {id(module): kind for _, module, kind in self.plan.by_sequence}
        planned |= {id(module): "attends" for _, module in self.plan.attention}
        names = {id(module): name for name, module in self.model.named_modules()}
        stack = self.plan.stack if self.plan.unknown else None
        alone = {id(module) for module in stack.modules()} if stack is not None else set()
        kept = dict(zip(map(id, self.modules), self.kept, strict=True))
        self._guard_new_hooks(alone)
        odd = []
        for module, part, mixer in self._parts():
            same = kept.get(id(module)) == _made_of(module, part)
            known = part is not None and (mixer or part.kind in _OF_TOKENS or planned.get(id(module)) == part.kind)
            if not known and (part is not None or id(module) not in alone) and not same:
                odd.append(f"{names[id(module)] or 'the model'} ({describe(module)})")
        if odd:
            raise RuntimeError(
                f"{', '.join(odd)}: changed or put into the model after packattn.patch, which planned nothing for it, "
                "so that packed sequences may not be isolated. Call .remove() of the Patch first, and packattn.patch "
                "again after."
            )
        self.look()

    def _guard_new_hooks(self, alone: Collection[int]) -> None:
        """Let hooks that came after the patch only look, but for those on parts that run one sequence at a time."""
        for module in self.model.modules():
            if id(module) in alone or type(module) in self.trusted:
                continue
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in hooks.keys() - self.judged:
                    if may_change(hooks[key]):
                        hooks[key] = OnlyLooks(hooks[key], type(module).__name__)


def _made_of(module: nn.Module, part: Part | None) -> tuple[Any, ...]:
    weights = [*map(type, module._parameters.values())]
    return type(module), vars(module).get("forward"), type(module).forward, weights, part


def _is_of_peft(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)
