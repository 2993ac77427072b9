"""Compile a pass for any target without a GPU, and read what the compiler made: the evidence of the launch table."""

import hashlib
import inspect
import io
import re
import subprocess
import tempfile
import tokenize
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packattn.kernels import backward, forward
from packattn.kernels import tile as tile_module
from packattn.kernels.launch import COMPILER_OPTIONS
from packattn.kernels.table import Tile, parts_of

KERNELS = {
    "forward": forward._fwd_kernel,
    "dq": backward._bwd_dq_kernel,
    "dkdv": backward._bwd_dkdv_kernel,
    "delta": backward._bwd_delta_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {
    "*i32": ("k_start_ptr", "k_end_ptr", "q_start_ptr", "q_end_ptr", "order_ptr", "anchors_ptr"),
    "*i64": ("seed_ptr",),
    "*fp32": ("lse_ptr", "norm_ptr", "delta_ptr", "sinks_ptr", "dlse_ptr", "slopes_ptr"),
}


class Gpu(NamedTuple):
    """What limits a program on a target; sizes in bytes, of one multiprocessor unless said otherwise."""

    family: str
    block_shared: int  # shared memory that one block may use
    shared: int
    threads: int
    fma: int  # fp16 multiply-adds a cycle on the tensor cores


# Sources: CUDA C programming guide (compute capabilities), the white papers of the architectures, the CDNA 3 guide.
GPUS = {
    80: Gpu("sm80", 166_912, 167_936, 2048, 1024),
    86: Gpu("sm86", 101_376, 102_400, 1536, 512),
    89: Gpu("sm86", 101_376, 102_400, 1536, 512),
    90: Gpu("sm90", 232_448, 233_472, 2048, 2048),
    100: Gpu("sm100", 232_448, 233_472, 2048, 4096),
    120: Gpu("sm86", 101_376, 102_400, 1536, 512),
    "gfx942": Gpu("gfx9", 65_536, 65_536, 2048, 1024),
    "gfx950": Gpu("gfx9", 163_840, 163_840, 2048, 2048),
}


class Loop(NamedTuple):
    """One innermost loop with matrix products: counts of machine instructions of one warp."""

    instructions: int
    products: int
    barriers: int
    shuffles: int
    shared_stores: int
    wgmma: int
    local: int  # loads and stores of spilled registers
    wavefronts: int  # of shared memory, 128 bytes each, without conflicts; 0 on AMD targets


class Report(NamedTuple):
    """What the compiler and the disassembler say of a kernel; spills in bytes a thread, shared in bytes a block."""

    registers: int
    spills: int
    shared: int
    loops: tuple[Loop, ...]

    @property
    def main(self) -> Loop:
        """The loop without a mask: the one with the fewest instructions for a product."""
        return min(self.loops, key=lambda loop: loop.instructions / loop.products)


def source_hash() -> str:
    """A hash of the kernels' code and of how a head dim becomes parts.

    Left out are comments, docstrings, and decorators, which say what a launch is specialised on: not compile_pass.
    """
    skipped = (tokenize.COMMENT, tokenize.NL)
    digest = hashlib.sha256()
    modules = (Path(module.__file__).read_text() for module in (tile_module, forward, backward))
    for source in (*modules, inspect.getsource(parts_of)):
        begins, decorator = True, False  # a statement, where a string is a docstring
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in skipped:
                continue
            decorator = decorator or (begins and token.string == "@")
            if not decorator and not (begins and token.type == tokenize.STRING):
                digest.update(token.string.encode() + b"\0")
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            decorator = decorator and token.type != tokenize.NEWLINE
    return digest.hexdigest()[:16]


def target_of(arch: int | str) -> GPUTarget:
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def compile_pass(
    name: str, arch: int | str, dtype: torch.dtype, tile: Tile, group: int, head_dim: int,
    head_dim_v: int | None = None, **features: Any,
) -> Any:  # fmt: skip
    """Triton's compiled kernel of a pass; features override the constants, such as HAS_SOFTCAP=True."""
    kernel = KERNELS[name]
    head_dim_v = head_dim_v or head_dim
    constants: dict[str, Any] = {
        "GROUP": group, "SPLIT": 1, "HEAD_DIM": head_dim, "PARTS": parts_of(head_dim, tile.width),
        "HEAD_DIM_V": head_dim_v, "PARTS_V": parts_of(head_dim_v, tile.width), "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "HAS_ORDER": True, "HAS_SOFTCAP": False, "HAS_SINKS": False, "HAS_ALIBI": False,
        "HAS_DROPOUT": False, "HAS_DLSE": False, "PRECISION": "ieee", "HELD": tile.held, "stride_sh": 0, "stride_st": 0,
    }  # fmt: skip
    constants |= features
    unused = {"HAS_SINKS": "sinks_ptr", "HAS_ALIBI": "slopes_ptr", "HAS_DROPOUT": "seed_ptr", "HAS_DLSE": "dlse_ptr"}
    constants |= {pointer: None for flag, pointer in unused.items() if not constants[flag]}
    if not constants["HAS_ALIBI"]:
        constants["anchors_ptr"] = None
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {pointer: kind for kind, pointers in _POINTERS.items() for pointer in pointers}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = types.get(argument, f"*{TYPES[dtype]}")
        else:
            signature[argument] = "fp32" if argument in ("scale", "softcap", "keep_scale") else "i32"
        if argument not in constants and (argument.endswith("_ptr") or argument.startswith("stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **COMPILER_OPTIONS}
    return triton.compile(source, target=target_of(arch), options=options)


def report_of(compiled: Any) -> Report:
    """Read a compiled kernel: the cubin's disassembly, or the assembly of an AMD target."""
    if "cubin" in compiled.asm:
        usage, code = _disassemble(compiled.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spills = int(re.search(r"STACK:(\d+)", usage)[1])
        instruction, label = r"\s+/\*[0-9a-f]{4,}\*/", r"(\.L\w+):"
        branch = r"BRA.*`\((\.L\w+)\)"
    else:
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spills = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1])
        instruction, label, branch = r"\t[a-z]\w+_", r"(\.LBB\w+):", r"s_c?branch\w*\s+(\.LBB\w+)"
    return Report(registers, spills, compiled.metadata.shared, _loops(code, instruction, label, branch))


def occupancy(report: Report, num_warps: int, arch: int | str) -> int:
    """Blocks that one multiprocessor holds, by registers, shared memory and threads."""
    gpu = GPUS[arch]
    wide = 64 if isinstance(arch, str) else 32
    by_shared = gpu.shared // (report.shared + 1024)
    by_threads = gpu.threads // (wide * num_warps)
    # AMD: 512 registers of a lane of each of four units.
    lanes = 4 * 512 if isinstance(arch, str) else 65_536 // 32
    by_registers = lanes // (-(-report.registers // 8) * 8 * num_warps)
    return max(0, min(by_shared, by_threads, by_registers))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([_tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout
            for name, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b")
_MULTIPLY_ADD = re.compile(r"\b(FFMA2?|v_fmac?_f32\w*|v_pk_fma_f32\w*|v_dot2\w*)\b")


def _loops(code: str, instruction: str, label: str, branch: str) -> tuple[Loop, ...]:
    """Innermost loops: from a label to a branch back to it. Without tensor cores, products are FMA instructions."""
    positions, lines = {}, []
    for line in code.splitlines():
        if found := re.match(label, line):
            positions[found[1]] = len(lines)
        elif re.match(instruction, line):
            lines.append(line)
    product = _PRODUCT if any(map(_PRODUCT.search, lines)) else _MULTIPLY_ADD
    spans = []
    for end, line in enumerate(lines):
        found = re.search(branch, line)
        if found and positions.get(found[1], end + 1) <= end:
            spans.append((positions[found[1]], end + 1))
    loops = []
    for begin, end in spans:
        body = lines[begin:end]
        products = sum(bool(product.search(line)) for line in body)
        inner = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
        if products >= 4 and not inner:
            counts = (
                sum(bool(re.search(pattern, line)) for line in body)
                for pattern in (
                    r"\bBAR\.|s_barrier",
                    r"\bSHFL|ds_bpermute",
                    r"(?<!LDG)STS\b|ds_write",
                    "HGMMA",
                    r"\b(LDL|STL)\b|scratch_(load|store)",
                )
            )
            loops.append(Loop(len(body), products, *counts, sum(map(_wavefronts, body))))
    return tuple(loops)


def _wavefronts(line: str) -> int:
    """Wavefronts of shared memory that an instruction of a warp takes."""
    if found := re.search(r"\bLDSM\.16\.MT?88(?:\.(\d))?", line):
        return int(found[1] or 1)
    if re.search(r"\bSHFL", line):
        return 1
    if found := re.search(r"\b(?:LDGSTS|LDS|STS)\b(\S*)", line):
        return 4 if ".128" in found[1] else 2 if ".64" in found[1] else 1
    return 0
