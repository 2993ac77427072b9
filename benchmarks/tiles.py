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

A row of the table gets the candidate of least cost that keeps the rules of the gate (benchmarks/gate.py) in every row
that would take it. What the gate allows costs a factor all the same: spills in the main loop, and warps that lie along
the head dim.
With `--time` the candidates are run instead, interleaved, and the table gets the fastest that keeps the rules.
"""

import argparse
import json
import re
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from tqdm import tqdm

from benchmarks import compiled, gate, gpu_bound, packs, timing
from packattn.kernels import launch, table
from packattn.kernels.table import DIMS, FAMILIES, TABLE, Key, Tile

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
        # Tiles of few rows read the keys more often, which only the bound of sm80 and sm86 counts.
        blocks += [(64, 32, 2, 3), (64, 16, 2, 3), (32, 16, 1, 3)] if family in ("sm80", "sm86") else []
    elif dim <= 128:
        blocks = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2)]
        blocks += [(64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)]
        # 32 rows a warp: half the reads of shared memory, as far as the registers go
        blocks += [] if large else [(128, 16, 4, 3), (128, 32, 4, 2)]
        blocks += [(64, 16, 2, 3)] if family in ("sm80", "sm86") else []
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
    tiles = [Tile(*block, width) for block in blocks for width in widths]
    if family in ("sm80", "sm86") and dtype != torch.float32 and 32 < dim <= 128:
        if name == "dkdv":
            # Tiles of 32 keys: more programs, of less unequal length. With parts wider than the tile has keys, two
            # warps would lie along the head dim.
            small = [(16, 32, 2, 2), (16, 32, 2, 3), (32, 32, 2, 2)] if dim > 64 else [(16, 32, 1, 2), (32, 32, 1, 2)]
            tiles += [Tile(*block, 32) for block in small]
            held = [Tile(*block, 32, dim // 32) for block in small]
        else:
            rows = [(128, 32, 4, 2), (128, 32, 4, 3), (64, 32, 2, 3)]
            if dim > 64:
                rows = [(128, 16, 4, 2), (128, 16, 4, 3), (128, 32, 4, 2), (64, 32, 4, 2), (64, 16, 2, 3)]
            held = [Tile(*block, 32, parts) for block in rows for parts in range(1, dim // 32 + 1)]
        # Parts of the own rows in registers: on sm86 the tensor cores are half as fast, shared memory is no limit.
        tiles += held if family == "sm80" else []
    return list(dict.fromkeys(tiles))


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
            # Tiles are chosen for problems that are large enough not to be split.
            with timing.with_tile(name, tile), patch.object(launch, "_ENOUGH_PROGRAMS", 0):
                lengths = packs.draw(set_name, _EMULATED_TOKENS, 512)
                arch = int(ARCHES[family])
                lying = gpu_bound.profile_ours(lengths, shape, arch, name)[name]
                for gpu in (gpu for gpu, which in gpu_bound.ARCHES.items() if which == arch):
                    order = gpu_bound.orders(lengths, shape, gpu)[name]
                    found[label] += gpu_bound.microseconds(gpu_bound.in_order(lying, order), gpu)
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
    """Estimated cycles of a candidate for a useful pair, lower is better; infinite where it does not compile."""
    if not line.get("loops"):
        return float("inf")
    family, name, tile = line["family"], line["pass"], Tile(*line["tile"])
    arch = ARCHES[family]
    gpu = compiled.GPUS[arch]
    loops = tuple(compiled.Loop(*loop) for loop in line["loops"])
    report = compiled.Report(line["registers"], line["spills"], line["shared"], loops)
    hiding = min(1.0, 0.5 + 0.125 * compiled.occupancy(report, tile.num_warps, arch) * tile.num_warps / 4)
    # An issue slot of one of four schedulers, and a wavefront of the L1 cache that they share.
    penalty = 1 + 4 * report.main.local / report.main.instructions
    if line["dtype"] == "16-bit" and gate.across(arch, report.main._asdict()):
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


def families_of(key: Key) -> tuple[str, ...]:
    """The families that take the entry found for one of them.

    float32 runs on plain FMA units, alike on all NVIDIA GPUs: the family with the least shared memory stands for all.
    """
    family, _, bits, _, _ = key
    nvidia = tuple(other for other in FAMILIES if other != "gfx9")
    return nvidia if bits == "32-bit" and family == "sm86" else (family,)


def keeps_the_rules(key: Key, tile: Tile) -> bool:
    """Whether every row of the gate that would take the entry keeps the gate's rules with this tile."""
    keys = [(family, *key[1:]) for family in families_of(key)]
    rows = [row for row in gate.every_row() if row.key in keys]
    for row in sorted(rows, key=lambda row: (bool(row.feature), -row.head_dim)):  # those already compiled first
        try:
            if gate.broken(row, gate.measure(row, tile)):
                return False
        except Exception:  # what the compiler refuses breaks every rule
            return False
    return True


