"""The launch table: tile sizes by GPU family, pass, dtype, head dim and group size.

The rows below are written by `python -m benchmarks.tiles`, which compiles the candidates for every target and ranks
them by what the compiler and the disassembler report; on a machine with a GPU `--time` ranks them by the clock. An
entry is BLOCK_M x BLOCK_N / warps / stages / widest part of the head dim, and after a + how many of the parts a program
holds in registers.
"""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """BLOCK_M query rows and BLOCK_N keys, how Triton schedules them, the widest part of the head dim.

    held: parts of its own rows (q; q and dout; k and v) that a program holds in registers, where there is room and shared
    memory is what limits it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    width: int
    held: int = 0

    def __str__(self) -> str:
        held = f"+{self.held}" if self.held else ""
        return f"{self.block_m}x{self.block_n}/{self.num_warps}/{self.num_stages}/{self.width}{held}"

    @classmethod
    def read(cls, text: str) -> "Tile":
        """The tile that str() wrote.

        >>> Tile.read("16x32/1/2/32+2")
        Tile(block_m=16, block_n=32, num_warps=1, num_stages=2, width=32, held=2)
        """
        return cls(*map(int, text.replace("x", "/").replace("+", "/").split("/")))


Key = tuple[str, str, str, str, int]  # an entry of the table: family, pass, width of numbers, grouping, column

# Head dims, as many columns as parts_of makes of them; a dim takes the next column that holds it.
DIMS = (16, 32, 64, 96, 128, 160, 192, 256, 576)

_ROWS = """
family pass    dtype  group                16              32              64              96             128             160             192             256             576
sm80   forward 16-bit alone      64x64/4/3/64    64x32/2/3/64  64x32/2/3/32+2  64x16/2/3/32+3  64x16/2/3/32+2    64x32/4/2/64    64x32/8/2/64    64x16/8/2/64    16x32/4/1/64
sm80   forward 16-bit grouped   128x64/8/2/64   128x64/4/3/64 128x32/4/2/32+2  64x16/2/3/32+3 128x16/4/2/32+2   128x32/8/2/64    64x32/8/2/64    64x16/8/2/64    16x32/4/1/64
sm80   forward 32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm80   forward 32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm80   dq      16-bit alone      64x32/2/3/64    64x32/2/3/64  64x32/2/3/32+2  64x16/2/3/32+2  64x32/4/2/32+4    64x32/4/2/64   64x32/4/2/128    64x16/8/2/64    16x32/4/1/64
sm80   dq      16-bit grouped    64x32/2/3/64    64x32/2/3/64  64x32/2/3/32+2  64x16/2/3/32+2 128x16/4/2/32+1   128x32/8/2/64   128x32/8/2/64    64x16/8/2/64    16x32/4/1/64
sm80   dq      32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm80   dq      32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm80   dkdv    16-bit alone      32x64/2/3/64    32x64/2/3/64  16x32/1/2/32+2  16x32/2/2/32+3  16x32/2/2/32+4   32x64/4/2/128    16x64/8/2/64    32x32/4/2/64   32x16/4/2/128
sm80   dkdv    16-bit grouped    32x64/2/3/64    32x64/2/3/64  16x32/1/2/32+2  16x32/2/2/32+3  16x32/2/2/32+4   32x64/4/2/128    16x64/8/2/64    32x32/4/2/64   32x16/4/2/128
sm80   dkdv    32-bit alone      32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm80   dkdv    32-bit grouped    32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm86   forward 16-bit alone      64x64/4/3/64    64x16/2/3/64    64x32/4/3/64    64x16/4/2/64    64x16/4/2/64   128x32/8/2/64    64x16/8/2/64    64x16/8/2/64    16x32/4/1/64
sm86   forward 16-bit grouped    64x64/4/3/64    64x16/2/3/64    64x32/4/3/64    64x16/4/2/64    64x16/4/2/64   128x32/8/2/64    64x16/8/2/64    64x16/8/2/64    16x32/4/1/64
sm86   forward 32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm86   forward 32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm86   dq      16-bit alone      32x16/1/3/64    64x32/4/3/64    64x32/4/3/64    64x16/4/2/64    64x16/4/2/64    64x32/4/2/64    64x32/4/2/64    64x16/8/2/64    16x32/4/1/64
sm86   dq      16-bit grouped    32x16/1/3/64    64x32/4/3/64    64x32/4/3/64    64x16/4/2/64    64x16/4/2/64    64x32/4/2/64    64x32/4/2/64    64x16/8/2/64    16x32/4/1/64
sm86   dq      32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm86   dq      32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm86   dkdv    16-bit alone      16x32/1/3/64    16x32/1/3/64    16x32/1/2/32    16x32/2/2/32    16x64/4/2/64    16x32/4/2/64    16x64/8/2/64    32x32/4/2/64    16x16/4/2/64
sm86   dkdv    16-bit grouped    16x32/1/3/64    16x32/1/3/64    16x32/1/2/32    16x32/2/2/32    16x32/2/2/32    16x32/4/2/64    16x64/8/2/64    32x32/4/2/64    16x16/4/2/64
sm86   dkdv    32-bit alone      32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm86   dkdv    32-bit grouped    32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm90   forward 16-bit alone      64x64/4/3/64    64x64/4/3/64    64x64/4/3/64    64x64/4/2/64    64x64/4/2/64   64x32/4/2/128    64x32/4/2/64   128x32/8/2/64    16x32/4/1/64
sm90   forward 16-bit grouped    64x64/4/3/64    64x64/4/3/64    64x64/4/3/64    64x64/4/2/64    64x64/4/2/64   64x32/4/2/128  128x32/8/2/128   128x32/8/2/64    16x32/4/1/64
sm90   forward 32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm90   forward 32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm90   dq      16-bit alone      64x64/4/3/64    64x64/4/3/64    64x32/4/3/64    64x32/4/2/64    64x32/4/2/64    64x32/4/2/64    64x32/4/2/64   128x32/8/2/64    16x32/4/2/64
sm90   dq      16-bit grouped    64x64/4/3/64   128x64/8/2/64    64x32/4/3/64    64x32/4/2/64    64x32/4/2/64    64x32/4/2/64    64x32/4/2/64   128x32/8/2/64    16x32/4/2/64
sm90   dq      32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm90   dq      32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm90   dkdv    16-bit alone      64x64/4/3/64    64x64/4/3/64    32x64/4/3/64    32x64/4/2/64    32x64/4/2/64    32x64/8/2/64    32x64/8/2/64    32x64/8/2/64    16x16/4/2/64
sm90   dkdv    16-bit grouped    64x64/4/3/64    64x64/4/3/64    32x64/4/3/64    32x64/4/2/64   16x64/4/2/128    32x64/8/2/64    32x64/8/2/64    32x64/8/2/64    16x16/4/2/64
sm90   dkdv    32-bit alone      32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm90   dkdv    32-bit grouped    32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm100  forward 16-bit alone      64x64/4/3/64    64x64/4/3/64    64x64/4/3/64    64x64/4/2/64   64x64/4/2/128    64x64/4/2/64    64x64/4/2/64    64x64/4/2/64    16x32/4/1/64
sm100  forward 16-bit grouped   128x64/4/3/64   128x64/4/3/64   128x64/8/2/64    64x64/4/2/64  128x64/8/2/128    64x64/4/2/64    64x64/4/2/64    64x64/4/2/64    16x32/4/1/64
sm100  forward 32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm100  forward 32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
sm100  dq      16-bit alone      64x64/4/3/64    64x64/4/3/64   128x64/4/3/64    64x64/4/2/64   64x64/4/2/128    64x64/4/2/64    64x64/4/2/64  128x32/8/2/128    16x32/4/2/64
sm100  dq      16-bit grouped   128x32/4/3/64   128x32/4/3/64   128x64/4/3/64   128x64/8/2/64  128x64/8/2/128    64x64/4/2/64    64x64/4/2/64  128x32/8/2/128    16x32/4/2/64
sm100  dq      32-bit alone      64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm100  dq      32-bit grouped    64x32/4/1/64    64x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64      8x8/2/1/64
sm100  dkdv    16-bit alone     64x128/4/3/64   64x128/4/3/64    64x64/4/3/64    64x64/4/2/64  64x128/8/2/128   64x64/4/2/128   64x64/8/2/128   32x64/4/2/128    16x16/4/2/64
sm100  dkdv    16-bit grouped    64x64/4/3/64    64x64/4/3/64    64x64/4/3/64    64x64/4/2/64  64x128/8/2/128   64x64/8/2/128   64x64/8/2/128   32x64/4/2/128    16x16/4/2/64
sm100  dkdv    32-bit alone      32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
sm100  dkdv    32-bit grouped    32x64/4/1/64    32x64/4/1/64    32x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64      8x8/2/1/64
gfx9   forward 16-bit alone     128x32/4/2/64   128x32/4/2/64    64x32/4/2/64    64x16/4/2/64    64x16/4/2/64   32x16/4/2/128   32x16/4/2/128   32x16/4/2/128    16x16/4/1/64
gfx9   forward 16-bit grouped   128x32/4/2/64   128x32/4/2/64    64x32/4/2/64    64x16/4/2/64    64x16/4/2/64   32x16/4/2/128   32x16/4/2/128   32x16/4/2/128    16x16/4/1/64
gfx9   forward 32-bit alone      64x32/4/1/64    64x32/4/1/64    64x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
gfx9   forward 32-bit grouped    64x32/4/1/64    64x32/4/1/64    64x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
gfx9   dq      16-bit alone     128x32/4/2/64   128x32/4/2/64    64x32/4/2/64    64x16/4/2/64    64x16/4/2/64    32x16/4/2/64    32x16/4/2/64   32x16/4/2/128    16x16/4/1/64
gfx9   dq      16-bit grouped   128x32/4/2/64   128x32/4/2/64    64x32/4/2/64    64x16/4/2/64    64x16/4/2/64    32x16/4/2/64    32x16/4/2/64   32x16/4/2/128    16x16/4/1/64
gfx9   dq      32-bit alone      64x32/4/1/64    64x32/4/1/64    64x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
gfx9   dq      32-bit grouped    64x32/4/1/64    64x32/4/1/64    64x32/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    32x16/4/1/64    16x16/4/1/64
gfx9   dkdv    16-bit alone      32x64/4/2/64   32x128/4/2/64    32x64/4/2/64    16x64/4/2/64    16x64/4/2/64   16x64/8/2/128   16x64/8/2/128    16x32/4/2/64    16x16/4/1/64
gfx9   dkdv    16-bit grouped    32x64/4/2/64   32x128/4/2/64    32x64/4/2/64    16x64/4/2/64    16x64/4/2/64   16x64/8/2/128    16x32/4/2/64    16x32/4/2/64    16x16/4/1/64
gfx9   dkdv    32-bit alone      32x64/4/1/64    32x64/4/1/64    32x64/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64    16x16/4/1/64
gfx9   dkdv    32-bit grouped    32x64/4/1/64    32x64/4/1/64    32x64/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x32/4/1/64    16x16/4/1/64    16x16/4/1/64
"""

LARGEST_HEAD_DIM = DIMS[-1]
# Compute capability, or architecture of AMD, to the family whose tiles it takes. The others take those of sm86, which
# ask for the least shared memory.
_FAMILIES = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
FAMILIES = ("sm80", "sm86", "sm90", "sm100", "gfx9")


def _read(rows: str) -> dict[Key, Tile]:
    table = {}
    for line in rows.strip().splitlines()[1:]:
        family, kernel, dtype, group, *entries = line.split()
        for dim, entry in zip(DIMS, entries, strict=True):
            table[family, kernel, dtype, group, dim] = Tile.read(entry)
    return table


TABLE = _read(_ROWS)


def family(device: torch.device) -> str:
    """The family of a GPU."""
    if torch.version.hip is not None:
        return "gfx9"
    if device.type == "cpu":  # the interpreter
        return "sm86"
    return _FAMILIES.get(torch.cuda.get_device_capability(device), "sm86")


def key_of(family: str, kernel: str, dim: int, dtype: torch.dtype, group: int) -> Key:
    """The entry of a pass: "forward", "dq" or "dkdv"; dim is the larger head dim, at most LARGEST_HEAD_DIM."""
    column = next(wide for wide in DIMS if wide >= dim)
    bits = "32-bit" if dtype == torch.float32 else "16-bit"
    return family, kernel, bits, "alone" if group == 1 else "grouped", column


def tile_for(family: str, kernel: str, dim: int, dtype: torch.dtype, group: int) -> Tile:
    """The tile of a pass, as in key_of."""
    return TABLE[key_of(family, kernel, dim, dtype, group)]


def parts_of(dim: int, width: int) -> tuple[int, ...]:
    """Powers of two from 16 up that hold a head dim, none above `width`, all but the last alike.

    >>> parts_of(80, 128), parts_of(112, 128), parts_of(128, 64), parts_of(576, 128)
    ((64, 16), (128,), (64, 64), (128, 128, 128, 128, 64))
    """
    padded = max(16, int(triton.next_power_of_2(dim)))
    if padded > width:
        whole, rest = divmod(dim, width)
        return (width,) * whole + ((max(16, int(triton.next_power_of_2(rest))),) if rest else ())
    main = padded // 2
    tail = max(16, int(triton.next_power_of_2(dim - main))) if main < dim else 0
    return (main, tail) if tail > 0 and main + tail < padded else (padded,)
