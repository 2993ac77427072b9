"""The resource gate: `make gate` compiles every row below (about an hour on two cores) and rewrites gate.csv.

A row is a kernel as the launch table has it for a target, a dtype, head dims and a group size. What the compiler makes
of it must keep the rules of `broken`; figures that a rule allows with a reason are in ALLOWED. gate.csv carries a hash
of the kernels' code and of the launch table, which `make test` compares, so that a change of either is measured again.
"""

import argparse
import csv
import hashlib
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from benchmarks import compiled
from benchmarks.compiled import GPUS
from packattn.kernels import table

PATH = Path(__file__).parent / "gate.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "delta", "dq", "dkdv")
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)
UNEVEN = ((192, 128), (576, 512))  # of queries and keys, of values
DELTA_DIMS = (64, 80, 128, 256, 512)  # the pre-pass has no loop and no products
FEATURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "softcap": (("forward", "dq", "dkdv"), {"HAS_SOFTCAP": True}),
    "alibi": (("forward", "dq", "dkdv"), {"HAS_ALIBI": True}),
    "dropout": (("forward", "dq", "dkdv"), {"HAS_DROPOUT": True}),
    "sinks": (("forward", "delta"), {"HAS_SINKS": True}),
    "gradient of lse": (("delta",), {"HAS_DLSE": True}),
    "split": (("dkdv",), {"SPLIT": 4}),
}
# Targets whose tensor cores take operands from registers (mma.sync).
MMA_SYNC = (80, 86, 89, 120)


class Row(NamedTuple):
    """A compiled kernel of the package."""

    target: int | str
    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    group: int
    feature: str

    @property
    def key(self) -> table.Key:
        """The entry of the launch table that it takes; delta takes its parts of the head dim from dQ."""
        kernel, wide = "dq" if self.kernel == "delta" else self.kernel, max(self.head_dim, self.head_dim_v)
        return table.key_of(GPUS[self.target].family, kernel, wide, DTYPES[self.dtype], self.group)

    @property
    def tile(self) -> table.Tile:
        return table.TABLE[self.key]


class Allowed(NamedTuple):
    """What a set of rows may have, and why."""

    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: range  # of queries and keys
    features: tuple[str, ...]
    targets: tuple[int | str, ...]
    bytes: int  # spills of a thread
    across: bool  # warps lie along the head dim: barriers, stores and mma.sync in the main loop
    reason: str


HALF, ANY, ALL = ("bf16", "fp16"), tuple(FEATURES), tuple(GPUS)
_SHARED = "16 rows of dk and dv of 256 columns are 256 registers of a warp: the warps have to share the head dim"
_WIDE = "dk and dv take 160 to 192 of the 255 registers; tiles of half as many queries, without spills, cost more"
_FULL = "accumulators and operands fill the 255 registers; bounds and addresses wait in local memory"
ALLOWED = (  # the first that fits a row
    Allowed(
        ("forward", "dq", "dkdv"), HALF, range(257, 577), ("",), ALL, 80, True,
        "16 rows of 512 accumulators are 256 registers of a warp: the warps have to share the head dim",
    ),
    Allowed(("dkdv",), HALF, range(193, 257), ("",), (90,), 200, True, _SHARED),
    Allowed(("dkdv",), HALF, range(193, 257), ("",), ALL, 48, True, _SHARED),
    Allowed(("dkdv",), HALF, range(129, 193), ("",), (90,), 168, False, _WIDE),
    Allowed(("dkdv",), HALF, range(129, 193), ("",), ("gfx942", "gfx950"), 104, False, _WIDE),
    Allowed(("dkdv",), HALF, range(129, 193), ("",), ALL, 72, False, _WIDE),
    Allowed(
        ("dq", "dkdv"), HALF, range(16, 257), ("dropout",), ALL, 168, False,
        "the ten rounds of Philox, four words a score",
    ),
    Allowed(("dkdv",), HALF, range(97, 129), ("",), (90,), 88, False, _FULL),
    Allowed(("dq", "dkdv"), HALF, range(16, 257), ("", *ANY), ALL, 64, False, _FULL),
    Allowed(
        ("dkdv",), ("fp32",), range(33, 65), ("",), ALL, 344, False,
        "40 = 32 + 16: two widths of unrolled multiply-adds, whose operands ptxas loads ahead",
    ),
    Allowed(
        ("forward", "dq", "dkdv"), ("fp32",), range(16, 257), ("",), ALL, 32, False,
        "unrolled multiply-adds, whose operands ptxas loads ahead",
    ),
    Allowed(
        ("dq", "dkdv"), ("fp32",), range(257, 577), ("",), ALL, 1240, False,
        "gfx9 keeps both matrices in registers; float32 at these head dims is for checks, not for training",
    ),
)  # fmt: skip


def rows() -> list[Row]:
    """Every row, in the order of the CSV: one key head for a query head only where its tile is another."""
    return [row for row in every_row() if row.group > 1 or row.tile != row._replace(group=4).tile]


