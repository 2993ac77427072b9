"""The saved state of a stream: whether it is one, and whether it is of this stream and epoch."""

from collections.abc import Mapping
from typing import Any

from packattn.data.values import whole

_COUNTS = (
    "ranks", "workers", "worker", "rows", "pass_rows", "taken", "split", "dropped", "dropped_tokens", "left_out"
)  # fmt: skip
_PLACE = (*_COUNTS, "epoch", "ended", "pass", "digest")


def check_fields(state: object, packing: Mapping[str, Any]) -> None:
    """Refuse what is not the state of a stream; whether it is of this one is asked afterwards.

    Args:
        state: what was given.
        packing: what decides how a stream packs.

    Raises:
        TypeError, ValueError: it lacks a field, or a field cannot be; the message names it.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict of a PackedStream gave, got {type(state).__name__}.")
    missing = [name for name in (*packing, *_PLACE) if name not in state]
    if missing:
        raise ValueError(f"state is not what state_dict of a PackedStream gave: it lacks {', '.join(missing)}.")
    for name in _COUNTS:
        whole(f"{name} of the state", state[name], 0)
    for name in ("epoch", "pass"):
        if state[name] is not None:
            whole(f"{name} of the state", state[name], 0)
    if type(state["ended"]) is not bool:
        raise TypeError(f"ended of the state must be True or False, got {state['ended']!r}.")
    if state["rows_per_epoch"] is not None:
        whole("rows of the state", state["rows"], 0, state["rows_per_epoch"])
    elif state["rows"] != state["pass_rows"]:
        raise ValueError(
            f"state has rows={state['rows']} and pass_rows={state['pass_rows']}, which are the same where an epoch is "
            "a pass; give what state_dict of a PackedStream gave."
        )


def check_same(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a state that was saved with other values than `mine`.

    Raises:
        ValueError: a value differs; the message has both.
    """
    names = [name for name in mine if state[name] != mine[name]]
    if names:
        raise ValueError(
            f"state was saved with {said({name: state[name] for name in names})}, this stream has "
            f"{said({name: mine[name] for name in names})}; go on with the same, or begin without the state."
        )


def of_epoch(state: Mapping[str, Any], epoch: int) -> bool:
    """Whether `state` is to be gone on from in `epoch`; not so if it is of the end of the epoch before.

    Raises:
        ValueError: it is of another epoch.
    """
    if state["epoch"] in (None, epoch):
        return True
    if state["ended"] and state["epoch"] + 1 == epoch:
        return False
    raise ValueError(
        f"the state was saved in epoch {state['epoch']}, and the epoch was set to {epoch}; call "
        f"set_epoch({state['epoch']}) of the stream or its loader before going on."
    )


def said(values: Mapping[str, Any]) -> str:
    """Names and values, for a message."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
