"""Speed bounded, not timed: what the counts of our compiled kernels allow on A100, A10, RTX 4090, H100 and H200.

The launches of one training step, bound by Triton's own JIT, run in the PTX emulator with its profile on, on lengths
drawn from the real sets (up to 4,096 tokens each). Counts over published throughputs give a lower bound of the time:
it knows no latency, and is an aid to comparison. Beside them runs plain.py, a kernel of the FlashAttention-2 kind.

limit    the resource that sets the bound        idle     share of the SMs' time lost to uneven tiles and their order
tensor   share of the tensor peak at the bound   bank     wavefronts of shared memory over those without conflicts
bytes    share of the bytes of touched sectors that was asked for        tiles    programs a multiprocessor
"""

import argparse
import copy
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import emulated, packs, plain
from benchmarks.compiled import GPUS
from packattn import PackedMask
from packattn.kernels import launch
from packattn.kernels.table import tile_for

sys.path.append(str(Path(__file__).parent.parent / "tests" / "ptxemu"))
import ptx_bound
from ptxemu import Profile, run_triton

# A kernel compiled for sm_86 stands for sm_89 too: the tiles and the PTX are the same.
ARCHES = {"A100": 80, "A10": 86, "RTX 4090": 86, "H100": 90, "H200": 90}
SETS = ("math", "short tasks")


class Shape(NamedTuple):
    """Heads of a model: those of SmolLM2-135M, of Llama-3-8B, and of the latter over four GPUs."""

    heads_q: int
    heads_k: int
    head_dim: int


SHAPES = {
    "head dim 64, 9 heads on 3": Shape(9, 3, 64),
    "head dim 128, 8 heads on 2": Shape(8, 2, 128),
    "head dim 128, 32 heads on 8": Shape(32, 8, 128),
}


def _tensors(tokens: int, shape: Shape) -> list[torch.Tensor]:
    """q, k, v and dout of one key head; every other has the same counts."""
    group = shape.heads_q // shape.heads_k
    return [torch.zeros(tokens, heads, shape.head_dim, dtype=torch.bfloat16) for heads in (group, 1, 1, group)]


def of_all_heads(profile: Profile, heads: int, inner: int) -> Profile:
    """The profile of a launch over `heads` key heads, made of that of one: `inner` programs of a head lie together."""
    profile.counts = {
        name: np.repeat(values.reshape(-1, 1, inner), heads, axis=1).ravel() for name, values in profile.counts.items()
    }
    profile.ctas *= heads
    profile.sectors = np.tile(profile.sectors, heads)
    return profile


def in_order(profile: Profile, order: torch.Tensor) -> Profile:
    """The profile of a launch whose tiles go in this order, of that of one whose tiles go as they lie."""
    ordered = copy.copy(profile)
    ordered.counts = {
        name: values.reshape(len(order), -1)[order.numpy()].ravel() for name, values in profile.counts.items()
    }
    return ordered


def orders(lengths: list[int], shape: Shape, gpu: str) -> dict[str, torch.Tensor]:
    """The order of the tiles of forward, dq and dkdv, by the name of the GPU."""
    sms = ptx_bound.GPUS[gpu].sms
    mask = PackedMask.causal(lengths=lengths)
    heads = (shape.heads_q, shape.heads_k, shape.head_dim, shape.head_dim)
    with emulated.launches(ARCHES[gpu], lambda *_: None), patch.object(launch, "multiprocessors", lambda device: sms):
        plan = launch.plan(*heads, torch.bfloat16, mask.k_start.device)
        order = launch.launch_order(*mask[:4], *heads, torch.bfloat16)
    tiles = plan.tiles(sum(lengths), sum(lengths))
    return dict(zip(("forward", "dq", "dkdv"), order.split(tiles), strict=True))


