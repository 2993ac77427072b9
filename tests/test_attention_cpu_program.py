"""The portable CPU kernels as a program of their own: by this machine's compiler, and for NEON in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from packattn import reference
from packattn.selftest import CASES, assert_accurate, cancelling_terms, run_on

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "tests/cpu_program/run_attention.cpp", *ROOT.glob("csrc/attention_cpu_p[lo]*.cpp")]
# Compiler, and what runs its program.
MACHINES = {
    "this machine": (["c++"], []),
    "aarch64": (["aarch64-linux-gnu-g++"], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
}
NAMES = {
    "around a tile of 64", "group of 7", "head dim 72", "head dim 192, values 128", "bidirectional window", "softcap",
    "image blocks", "padding", "values at 1e4",
}  # fmt: skip
CODES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 1}


@pytest.fixture(scope="module", params=MACHINES)
def program(request, tmp_path_factory):
    compiler, emulator = MACHINES[request.param]
    missing = [tool for tool in (*compiler, *emulator[:1]) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on the PATH")
    binary = tmp_path_factory.mktemp("program") / "run_attention"
    subprocess.run([*compiler, "-O3", "-std=c++20", "-Wall", f"-I{ROOT / 'csrc'}", *SOURCES, "-o", binary], check=True)
    return [*emulator, binary]


def data(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_the_portable_kernels_are_accurate(program, case, dtype, tmp_path):
    tensors = case.tensors(dtype, "cpu")
    tensors[5].zero_()  # no gradient of lse
    q, k, v, _, dout, _ = tensors
    truth = run_on(reference.attention, case, [x.double() for x in tensors], "cpu")
    naive = run_on(reference.attention, case, tensors, "cpu")
    sizes = [q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2], CODES[dtype]]
    scale = q.shape[2] ** -0.5 if case.scale is None else case.scale
    results = []
    for threads in (1, 3):  # whole sequences, and pieces of them
        parts = [torch.tensor([*sizes, threads]), torch.tensor([scale, case.softcap]), *case.packed_mask("cpu")[:4]]
        (tmp_path / "problem").write_bytes(b"".join(map(data, [*parts, q, k, v, dout])))
        subprocess.run([*program, tmp_path / "problem", tmp_path / "result"], check=True)
        results.append((tmp_path / "result").read_bytes())
    assert results[0] == results[1]
    found, at = {}, 0
    for name in ("out", "lse", "dq", "dk", "dv"):
        wanted = truth[name]
        kind = torch.float32 if name == "lse" else dtype
        count = wanted.numel() * kind.itemsize
        found[name] = torch.frombuffer(bytearray(results[0][at : at + count]), dtype=kind).view(wanted.shape)
        at += count
    assert at == len(results[0])
    terms = cancelling_terms(case, dtype, "cpu", scores_round_alike=True)
    for name, value in found.items():
        assert_accurate(name, value, truth[name], naive[name], terms.get(name, 0.0))
