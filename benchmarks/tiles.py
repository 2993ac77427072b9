"""Write the launch table: `python -m benchmarks.tiles` (about an hour on two cores), or `--time` on a GPU.

Without a GPU each candidate is compiled for its family and ranked by an estimate of the cycles of one multiprocessor
for a useful pair of query and key:

    cycles = waste * max(issue, tensor, shared) / hiding

waste    executed over useful pairs of this tile on real lengths (math, short tasks and functions capped at 4,096)
issue    instructions of the main loop * warps / (4 schedulers * pairs of a tile)
tensor   multiply-adds of a pair, parts of the head dim included, over the rate of the tensor cores
shared   wavefronts of shared memory of the main loop * warps / pairs of a tile
hiding   how well resident warps hide latency: 0.5 + 0.125 * warps of a scheduler, at most 1

For the head dims 64 and 128 of sm80 and sm86 the numerator is the bound of benchmarks/gpu_bound.py instead: the pass
with the candidate runs in the PTX emulator on real lengths, ragged edges, prologues and the masked loop included.

A candidate that does not fit is out; one that spills, stores to shared memory or waits at more than three barriers in
the main loop (sm_80 to sm_89, sm_120), or misses wgmma (sm_90) pays a factor. With `--time` the candidates are run
instead, interleaved, and the table gets the fastest.
"""

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import compiled, gpu_bound, packs, timing
from packattn.kernels import table
from packattn.kernels.table import DIMS, FAMILIES, TABLE, Tile

ARCHES: dict[str, int | str] = {"sm80": 80, "sm86": 86, "sm90": 90, "sm100": 100, "gfx9": "gfx942"}
PASSES = ("forward", "dq", "dkdv")
GROUPS = {"alone": 1, "grouped": 4}
_EMULATED_TOKENS = 1024
Cell = tuple[str, str, torch.dtype, int]


def candidates(family: str, name: str, dtype: torch.dtype, dim: int) -> list[Tile]:
    """Tiles worth compiling: (BLOCK_M, BLOCK_N, warps, stages) by head dim; dK/dV has keys for rows."""
    large = family in ("sm90", "sm100")  # operands stay in shared memory, accumulators may fill the registers
    if dtype == torch.float32:  # products are unrolled multiply-adds: large tiles of wide heads take minutes to compile
        blocks = [(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)] if dim > 64 else [(64, 32, 4, 1), (32, 32, 4, 1)]
        blocks = blocks if dim <= 256 else [(16, 16, 4, 1), (8, 8, 4, 1), (8, 8, 2, 1)]
    elif dim <= 64:
        blocks = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 4, 3), (64, 32, 4, 3)]
        blocks += [] if large else [(64, 32, 2, 3), (64, 16, 2, 3), (32, 16, 1, 3)]
    elif dim <= 128:
        blocks = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2)]
        blocks += [(64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)]
        # 32 rows a warp: half the reads of shared memory, as far as the registers go
        blocks += [] if large else [(128, 16, 4, 3), (128, 32, 4, 2), (64, 16, 2, 3)]
    elif dim <= 256:
        blocks = [(128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)]
        blocks += [(64, 64, 4, 2), (64, 64, 8, 2)] if large else [(64, 16, 8, 2), (32, 32, 4, 2), (32, 16, 4, 2)]
    else:
        blocks = [(16, 32, 4, 1), (16, 16, 4, 1), (16, 32, 4, 2), (16, 16, 4, 2), (32, 16, 8, 2)]
        blocks += [(64, 32, 8, 1), (64, 16, 8, 1)] if large else []
    if name == "dkdv":
        blocks = [(n, m, warps, stages) for m, n, warps, stages in blocks]
    widths = [64] if dtype == torch.float32 else [64, 128]
    if table.parts_of(dim, 64) == table.parts_of(dim, 128) or (not large and dim == 128):
        widths = [64]
    if family == "gfx9":  # AMD pipelines in registers: one stage less
        blocks = [(m, n, warps, min(stages, 2)) for m, n, warps, stages in blocks]
    return list(dict.fromkeys(Tile(*block, width) for block in blocks for width in widths))