def profile_ours(lengths: list[int], shape: Shape, arch: int, only: str | None = None) -> dict[str, Profile]:
    """The profiles of the launches of a step, forward, delta, dq, dkdv (or `only` one), their tiles as they lie."""
    q, k, v, dout = _tensors(sum(lengths), shape)
    mask = PackedMask.causal(lengths=lengths)
    profiles: dict[str, Profile] = {}

    def run(compiled: Any, grid: tuple[int, ...], names: list[str], values: list[Any]) -> None:
        kind = compiled.metadata.name.removeprefix("_").removesuffix("_kernel").removeprefix("bwd_")
        kind = kind.replace("fwd", "forward")
        if only not in (None, kind):
            return
        profile = Profile(kind)
        emulated.emulate(compiled, grid, names, values, profile=profile)
        inner = {"dkdv": plan.split(len(k)), "delta": profile.ctas}.get(kind, 1)
        profiles[kind] = of_all_heads(profile, shape.heads_k, inner)

    # As many programs as all key heads have decide about the split.
    with (
        emulated.launches(arch, run),
        patch.object(launch, "_ENOUGH_PROGRAMS", launch._ENOUGH_PROGRAMS / shape.heads_k),
    ):
        plan = launch.plan(q.shape[1], 1, shape.head_dim, shape.head_dim, q.dtype, q.device)
        lying = torch.cat([torch.arange(n).int() for n in plan.tiles(len(q), len(q))])
        rest = (lying, None, None, None, None, shape.head_dim**-0.5, 0.0, 0.0)
        out, lse, norm = launch.forward(q, k, v, *mask[:4], *rest)
        launch.backward(dout, None, q, k, v, out, lse, norm, *mask[:4], *rest)
    return profiles