def every_row() -> list[Row]:
    """The rows of any launch table."""
    found = []
    for target in GPUS:
        for kernel in PASSES:
            for dtype in ("bf16", "fp32"):
                dims = [(dim, dim) for dim in (DELTA_DIMS if kernel == "delta" else HEAD_DIMS)]
                for dim, dim_v in dims if kernel == "delta" else dims + list(UNEVEN):
                    groups = (4,) if kernel == "delta" else (1, 4)
                    found += [Row(target, kernel, dtype, dim, dim_v, group, "") for group in groups]
            found += [Row(target, kernel, "fp16", dim, dim, 4, "") for dim in (64, 128)]
            for feature, (kernels, _) in FEATURES.items():
                if kernel in kernels:
                    found += [Row(target, kernel, "bf16", dim, dim, 4, feature) for dim in (64, 128)]
    return found


def code_hash() -> str:
    """What gate.csv was measured on: the kernels' code, the tiles, and how they become rows."""
    text = f"{compiled.source_hash()} {sorted(table.TABLE.items())} {rows()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(row: Row, tile: table.Tile | None = None) -> dict[str, Any]:
    """The figures of a row, with another tile than the table's if given.

    Bytes a thread, bytes a block, and counts of the main loop; of a kernel without a loop, zeros.
    """
    tile = tile or row.tile
    kernel = compiled.compile_pass(
        row.kernel, row.target, DTYPES[row.dtype], tile, row.group, row.head_dim, row.head_dim_v,
        **(FEATURES[row.feature][1] if row.feature else {}),
    )  # fmt: skip
    report = compiled.report_of(kernel)
    main = report.main if report.loops else compiled.Loop(*[0] * len(compiled.Loop._fields))
    return {
        "tile": str(tile),
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared,
        "blocks": compiled.occupancy(report, tile.num_warps, row.target),
        **main._asdict(),
    }


def allowed(row: Row) -> Allowed | None:
    """The entry of ALLOWED for a row, the first that fits."""
    for entry in ALLOWED:
        sets = (entry.kernels, entry.dtypes, entry.head_dims, entry.features, entry.targets)
        values = (row.kernel, row.dtype, row.head_dim, row.feature, row.target)
        if all(value in among for value, among in zip(values, sets, strict=True)):
            return entry
    return None


def across(target: int | str, counts: dict[str, Any]) -> list[str]:
    """What shows that 16-bit products of a main loop lay warps along the head dim, by the counts of the loop."""
    problems = []
    if target in MMA_SYNC:
        if counts["barriers"] > 3:
            problems.append(f"{counts['barriers']} barriers in the main loop, allowed are 3")
        if counts["shared_stores"]:
            problems.append(f"{counts['shared_stores']} stores to shared memory in the main loop")
    if target == 90 and not counts["wgmma"]:
        problems.append("no wgmma in the main loop")
    return problems


def broken(row: Row, figures: dict[str, Any]) -> list[str]:
    """The rules that the figures of a row break."""
    problems = []
    half = row.dtype != "fp32"
    tile = table.Tile.read(figures["tile"])
    rows_of_tile = tile.block_n if row.kernel == "dkdv" else tile.block_m
    limit = GPUS[row.target].block_shared
    if figures["shared"] > limit:
        problems.append(f"{figures['shared']} bytes of shared memory, the device has {limit}")
    if figures["blocks"] < 1:
        problems.append("no block fits a multiprocessor")
    entry = allowed(row)
    most = entry.bytes if entry else 0
    if row.kernel == "forward" and half and rows_of_tile >= 64:
        most = 0
    if figures["spills"] > most:
        problems.append(f"{figures['spills']} bytes of spills a thread, allowed are {most}")
    if half and row.kernel != "delta" and not (entry and entry.across):
        problems += across(row.target, figures)
    return problems


def read() -> tuple[str, str, dict[Row, dict[str, Any]]]:
    """The hash, the version of Triton and the figures of gate.csv."""
    with PATH.open() as file:
        code, _, version = file.readline().split()[-3:]
        lines = list(csv.DictReader(file))
    found = {}
    for line in lines:
        target = int(line["target"]) if line["target"].isdigit() else line["target"]
        row = Row(target, line["kernel"], line["dtype"], *(int(line[n]) for n in Row._fields[3:6]), line["feature"])
        rest = {name: value for name, value in line.items() if name not in Row._fields}
        found[row] = {name: int(value) if value.isdigit() else value for name, value in rest.items()}
    return code, version, found


def write(found: dict[Row, dict[str, Any]]) -> None:
    """Rewrite gate.csv, each row with the spills that it may have and the reason."""
    with PATH.open("w", newline="") as file:
        file.write(f"# hash of the kernels and the launch table: {code_hash()} triton {triton.__version__}\n")
        names = [*Row._fields, *next(iter(found.values())), "allowed_spills", "reason"]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row, figures in found.items():
            entry = allowed(row)
            if entry and not entry.across and not figures["spills"]:
                entry = None
            extra = {"allowed_spills": entry.bytes if entry else 0, "reason": entry.reason if entry else ""}
            writer.writerow(row._asdict() | figures | extra)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    todo = rows()
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(todo, tqdm(pool.map(measure, todo, chunksize=4), total=len(todo)), strict=True))
    write(found)
    failed = 0
    for row, figures in found.items():
        for problem in broken(row, figures):
            failed += 1
            print(f"{' '.join(map(str, row))} ({figures['tile']}): {problem}")
    print(f"{len(found)} rows, {failed} broken rules; written to {PATH}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