@cache
def waste(tile_tokens: int, block: int) -> float:
    """Executed over useful pairs of the forward pass with tiles of so many tokens, causal, on real lengths."""
    executed = useful = 0
    for name in ("math", "short tasks", "functions"):
        start = 0
        starts: list[int] = []
        for length in packs.draw(name, 65_536, 4096):
            starts += [start] * length
            start += length
        for m0 in range(0, len(starts), tile_tokens):
            last = min(m0 + tile_tokens, len(starts)) - 1
            executed += -(-(last + 1 - starts[m0]) // block) * block * tile_tokens
            useful += sum(i + 1 - starts[i] for i in range(m0, last + 1))
    return executed / useful


def bounded(family: str, name: str, dim: int, tile: Tile) -> dict[str, float]:
    """Microseconds that the counts of a pass with this tile allow, on real lengths, by grouping; see gpu_bound.py."""
    found = {}
    for label, group in GROUPS.items():
        shape = gpu_bound.Shape(16 * group, 16, dim)
        found[label] = 0.0
        for set_name in gpu_bound.SETS:
            with timing.with_tile(name, tile):
                lengths = packs.draw(set_name, _EMULATED_TOKENS, 512)
                profile, _ = gpu_bound.profile_ours(lengths, shape, int(ARCHES[family]), name)[name]
            for gpu, arch in gpu_bound.ARCHES.items():
                if arch == ARCHES[family]:
                    found[label] += gpu_bound.microseconds(profile, gpu)
    return found


def measure(job: tuple[Cell, Tile]) -> dict[str, Any]:
    """A line of the log: what the compiler, and for some rows the emulator, make of a candidate."""
    (family, name, dtype, dim), tile = job
    line = {"family": family, "pass": name, "dtype": _bits(dtype), "dim": dim, "tile": tile}
    try:
        report = compiled.report_of(compiled.compile_pass(name, ARCHES[family], dtype, tile, 4, dim))
        if family in ("sm80", "sm86") and dtype != torch.float32 and dim in (64, 128):
            line["bound"] = bounded(family, name, dim, tile)
    except Exception as error:  # a candidate that the compiler refuses is no candidate
        return line | {"error": f"{type(error).__name__}: {error}"[:200]}
    return line | report._asdict()


def cost(line: dict[str, Any], group: int) -> float:
    """Estimated cycles of a candidate for a useful pair, lower is better; infinite where it cannot run."""
    if not line.get("loops"):
        return float("inf")
    family, name, tile = line["family"], line["pass"], Tile(*line["tile"])
    arch = ARCHES[family]
    gpu = compiled.GPUS[arch]
    loops = tuple(compiled.Loop(*loop) for loop in line["loops"])
    report = compiled.Report(line["registers"], line["spills"], line["shared"], loops)
    blocks = compiled.occupancy(report, tile.num_warps, arch)
    if report.shared > gpu.block_shared or not blocks:
        return float("inf")
    hiding = min(1.0, 0.5 + 0.125 * blocks * tile.num_warps / 4)
    penalty = 1 + report.spills / 64
    if family in ("sm80", "sm86") and (report.main.shared_stores or report.main.barriers > 3):
        penalty *= 2
    if family == "sm90" and line["dtype"] == "16-bit" and not report.main.wgmma:
        penalty *= 2
    if "bound" in line:
        label = next(label for label, size in GROUPS.items() if size == group)
        return float(line["bound"][label]) / hiding * penalty
    products = {"forward": 2, "dq": 3, "dkdv": 4}[name] * sum(table.parts_of(line["dim"], tile.width))
    issue = report.main.instructions * tile.num_warps / (4 * tile.block_m * tile.block_n)
    tensor = products / gpu.fma if line["dtype"] == "16-bit" else 0.0
    # wgmma and tcgen05 read shared memory themselves, as fast as they multiply
    through_shared = report.main.wavefronts * tile.num_warps / (tile.block_m * tile.block_n)
    cycles = max(issue, tensor, through_shared) / hiding * penalty
    if name == "dkdv":
        return cycles * waste(tile.block_n, tile.block_m)
    return cycles * waste(max(1, tile.block_m // group), tile.block_n)


def _bits(dtype: torch.dtype) -> str:
    return "32-bit" if dtype == torch.float32 else "16-bit"


def search(
    families: list[str], dims: list[int], processes: int, log: Path
) -> dict[tuple[str, str, str, str, int], Tile]:
    """The best tile of every row of the table; what the log holds of the same code is not compiled again."""
    # float32 runs on plain FMA units, alike on all NVIDIA GPUs: the family with the least shared memory stands for all.
    cells = [(f, n, torch.bfloat16, d) for f in families for n in PASSES for d in dims]
    cells += [(f, n, torch.float32, d) for f in families if f in ("sm86", "gfx9") for n in PASSES for d in dims]
    jobs = [(cell, tile) for cell in cells for tile in candidates(cell[0], *cell[1:])]
    best: dict[tuple[str, str, str, str, int], tuple[float, Tile]] = {}
    code = compiled.source_hash()
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = [line for line in known if line["code"] == code]
    log.write_text("".join(json.dumps(line) + "\n" for line in known))
    done = {(line["family"], line["pass"], line["dtype"], line["dim"], *line["tile"]) for line in known}
    jobs = [job for job in jobs if (*job[0][:2], _bits(job[0][2]), job[0][3], *job[1]) not in done]
    with ProcessPoolExecutor(processes) as pool, log.open("a") as lines:
        for line in tqdm(pool.map(measure, jobs), total=len(jobs)):
            known.append({"code": code} | line)
            lines.write(json.dumps(known[-1]) + "\n")
            lines.flush()
    for line in known:
        for label, group in GROUPS.items():
            key = (line["family"], line["pass"], line["dtype"], label, line["dim"])
            entry = (cost(line, group), Tile(*line["tile"]))
            best[key] = min(best.get(key, entry), entry, key=lambda pair: pair[0])
    found = {key: tile for key, (_, tile) in best.items()}
    for family in families:
        for name in PASSES:
            for group in GROUPS:
                for dim in dims:
                    found.setdefault((family, name, "32-bit", group, dim), _shared_row(found, name, group, dim))
    return found


def _shared_row(found: dict[tuple[str, str, str, str, int], Tile], name: str, group: str, dim: int) -> Tile:
    key = ("sm86", name, "32-bit", group, dim)
    return found.get(key) or TABLE[key]


def time_candidates(device: torch.device) -> dict[tuple[str, str, str, str, int], Tile]:
    """The fastest tile of each row of this GPU's family: medians of interleaved runs on real lengths."""
    family = table.family(device)
    found = {}
    for name in PASSES:
        for dtype in (torch.bfloat16, torch.float32):
            for dim in DIMS:
                for label, group in GROUPS.items():
                    tiles = candidates(family, name, dtype, dim)
                    seconds = timing.time_tiles(device, name, dtype, dim, group, tiles)
                    if seconds:
                        found[family, name, _bits(dtype), label, dim] = min(seconds, key=seconds.__getitem__)
    return found


def write(found: dict[tuple[str, str, str, str, int], Tile]) -> None:
    """Put the rows into packattn/kernels/table.py; rows that were not searched stay as they are."""
    merged = dict(TABLE) | found
    lines = [f"{'family':6} {'pass':7} {'dtype':6} {'group':7} " + " ".join(f"{dim:>15}" for dim in DIMS)]
    for family in FAMILIES:
        for name in PASSES:
            for bits in ("16-bit", "32-bit"):
                for group in GROUPS:
                    tiles = (merged[family, name, bits, group, dim] for dim in DIMS)
                    entries = (f"{t.block_m}x{t.block_n}/{t.num_warps}/{t.num_stages}/{t.width}" for t in tiles)
                    row = " ".join(f"{entry:>15}" for entry in entries)
                    lines.append(f"{family:6} {name:7} {bits:6} {group:7} {row}")
    path = Path(table.__file__)
    rows = "\n".join(lines) + "\n"
    text = re.sub(r'(_ROWS = """\n).*?(""")', lambda m: m[1] + rows + m[2], path.read_text(), flags=re.DOTALL)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=list(DIMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--log", type=Path, default=Path("out/tiles.jsonl"), help="what was found of every candidate")
    parser.add_argument("--time", action="store_true", help="time the candidates on this machine's GPU")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    if options.time:
        write(time_candidates(torch.device("cuda")))
    else:
        write(search(options.families, options.dims, options.processes, options.log))


if __name__ == "__main__":
    main()
