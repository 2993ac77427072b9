"""The compiled Triton kernels: run by the PTX emulator through the real launchers, and compiled for every target.

The interpreter cannot compute bfloat16, and does not see layouts, pipelines or races; the emulator runs what the
compiler made for sm_80.
"""

import pytest
import torch
import triton
from ptxemu import run_triton
from triton.backends.compiler import GPUTarget

from packattn.attention import PackedAttention
from packattn.kernels import launch
from packattn.selftest import Case, check_accuracy, check_isolation, packed, run

KERNELS = ("_fwd_kernel", "_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel")


class Emulated:
    """Stands in for a kernel: `kernel[grid](...)` compiles for sm_80 and runs in the emulator, with all its checks."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run_kernel(*args, num_warps=4, num_stages=3, **kwargs):
            params = self.kernel.params
            given = dict(zip([p.name for p in params], args, strict=False)) | kwargs
            constexprs = {p.name: given.pop(p.name) for p in params if p.is_constexpr}
            run_triton(
                self.kernel, grid, given, constexprs, num_warps, num_stages, check_races=True, check_conflicts=True
            )

        return run_kernel


@pytest.fixture
def emulator(monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Emulated(getattr(launch, name)))


CASES = [
    Case("straddling tiles, group of 3", [20, 1, 45, 30], heads_q=3, heads_k=1, head_dim=64),
    Case("window", [70, 30], heads_q=2, heads_k=2, head_dim=32, window=17),
    Case("bidirectional", [40, 3, 50], heads_q=4, heads_k=2, head_dim=16, mask="bidirectional"),
    Case("head dim 80", [20, 30], head_dim=80),
    Case("head dim 128", [50, 30], head_dim=128, heads_q=1),
    Case("value dim differs", [20, 30], head_dim=48, head_dim_v=32),
    Case("softcap, sinks, window", [40, 20], softcap=5.0, sinks=True, window=30),
    Case("unmasked blocks", [300], heads_q=2, heads_k=2, head_dim=32),
    Case("empty spans", [], spans=([0, 0, 0, 2, 2, 5, 9], [0, 2, 2, 2, 7, 7, 9], 9)),
    Case("empty spans with sinks", [], spans=([0, 0, 4], [0, 2, 4], 9), sinks=True),
    Case("strided views", [30, 20], heads_q=4, heads_k=2, strided=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_compiled_bfloat16_is_accurate(case, emulator):
    check_accuracy(case, "triton", torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiled_float16_and_float32_are_accurate(dtype, emulator):
    check_accuracy(CASES[0], "triton", dtype, "cpu")


def test_compiled_dropout_draws_the_bits_of_every_backend(emulator):
    case = Case("dropout", [20, 30], heads_q=2)
    q, k, v, *_ = case.tensors(torch.float32, "cpu")
    seed = torch.tensor([0x123456789ABCDEF])
    out = {}
    for backend in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, _ = PackedAttention.apply(*leaves, *case.packed_mask("cpu"), None, seed, 0.25, 0.0, 0.3, backend)
        out[backend] = [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]
    for one, other in zip(out["triton"], out["torch"], strict=True):
        torch.testing.assert_close(one, other)


def test_law_2_compiled_kernels_do_not_leak(emulator):
    check_isolation(CASES[0], "triton", torch.bfloat16, "cpu")


def test_law_5_compiled_kernels_are_deterministic(emulator):
    first, second = (run(packed("triton"), CASES[0], torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_law_7_the_grid_depends_on_the_number_of_tokens_only(monkeypatch):
    launches = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.name, grid, kwargs.get("BLOCK_M")))

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Recorded(name))
    seen = []
    for lengths in ([512], [1] * 512, [100, 12, 400]):
        launches.clear()
        run(packed("triton"), Case("", lengths), torch.float32, "cpu")
        seen.append(list(launches))
    assert len(seen[0]) == 4
    assert seen[0] == seen[1] == seen[2]


def test_a_cpu_tensor_is_refused_outside_the_interpreter():
    with pytest.raises(NotImplementedError, match="tensors are on the CPU, where Triton runs only in its interpreter"):
        run(packed("triton"), CASES[0], torch.float32, "cpu")


def test_every_reason_is_given():
    with pytest.raises(NotImplementedError, match=r"on the CPU, .*; head dim 320 > 256. Use backend=\"torch\""):
        run(packed("triton"), Case("", [4], head_dim=320), torch.float32, "cpu")


class StandInDriver:
    """Answers what Triton's JIT asks of a driver, so that a launch is bound, specialised and compiled without a GPU."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0

    def is_active(self):
        return True


class WarmedUp:
    """Stands in for a kernel: `kernel[grid](...)` goes the way of a launch up to the compiled kernel."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)]
TARGETS += [GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")]
# What a block may hold of shared memory, in bytes.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, "gfx942": 65_536}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_a_launch_compiles_for_every_target(target, monkeypatch):
    compiled = []
    large = target.arch in (80, 90, 100)
    monkeypatch.setattr(launch, "_small_memory", lambda device: not large)
    for name in KERNELS:
        monkeypatch.setattr(launch, name, WarmedUp(getattr(launch, name), compiled))
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StandInDriver(target))
    try:
        run(packed("triton"), Case("", [70, 60], heads_q=3, head_dim=64, sinks=True), torch.bfloat16, "cpu")
    finally:
        triton.runtime.driver._active = before
    assert len(compiled) == 4
    limit = SHARED.get(target.arch, 163_840)
    for kernel in compiled:
        assert kernel.metadata.target.arch == target.arch
        assert kernel.metadata.shared <= limit, kernel.metadata.name