def chosen(job: tuple[Key, list[Tile], Tile | None]) -> Tile:
    """The first of the tiles that keeps the rules, as the last of the job is known to do."""
    key, tiles, known = job
    for tile in tiles:
        if tile == known or keeps_the_rules(key, tile):
            return tile
    raise ValueError(f"{key}: every candidate must not break a rule of the gate, all {len(tiles)} do; add smaller ones")


def log_code() -> str:
    """What a line of the log was found with; it holds whatever the rows of the launch table are."""
    return f"{compiled.source_hash()} triton {triton.__version__}"


def search(families: list[str], dims: list[int], processes: int, log: Path) -> dict[Key, Tile]:
    """The best tile of every row of the table; what the log holds of the same code is not compiled again."""
    cells = [(f, n, torch.bfloat16, d) for f in families for n in PASSES for d in dims]
    cells += [(f, n, torch.float32, d) for f in families if f in ("sm86", "gfx9") for n in PASSES for d in dims]
    jobs = [(cell, tile) for cell in cells for tile in candidates(cell[0], *cell[1:])]
    code = log_code()
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
    return fill(ranked(known, cells), processes)


def ranked(lines: list[dict[str, Any]], cells: list[Cell]) -> dict[Key, list[Tile]]:
    """The candidates of the cells in the log, of least cost first."""
    costs: dict[Key, dict[Tile, float]] = defaultdict(dict)
    for family, name, dtype, dim in cells:
        tiles = candidates(family, name, dtype, dim)
        for line in lines:
            if (line["family"], line["pass"], line["dtype"], line["dim"]) == (family, name, _bits(dtype), dim):
                for label, group in GROUPS.items():
                    found = cost(line, group)
                    if found < float("inf") and Tile(*line["tile"]) in tiles:
                        costs[family, name, _bits(dtype), label, dim][Tile(*line["tile"])] = found
    return {key: sorted(found, key=found.__getitem__) for key, found in costs.items()}


def fill(best_first: dict[Key, list[Tile]], processes: int) -> dict[Key, Tile]:
    """The first candidate of each entry that keeps the rules, in the rows of all families that take it."""
    found: dict[Key, Tile] = {}
    with ProcessPoolExecutor(processes) as pool:
        for label in ("grouped", "alone"):  # the gate has rows of the latter only where its tile is another
            keys = [key for key in best_first if key[3] == label]
            jobs = [(key, best_first[key], found.get((*key[:3], "grouped", key[4]))) for key in keys]
            for key, tile in zip(keys, tqdm(pool.map(chosen, jobs), total=len(jobs)), strict=True):
                found |= {(family, *key[1:]): tile for family in families_of(key)}
    return found


def time_candidates(device: torch.device, processes: int) -> dict[Key, Tile]:
    """The fastest tile of each row of this GPU's family: medians of interleaved runs on real lengths."""
    family = table.family(device)
    best_first = {}
    for name in PASSES:
        for dtype in (torch.bfloat16, torch.float32):
            for dim in DIMS:
                for label, group in GROUPS.items():
                    tiles = candidates(family, name, dtype, dim)
                    seconds = timing.time_tiles(device, name, dtype, dim, group, tiles)
                    if seconds:
                        best_first[family, name, _bits(dtype), label, dim] = sorted(seconds, key=seconds.__getitem__)
    return {key: tile for key, tile in fill(best_first, processes).items() if key in best_first}


def write(found: dict[Key, Tile]) -> None:
    """Put the rows into packattn/kernels/table.py; rows that were not searched stay as they are."""
    merged = dict(TABLE) | found
    lines = [f"{'family':6} {'pass':7} {'dtype':6} {'group':7} " + " ".join(f"{dim:>15}" for dim in DIMS)]
    for family in FAMILIES:
        for name in PASSES:
            for bits in ("16-bit", "32-bit"):
                for group in GROUPS:
                    row = " ".join(f"{merged[family, name, bits, group, dim]!s:>15}" for dim in DIMS)
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
        write(time_candidates(torch.device("cuda"), options.processes))
    else:
        write(search(options.families, options.dims, options.processes, options.log))


if __name__ == "__main__":
    main()
