"""FlexAttention's forward template of the installed torch, compiled for any target like our kernels, to compare with.

torch renders its template at run time on a machine with a GPU. Here the names that the template asks for are given by
hand: sizes and strides of one packed row, no score modification, and the causal document mask of packed training,
`q_idx >= kv_idx and document[q_idx] == document[kv_idx]`.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import torch
import triton
from triton.compiler import ASTSource

from benchmarks.compiled import target_of
from packattn.kernels.table import Tile

_POINTERS = {
    "Q": "*bf16", "K": "*bf16", "V": "*bf16", "LSE": "*fp32", "MAX": "*fp32", "KV_NUM_BLKS": "*i32",
    "KV_IDX": "*i32", "FULL_KV_NUM_BLKS": "*i32", "FULL_KV_IDX": "*i32", "DOCUMENT": "*i32", "OUT": "*bf16",
}  # fmt: skip
_TOKENS, _HEADS_K = 16_384, 8


def _constants(tile: Tile, group: int, dim: int) -> dict[str, str]:
    numbers = {
        "GQA_SHARED_HEADS": group, "QK_HEAD_DIM": dim, "QK_HEAD_DIM_ROUNDED": triton.next_power_of_2(dim),
        "V_HEAD_DIM": dim, "V_HEAD_DIM_ROUNDED": triton.next_power_of_2(dim), "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "SPARSE_Q_BLOCK_SIZE": 128, "SPARSE_KV_BLOCK_SIZE": 128, "SM_SCALE": dim**-0.5,
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "HAS_FULL_BLOCKS": True,
        "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "IS_DIVISIBLE": True,
        "SAFE_HEAD_DIM": triton.next_power_of_2(dim) == dim,
    }  # fmt: skip
    return {name: repr(value) for name, value in numbers.items()} | {
        "FLOAT32_PRECISION": "'ieee'",
        "INDEX_DTYPE": "tl.int32",
    }


def _render(tile: Tile, group: int, dim: int) -> str:
    folder = Path(torch.__file__).parent / "_inductor" / "kernel" / "flex" / "templates"
    template = "\n".join(
        (folder / f"{name}.py.jinja").read_text() for name in ("flex_attention", "utilities", "common")
    )
    constants = _constants(tile, group, dim)
    blocks = _TOKENS // 128
    heads = {"Q": _HEADS_K * group, "K": _HEADS_K, "V": _HEADS_K}
    sizes = {name: (1, count, _TOKENS, dim) for name, count in heads.items()} | {"KV_NUM_BLKS": (1, 1, blocks)}
    strides = {name: (count * _TOKENS * dim, dim, count * dim, 1) for name, count in heads.items()}
    for name in ("KV_NUM_BLKS", "FULL_KV_NUM_BLKS"):
        strides[name] = (blocks, blocks, 1)
    for name in ("KV_IDX", "FULL_KV_IDX"):
        strides[name] = (blocks * blocks, blocks * blocks, blocks, 1)

    arguments = ", ".join(f"arg_{name}" for name in _POINTERS)

    def defines() -> str:
        return "\n".join(f"{name}: tl.constexpr = {value}" for name, value in constants.items())

    def def_kernel(*names: str) -> str:
        lines = defines().splitlines() + [f"{name} = arg_{name}" for name in names]
        body = "\n".join(f"    {line}" for line in lines)
        head = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
        return f"{head}def flex({arguments}):\n{body}"

    def modification(subgraph_number: int, output_name: str, **_: Any) -> str:
        if subgraph_number == 0:
            return f"{output_name} = qk"
        return f"{output_name} = (m >= n) & (tl.load(arg_DOCUMENT + m) == tl.load(arg_DOCUMENT + n))"

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        _, head, token, column = indices
        width = heads["Q"] * dim
        return (
            f"tl.store(arg_OUT + {token} * {width} + {head} * {dim} + {column}, {value}.to(tl.bfloat16), mask={mask})"
        )

    environment = jinja2.Environment()
    environment.filters["indent_except_first"] = lambda text, depth: text.replace("\n", "\n" + "    " * depth)
    return environment.from_string(template).render(
        def_kernel=def_kernel,
        gen_argdefs=lambda: arguments,
        gen_defines=defines,
        size=lambda name, axis: sizes[name][axis],
        stride=lambda name, axis=None: strides[name] if axis is None else strides[name][axis],
        modification=modification,
        store_output=store_output,
        USE_TMA=False,
        HAS_FULL_BLOCKS=True,
    )


def compile_flex(arch: int | str, tile: Tile, group: int, dim: int) -> Any:
    """The compiled kernel of FlexAttention's forward pass, bf16, with the tile given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flex.py"
        path.write_text(_render(tile, group, dim))
        spec = importlib.util.spec_from_file_location("flex", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(_POINTERS))}
        source = ASTSource(
            module.flex,
            signature={f"arg_{name}": kind for name, kind in _POINTERS.items()},
            constexprs={},
            attrs=attributes,
        )
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return triton.compile(source, target=target_of(arch), options=options)
