"""Time the tiles of a pass on a machine with a GPU: `python -m benchmarks.tiles --time` takes its figures from here."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import packs
from packattn import PackedMask
from packattn.kernels import launch
from packattn.kernels.table import Tile, tile_for

_REPEATS = 15
_SETS = ("math", "short tasks")


def _problem(device: torch.device, dtype: torch.dtype, dim: int, group: int, tokens: int, name: str) -> list[Any]:
    """The arguments of the forward operator: q, k, v and a causal mask of real lengths, with the order of its tiles."""
    generator = torch.Generator(device).manual_seed(0)
    heads_k = max(1, 16 // group)
    q, k, v = (
        torch.randn(tokens, heads, dim, generator=generator, device=device).to(dtype)
        for heads in (heads_k * group, heads_k, heads_k)
    )
    spans = [x.to(device) for x in PackedMask.causal(lengths=packs.draw(name, tokens, 4096))[:4]]
    order = launch.launch_order(*spans, heads_k * group, heads_k, dim, dim, dtype)
    return [q, k, v, *spans, order, None, None, None, None, dim**-0.5, 0.0, 0.0]


def with_tile(name: str, tile: Tile) -> AbstractContextManager[Any]:
    """Inside, the pass `name` takes `tile`, the others what the table has."""

    def chosen(family: str, which: str, dim: int, dtype: torch.dtype, group: int) -> Tile:
        return tile if which == name else tile_for(family, which, dim, dtype, group)

    return patch.object(launch, "tile_for", chosen)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def time_tiles(
    device: torch.device, name: str, dtype: torch.dtype, dim: int, group: int, tiles: list[Tile], tokens: int = 16_384
) -> dict[Tile, float]:
    """Seconds of the forward pass ("forward") or of the backward pass ("dq", "dkdv") with each tile.

    Medians of interleaved runs, summed over real length sets. Tiles that the GPU refuses, for want of shared memory
    or registers, are left out with a word.
    """
    times: dict[Tile, list[list[float]]] = {tile: [[] for _ in _SETS] for tile in tiles}
    for i, set_name in enumerate(_SETS):
        for repeat in range(_REPEATS + 1):
            for tile in list(times):
                with with_tile(name, tile):
                    problem = _problem(device, dtype, dim, group, tokens, set_name)
                    try:
                        out, *saved = launch.forward(*problem)
                        call = (
                            (lambda p=problem: launch.forward(*p))
                            if name == "forward"
                            else lambda p=problem, o=out, s=saved: launch.backward(o, None, *p[:3], o, *s, *p[3:])
                        )
                        taken = _seconds(call, device)
                    except Exception as error:  # what a GPU refuses is no candidate
                        print(f"{name} {tile} left out: {type(error).__name__}: {str(error)[:100]}")
                        del times[tile]
                        continue
                if repeat > 0:  # the first run compiles
                    times[tile][i].append(taken)
    return {tile: sum(map(statistics.median, runs)) for tile, runs in times.items()}