def profile_plain(lengths: list[int], shape: Shape, arch: int) -> dict[str, Profile]:
    """The profiles of plain.py: forward, backward."""
    q, k, v, dout = _tensors(sum(lengths), shape)
    tokens, group, width = q.shape
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.zeros(2, group, tokens)
    common: dict[str, Any] = {"cu_ptr": ends, "tokens": tokens, "heads": group, "scale": width**-0.5}
    constants = {"GROUP": group, "D": width}
    grid = (-(-max(lengths) // 128), group, len(lengths))
    profiles = {"forward": Profile("forward"), "backward": Profile("backward")}
    run_triton(
        plain.plain_forward, grid,
        {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": torch.empty_like(q), "lse_ptr": rows[0]} | common,
        constants | {"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4 if width <= 64 else 8, num_stages=2, arch=arch,
        profile=profiles["forward"],
    )  # fmt: skip
    dq, dk, dv = torch.zeros(q.shape), torch.empty_like(q), torch.empty_like(q)
    run_triton(
        plain.plain_backward, grid,
        {"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout, "lse_ptr": rows[0], "delta_ptr": rows[1], "dq_ptr": dq,
         "dk_ptr": dk, "dv_ptr": dv} | common,
        constants | {"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=2, arch=arch,
        profile=profiles["backward"],
    )  # fmt: skip
    return {name: of_all_heads(profile, shape.heads_k, grid[0] * group) for name, profile in profiles.items()}


def conflicts(profile: Profile) -> float:
    """Wavefronts of shared memory over those that it would take without bank conflicts."""
    least = profile.total("minimum")
    return profile.total("wavefronts") / least if least else 1.0


def bytes_used(profile: Profile) -> float:
    """Share of the bytes of the touched sectors of global memory that was asked for."""
    names = [name.removesuffix(" sectors") for name in profile.counts if name.endswith(" sectors")]  # cp.async too
    asked, touched = (sum(profile[f"{name} {what}"] for name in names) for what in ("bytes", "sectors"))
    return asked / (32 * touched)


def microseconds(profile: Profile, gpu: str) -> float:
    """The bound of a launch, by the name of the GPU."""
    return ptx_bound.bound(profile, ptx_bound.GPUS[gpu]).time * 1e6


def other_passes(tokens: int, shape: Shape, gpu: str) -> float:
    """Microseconds of memory traffic that plain.py leaves to further launches, as FlashAttention-2 does.

    delta; a float32 dq set to zero and rounded at the end; dk and dv of all query heads summed to the key heads.
    """
    q, kv = shape.heads_q * shape.head_dim, shape.heads_k * shape.head_dim
    summed = 2 * (2 * q + 2 * kv) if shape.heads_q > shape.heads_k else 0
    return tokens * (4 * q + 4 * q + 6 * q + summed) / ptx_bound.GPUS[gpu].dram * 1e6


def sum_of_shares(dkdv: Profile, tokens: int, shape: Shape, gpu: str) -> float:
    """Microseconds of memory traffic to add the float32 shares of dk and dv, where dK/dV is split; else 0."""
    tile = tile_for(GPUS[ARCHES[gpu]].family, "dkdv", shape.head_dim, torch.bfloat16, shape.heads_q // shape.heads_k)
    split = dkdv.ctas // (-(-tokens // tile.block_n) * shape.heads_k)
    numbers = tokens * shape.heads_k * 2 * shape.head_dim
    return 0.0 if split == 1 else numbers * (4 * split + 2) / ptx_bound.GPUS[gpu].dram * 1e6


def figures(profile: Profile, gpu: ptx_bound.GPU) -> dict[str, Any]:
    """A line of the report."""
    made = ptx_bound.bound(profile, gpu)
    return {
        "microseconds": made.time * 1e6, "limit": made.limit, "idle": made.idle, "tensor": made.tensor_share,
        "bank": conflicts(profile), "bytes": bytes_used(profile), "tiles": profile.ctas / gpu.sms,
        "times": {name: seconds * 1e6 for name, seconds in made.times.items()},
    }  # fmt: skip


Key = tuple[str, str, str, str]  # set, shape, GPU, kernels


def _run(job: tuple[str, list[int], str, int, str]) -> dict[Key, dict[str, Profile]]:
    name, lengths, shape, arch, kind = job
    gpus = [gpu for gpu, which in ARCHES.items() if which == arch]
    if kind == "plain":
        found = profile_plain(lengths, SHAPES[shape], arch)
        return {(name, shape, gpu, kind): found for gpu in gpus}
    found = profile_ours(lengths, SHAPES[shape], arch)
    profiles = {(name, shape, gpu, "as they lie"): found for gpu in gpus}
    for gpu in gpus:
        chosen = orders(lengths, SHAPES[shape], gpu)
        profiles[name, shape, gpu, "ours"] = {
            kernel: in_order(profile, chosen[kernel]) if kernel in chosen else profile
            for kernel, profile in found.items()
        }
    return profiles


def report(profiles: dict[Key, dict[str, Profile]], tokens: int) -> list[dict[str, Any]]:
    """Print the table; its lines as a list."""
    lines = []
    for name, shape in dict.fromkeys((key[0], key[1]) for key in profiles):
        for gpu in dict.fromkeys(key[2] for key in profiles):
            print(f"\n{name}, {shape}, {gpu}: lower bounds from counts, not timings")
            print(
                f"{'':24}{'us':>8} {'limit':10}{'idle':>6}{'tensor':>8}{'bank':>7}{'bytes':>7}{'tiles':>7}   us of each"
            )
            totals = {}
            for kind in ("ours", "as they lie", "plain"):
                found = profiles.get((name, shape, gpu, kind))
                if found is None:
                    continue
                for kernel, profile in found.items():
                    line = figures(profile, ptx_bound.GPUS[gpu])
                    lines.append({"set": name, "shape": shape, "gpu": gpu, "kind": kind, "kernel": kernel} | line)
                    times = " ".join(f"{unit} {value:.1f}" for unit, value in line["times"].items() if value >= 0.05)
                    print(
                        f"{kind + ' ' + kernel:24}{line['microseconds']:8.1f} {line['limit']:10}{line['idle']:6.0%}"
                        f"{line['tensor']:8.0%}{line['bank']:7.2f}{line['bytes']:7.0%}{line['tiles']:7.1f}   {times}"
                    )
                    totals.setdefault(kind, []).append(line["microseconds"])
                if "dkdv" in found and (shares := sum_of_shares(found["dkdv"], tokens, SHAPES[shape], gpu)):
                    totals[kind].append(shares)
                    print(f"{kind + ' sum of shares':24}{shares:8.1f} DRAM")
            if "plain" in totals:
                others = other_passes(tokens, SHAPES[shape], gpu)
                totals["plain"].append(others)
                print(
                    f"{'plain other passes':24}{others:8.1f} DRAM      delta, dq to zero and rounded, dk and dv summed"
                )
            if "ours" in totals and "plain" in totals:
                forward = totals["plain"][0] / totals["ours"][0]
                step = sum(totals["plain"]) / sum(totals["ours"])
                print(f"plain over ours: forward {forward:.2f}x, forward and backward {step:.2f}x")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="length of the stream")
    parser.add_argument("--sets", nargs="+", choices=packs.NAMES, default=list(SETS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gpus", nargs="+", choices=ARCHES, default=list(ARCHES))
    parser.add_argument("--kinds", nargs="+", choices=("ours", "plain"), default=["ours", "plain"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_bound.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = {name: packs.draw(name, options.tokens, 4096) for name in options.sets}
    jobs = [
        (name, lengths, shape, arch, kind)
        for name, lengths in drawn.items()
        for shape in options.shapes
        for arch in dict.fromkeys(ARCHES[gpu] for gpu in options.gpus)
        for kind in options.kinds
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        profiles = {key: found for part in tqdm(pool.map(_run, jobs), total=len(jobs)) for key, found in part.items()}
    options.out.write_text(json.dumps(report(profiles, options.tokens), indent=1))
    print(f"\nall figures: {options.out}")


if __name__ == "__main__":
    main()
