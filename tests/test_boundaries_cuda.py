"""The CUDA source of the boundaries: as C++ on the CPU, and as nvcc's PTX in the emulator."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from boundary_cases import random_rows
from ptxemu import run_cu

from packattn.boundaries import boundaries_torch

ROOT = Path(__file__).parent.parent
TILE = 256  # threads of a block: the smallest chunk


class Rows(ctypes.Structure):
    """packattn::Rows of csrc/boundaries.h."""

    _fields_ = [
        ("position_ids", ctypes.c_void_p),
        ("position_row_stride", ctypes.c_int64),
        ("position_stride", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_row_stride", ctypes.c_int64),
        ("mask_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("position_bytes", ctypes.c_int32),
        ("mask_bytes", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, position_ids, mask):
        of_mask = (None, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())
        size = 0 if mask is None else mask.element_size()
        return cls(
            position_ids.data_ptr(), *position_ids.stride(), *of_mask, position_ids.shape[1], position_ids.numel(),
            position_ids.element_size(), size,
        )  # fmt: skip


def results(tokens):
    return [torch.full((size,), -7, dtype=torch.int32) for size in (tokens, tokens, tokens + 1, 4)]


CASES = [(seed, rows, n) for seed, (rows, n) in enumerate([(1, 1), (1, 255), (2, 128), (1, 257), (3, 700), (1, 2500)])]
CASES += [(seed, 2, 640) for seed in range(6, 30)]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on the PATH")
    library = tmp_path_factory.mktemp("shim") / "boundaries.so"
    source = ROOT / "tests" / "cuda_shim" / "run_boundaries.cpp"
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run_boundaries


@pytest.mark.parametrize(("seed", "rows", "n"), CASES)
def test_the_source_as_cpp(shim, seed, rows, n):
    position_ids, mask = random_rows(seed, rows, n)
    expected = boundaries_torch(position_ids, mask)
    for chunk in {TILE, 2 * TILE, -(-position_ids.numel() // TILE) * TILE}:
        found = results(position_ids.numel())
        shim(ctypes.byref(Rows.of(position_ids, mask)), chunk, *(ctypes.c_void_p(x.data_ptr()) for x in found))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_the_compiled_kernels(seed, tmp_path):
    position_ids, mask = random_rows(seed, 2, 450)
    tokens, chunk = position_ids.numel(), TILE
    # The emulator checks accesses against the tensors it is given, so the struct is taken apart around the kernels.
    source = tmp_path / "boundaries.cu"
    rows = [position_ids, mask]
    strides = [*position_ids.stride(), *((0, 0) if mask is None else mask.stride())]
    sizes = [position_ids.element_size(), 0 if mask is None else mask.element_size()]
    head = """
        #include "boundaries_kernel.cuh"
        using namespace packattn;
        #define ROWS const void* p, const void* m, long prs, long ps, long mrs, long ms, long n, int tokens, \\
            int pb, int mb
        #define MAKE Rows{p, prs, ps, m, mrs, ms, n, tokens, pb, mb}
    """
    kernels = (ROOT / "csrc" / "boundaries_kernel.cuh").read_text()
    kernels = kernels.replace("__global__ void boundaries_reduce(Rows rows,", "__device__ void reduce_body(Rows rows,")
    kernels = kernels.replace("__global__ void boundaries_scan(Rows rows,", "__device__ void scan_body(Rows rows,")
    assert kernels.count("__global__") == 0
    (tmp_path / "boundaries_kernel.cuh").write_text(kernels)
    source.write_text(
        head
        + """
        extern "C" __global__ void reduce(ROWS, int chunk, Aggregate* a, int* summary) {
          reduce_body(MAKE, chunk, a, summary);
        }
        extern "C" __global__ void scan(ROWS, int chunk, const Aggregate* a, int* s, int* e, int* c, int* y) {
          scan_body(MAKE, chunk, a, Found{s, e, c, y});
        }
        """
    )
    found = results(tokens)
    blocks = -(-tokens // chunk)
    aggregates = torch.zeros(blocks * 6, dtype=torch.int32)
    common = [*rows, *strides, position_ids.shape[1], tokens, *sizes, chunk, aggregates]
    options = [f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", "-std=c++20"]
    checks = {"options": options, "check_races": True, "check_conflicts": True}
    run_cu(source, "reduce", blocks, TILE, [*common, found[3]], **checks)
    run_cu(source, "scan", blocks, TILE, [*common, *found], **checks)
    for one, other in zip(found, boundaries_torch(position_ids, mask), strict=True):
        assert torch.equal(one, other)


def test_two_launches():
    source = (ROOT / "csrc" / "boundaries_cuda.cu").read_text()
    assert len(re.findall(r"<<<", source)) == 2
