"""transformers' continuous batching (`generate_batch`) of a patched model, which attends in transformers' own way.

Its manager takes implementations of attention by their names, and sets one of them for as long as it runs. The wrappers
here show it what the model attended by before the patch, and set packattn's attention again at its end. The forwards of
the manager are known by their cache (`packattn.hf.cache.is_paged`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from packattn.hf.plan import Plan

_Implementations = list[tuple[PreTrainedConfig, str | None]]


def wrap_continuous_batching(model: PreTrainedModel, plan: Plan, before: _Implementations) -> list[Callable[[], None]]:
    """Replace what starts continuous batching.

    Args:
        model: has been patched. before: its configs, and the implementation that each of them named.

    Returns:
        Functions that put the model's own methods back.
    """
    restore: list[Callable[[], None]] = []
    for name, wrapper in (
        ("init_continuous_batching", _start),
        ("continuous_batching_context_manager", _started),
    ):
        if hasattr(type(model), name) and name not in vars(model):
            setattr(model, name, partial(wrapper, model, plan, before, partial(getattr(type(model), name), model)))
            restore.append(partial(delattr, model, name))
    return restore


def _start(
    model: PreTrainedModel, plan: Plan, before: _Implementations, start: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    now = _implementations(model)
    _set(before)
    try:
        manager = start(*args, **kwargs)
    except BaseException:
        _set(now)
        raise
    if "stop" not in vars(manager):  # one that is kept is started again
        manager.stop = partial(_stop, plan, now, manager.stop)
    return manager


@contextmanager
def _started(
    model: PreTrainedModel, plan: Plan, before: _Implementations, start: Callable[..., Any], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """A manager that fails while it warms up is not stopped."""
    now = _implementations(model)
    try:
        with start(*args, **kwargs) as manager:
            yield manager
    finally:
        _set(now)


def _stop(plan: Plan, now: _Implementations, stop: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    try:
        stop(*args, **kwargs)
    finally:
        if not plan.removed:
            _set(now)


def _implementations(model: PreTrainedModel) -> _Implementations:
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]


def _set(implementations: _Implementations) -> None:
    for config, name in implementations:
        config._attn_implementation_internal = name
