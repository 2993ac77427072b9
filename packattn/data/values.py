"""Checks of numbers that users give, and files that are written whole or not at all."""

import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packattn import arguments


def whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is not an int in [least, most]; numpy's too, since plans, states and reports keep it as it is."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {reprlib.repr(value)}.")
    arguments.whole(name, value, least, most)


def counted(number: int, noun: str) -> str:
    """A number of things in words, "1 example" or "2,000 examples"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def lengths_tensor(lengths: Iterable[int] | Tensor) -> Tensor:
    """Lengths as int64 (n,), contiguous, on the CPU.

    Raises:
        TypeError: they are not integers.
        ValueError: there are none, or one is below 1; the message names the first such example.
    """
    found = _as_tensor(lengths)
    if found.numel() == 0:
        raise ValueError("lengths must hold at least one length, got none.")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {found.dtype}; give the number of tokens of each example.")
    if found.ndim != 1:
        raise ValueError(f"lengths must have shape (n,), got {tuple(found.shape)}.")
    found = found.to("cpu", torch.int64).contiguous()
    if int(found.min()) < 1:
        first = int((found < 1).nonzero()[0])
        said = "is empty" if found[first] == 0 else f"has length {int(found[first])}"
        raise ValueError(
            f"example {first} {said}; lengths must be at least 1: leave out examples without tokens "
            f"({int((found < 1).sum())} of {found.numel()} are below 1)."
        )
    return found


def _as_tensor(lengths: Any) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be a sequence of integers, got {type(lengths).__name__}.")
    try:
        # Copied: torch takes no array that runs backwards, and reads a column of pandas by its index.
        return torch.as_tensor(lengths.__array__().copy() if hasattr(lengths, "__array__") else list(lengths))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be integers: {error}.") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file that appears at `path` whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
