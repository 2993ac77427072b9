"""What the compiler makes of the kernels, without a GPU: `python benchmarks/static_profile.py` prints and writes a CSV.

For every target and pass, with the tile of the launch table, bf16 and groups of 4 query heads; beside the forward pass
FlexAttention's own Triton template of the installed torch, compiled the same way with the same tile.

registers, spills   of a thread; spills in bytes        shared   bytes a block
blocks, warps       a multiprocessor holds, by registers, shared memory and threads
loop                machine instructions of the main loop (the one without a mask)
per mma             of these for one matrix instruction, whose size differs between targets
per 1k pairs        instructions of all warps for 1,024 pairs of a query and a key: compares kernels of one target
barriers            in the main loop
"""

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import compiled, flex_template
from benchmarks.compiled import GPUS
from packattn.kernels.table import Tile, tile_for

PASSES = ("forward", "FlexAttention", "dq", "dkdv")
GROUP = 4


class Job(NamedTuple):
    """A kernel to compile."""

    target: int | str
    head_dim: int
    kernel: str

    @property
    def tile(self) -> Tile:
        kernel = "forward" if self.kernel == "FlexAttention" else self.kernel
        return tile_for(GPUS[self.target].family, kernel, self.head_dim, torch.bfloat16, GROUP)


def profile(job: Job) -> dict[str, Any]:
    """A line of the table."""
    tile = job.tile
    if job.kernel == "FlexAttention":
        kernel = flex_template.compile_flex(job.target, tile, GROUP, job.head_dim)
    else:
        kernel = compiled.compile_pass(job.kernel, job.target, torch.bfloat16, tile, GROUP, job.head_dim)
    report = compiled.report_of(kernel)
    blocks = compiled.occupancy(report, tile.num_warps, job.target)
    return job._asdict() | {
        "tile": str(tile),
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared,
        "blocks": blocks,
        "warps": blocks * tile.num_warps,
        "loop": report.main.instructions,
        "per mma": round(report.main.instructions / report.main.products, 1),
        "per 1k pairs": round(report.main.instructions * tile.num_warps * 1024 / (tile.block_m * tile.block_n)),
        "barriers": report.main.barriers,
    }


def print_table(lines: list[dict[str, Any]]) -> None:
    names = list(lines[0])
    widths = [max(len(str(line[name])) for line in [*lines, {n: n for n in names}]) for name in names]
    print("  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for line in lines:
        print("  ".join(f"{line[name]!s:>{width}}" for name, width in zip(names, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=[str(target) for target in GPUS], default=list(map(str, GPUS)))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/static_profile.csv"))
    options = parser.parse_args()
    targets = [target for target in GPUS if str(target) in options.targets]
    jobs = [Job(target, dim, kernel) for target in targets for dim in options.head_dims for kernel in PASSES]
    with ProcessPoolExecutor(options.processes) as pool:
        lines = list(tqdm(pool.map(profile, jobs), total=len(jobs)))
    print_table(lines)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
