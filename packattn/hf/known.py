"""What packattn knows of the classes of models: known.json, which `benchmarks/known.py` proves and writes.

A module is what defines its forward: a class that inherits one unchanged is the class that it inherits from, as long as
it changes no other function that this forward reaches.
"""

import dis
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from importlib import resources
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

# What these put around a forward is known: the forward inside is what counts.
_LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "kernels",
    "packattn",
    "functools",
    "builtins",
    "trl",
}
_LOSSES = {"loss_function", "_loss_function"}
# Whose functions in the modules of transformers are proven: its kernels work token by token.
_KERNELS = _LIBRARIES | {"liger_kernel"}
# Whose tensors hold weights and nothing else; those of other libraries may compute in ways of their own.
_WEIGHTS = {"torch", "builtins", "bitsandbytes"}


class Part(NamedTuple):
    """A class that was proven.

    Attributes:
        kind: "tokens": works token by token, or only calls other parts. "shifts": the same, with a loss that has a
            token predict the label of the next one. "attends": by transformers' attention interface. "similar" and
            "equal": mixes along the row, and runs by sequence in these groups of `Layout`. "one": gives one result a
            sequence, by sequence. "sequence": a model with one result of every row. "rows": proven on rows of one
            sequence. "beside": never runs on the tokens of a row (towers for images).
        source: a hash of the source of its forward. why: it is "rows", in words; empty: because parts of it are.
    """

    kind: str
    source: str = ""
    why: str = ""


@cache
def table() -> dict[str, Part]:
    """All known parts, by the name that `name_of` gives their forward."""
    return {
        f"{home}.{name}": Part(*value.split(" ", 2))
        for home, names in _file()["parts"].items()
        for name, value in names.items()
    }


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(resources.files("packattn.hf").joinpath("known.json").read_text())
    return found


def part_of(module: nn.Module, trusted: Collection[type] = ()) -> Part | None:
    """What is known of a module, or None.

    Args:
        trusted: classes that the user vouches for: they work token by token, or attend by transformers' interface;
            of weights: they hold weights alone.
    """
    kind, definer = type(module), _definer(type(module))
    if any(weight not in trusted for weight in _odd_weights(module)):
        return None
    if kind in trusted or definer in trusted:
        part = table().get(name_of(inner(kind.forward)))
        return part or Part("attends" if calls_interface(module) else "tokens")
    function = forward_of(module)
    part = table().get(name_of(function))
    if part is None or any(_changes(module, definer, function)):
        return None
    if part.kind == "attends" and transformers.__version__ != _file()["transformers"] and not calls_interface(module):
        return Part("rows", "", "computes attention itself")  # as some did before they took up the interface
    if _is_of_torch(function):
        if isinstance(module, PreTrainedModel):  # that has no forward: its methods are called for images
            return Part("beside")
        if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
            return Part("tokens")
        if getattr(module, "dim", -1) not in (-1, None):
            return Part("rows", "", f"works along dimension {module.dim}")
    return part


def changed(module: nn.Module) -> bool:
    """Whether transformers is newer than the table, and the forward of one of its classes another than it holds."""
    function = forward_of(module)
    part = table().get(name_of(function))
    newer = Version(transformers.__version__) > Version(_file()["transformers"])
    return bool(newer and part and part.source and _home(function).startswith("transformers.")) and (
        hash_of(function) != part.source  # type: ignore[union-attr]
    )


def describe(module: nn.Module) -> str:
    """The class of an unknown module, and what about it is not known where that is not all."""
    kind, function = type(module), forward_of(module)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("__main__.")
    definer = _definer(kind)
    if weights := _odd_weights(module):
        return f"{name} with weights of {weights[0].__module__}.{weights[0].__qualname__}"
    if name_of(function) in table() and (own := {*_changes(module, definer, function)}):
        return f"{name} with {', '.join(sorted(own))} of its own"
    return name if _home(function) == kind.__module__ else f"{name} with the forward {name_of(function)}"


def _odd_weights(module: nn.Module) -> list[type]:
    """The types of the weights of a module that are tensors of another library."""
    kinds = dict.fromkeys(map(type, module._parameters.values()))
    return [kind for kind in kinds if kind.__module__.partition(".")[0] not in _WEIGHTS]


def calls_interface(module: nn.Module) -> bool:
    """Whether the class of a module calls transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in source_of(module)


def looks_up(module: nn.Module, name: str) -> bool:
    """Whether a forward of a module's class, or one that it overrides, looks up a name."""
    forwards = [inner(vars(base)["forward"]) for base in type(module).__mro__ if "forward" in vars(base)]
    return any(name in _names(getattr(forward, "__code__", None)) for forward in forwards)


def source_of(module: nn.Module) -> str:
    """The source of the forward of a module's class; empty for a class made in an interactive session."""
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""


