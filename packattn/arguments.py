"""Checks of the numbers and tensors that users give: the one home of what counts as a number, and of errors' words.

Numbers are those of Python and of numpy. A bool is no number, and neither is a tensor: reading one would wait for its
device.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
# Python's, and the sizes of a traced program.
_INTS: tuple[type, ...] = (int, torch.SymInt)
_FLOATS: tuple[type, ...] = (float, torch.SymFloat)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The argument as an int; symbolic ones, as of a traced size, stay what they are.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not in [least, most].
    """
    kind = type(value)
    if kind is not int and (kind is bool or not issubclass(kind, (*_INTS, numbers.Integral))):
        raise TypeError(f"{name} must be an int, got {described(value)}.")
    number: int = value if kind is int or issubclass(kind, _INTS) else int(value)
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an int {bounds}, got {number}.")
    return number


def real(name: str, value: Any, least: float, most: float, *, none: float | None = None) -> float:
    """The argument as a float; `none` is taken besides [least, most].

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not in [least, most], or not a number.
    """
    kind = type(value)
    if kind is not float and (kind is bool or not issubclass(kind, (*_INTS, *_FLOATS, numbers.Real))):
        raise TypeError(f"{name} must be a number, got {described(value)}.")
    try:
        number: float = value if kind is float or issubclass(kind, _FLOATS) else float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not (least <= number <= most or number == none):
        also = "" if none is None else f", or {none:g} for none"
        raise ValueError(f"{name} must be from {least:.10g} to {most:.10g}{also}, got {number}.")
    return number


def described(x: object) -> str:
    """What was given, for an error: a tensor's dtype, shape and device, a number, or the type of anything else."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!s:.40}" if isinstance(x, (str, numbers.Number)) else type(x).__name__