def hash_of(function: Callable[..., Any]) -> str:
    """Eight hexadecimal digits of the source of a function; empty where there is none."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:8]
    except (OSError, TypeError):
        return ""


def name_of(function: Callable[..., Any]) -> str:
    """The qualified name of the class that defines a forward, by the module that its code is from."""
    return (
        f"{_home(function)}.{getattr(function, '__qualname__', type(function).__qualname__).removesuffix('.forward')}"
    )


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The function that is the forward of a module, without what libraries put around it."""
    function = inner(vars(module).get("forward", type(module).forward))
    calls = (nn.Module.__call__, nn.Module._wrapped_call_impl)  # of the module inside of one that torch.compile made
    return inner(type(module).forward) if function in calls else function


def inner(function: Any) -> Callable[..., Any]:
    """A function without the decorators and bindings that libraries put around it."""
    while True:
        around = getattr(function, "__wrapped__", None)
        if isinstance(function, MethodType):
            function = function.__func__
        elif isinstance(function, partial) and around is None:
            ours = _root(function.func) == "packattn"
            function = function.args[1] if ours else function.func
        elif around is not None and _root(function) in _LIBRARIES:
            function = around
        elif "original_forward" in (names := _closes_over(function)):  # of tensor parallelism
            function = names["original_forward"]
        else:
            found: Callable[..., Any] = function
            return found


def _closes_over(function: Any) -> dict[str, Any]:
    """What a function that transformers puts around a forward closes over, by name."""
    if not _home(function).startswith("transformers.distributed."):
        return {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _home(function: Any) -> str:
    code = getattr(function, "func", function) if isinstance(function, partial) else function
    home: str = getattr(code, "__globals__", {}).get("__name__") or type(code).__module__
    return home


def _root(function: Any) -> str:
    return _home(function).partition(".")[0]


def _definer(kind: type) -> type:
    """The class that a class has its forward from; layers of transformers only wrap what they inherit."""
    function = inner(kind.forward)  # type: ignore[attr-defined]
    return [b for b in kind.__mro__ if "forward" in vars(b) and inner(vars(b)["forward"]) is function][-1]


def _is_of_torch(function: Callable[..., Any]) -> bool:
    return _home(function).startswith("torch.nn.modules.")


def _changes(module: nn.Module, definer: type, function: Callable[..., Any]) -> Iterator[str]:
    """What a module, or its class if it inherits the forward, has of its own of what its forward reaches; its hooks."""
    reached = _reached(definer, function)
    for base in type(module).__mro__[: type(module).__mro__.index(definer)]:
        for name, value in vars(base).items():
            if name in reached and _is_foreign(value):
                yield name
    for name, value in vars(module).items():
        if name in reached and _is_foreign(value):
            yield name
    for names, name in globals_of(module):
        if _root(inner(names.get(name))) not in _KERNELS:
            yield f"a function {name}"
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if may_change(hook):
            yield name_of_hook(hook)
    for variant in getattr(module, "lora_variant", {}).values():  # of PEFT: a forward for one adapter
        if name_of(inner(type(variant).forward)) not in table():
            yield type(variant).__name__


def globals_of(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the functions lie that the forward of a module calls by a global name: a namespace, and the name there."""
    function = forward_of(module)
    names: dict[str, Any] = getattr(function, "__globals__", {})
    reached = _reached(_definer(type(module)), function)
    return [(names, name) for name in reached if isinstance(names.get(name), FunctionType)]


def name_of_hook(hook: Any) -> str:
    """A user's hook, in words."""
    return f"the hook {getattr(inner(hook), '__qualname__', type(hook).__qualname__)}"


def may_change(hook: Any) -> bool:
    """Whether a hook is a user's that may change what passes by; those that return nothing only look at it."""
    return _is_foreign(hook) and _returns_something(hook)


def _returns_something(hook: Any) -> bool:
    code = getattr(inner(hook), "__code__", None) or getattr(type(hook).__call__, "__code__", None)
    if code is None:
        return True
    steps = list(dis.get_instructions(code))
    returned = [
        before for before, step in zip([steps[0], *steps], steps, strict=False) if step.opname == "RETURN_VALUE"
    ]
    constants = [step for step in steps if step.opname == "RETURN_CONST"]
    return any("CONST" not in step.opname or step.argval is not None for step in returned + constants)


def _is_foreign(value: Any) -> bool:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not callable(value) or isinstance(value, (type, nn.Module)):
        return False
    return _root(inner(value)) not in _LIBRARIES


@cache
def _reached(definer: type, function: Callable[..., Any]) -> frozenset[str]:
    """The names that a forward, and the methods that it reaches, look up."""
    names, todo = {"__call__", "__getattr__", "__getattribute__"}, [function]
    while todo:
        for name in _names(getattr(todo.pop(), "__code__", None)) - names:
            names.add(name)
            found = inspect.getattr_static(definer, name, None)
            found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            if isinstance(found, FunctionType):
                todo.append(inner(found))
    return frozenset(names - _LOSSES - {"forward", "__init__"})


def _names(code: CodeType | None) -> set[str]:
    if code is None:
        return set()
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))
