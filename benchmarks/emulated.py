"""The launchers of packattn.kernels without a GPU: bound and compiled by Triton's own JIT, run by the PTX emulator."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton

from benchmarks.compiled import GPUS, target_of
from packattn.kernels import launch

sys.path.append(str(Path(__file__).parent.parent / "tests" / "ptxemu"))
from ptxemu import run_ptx

# Fences that PTX asks for and that a version of Triton leaves out for sm_90: in loops, between a copy and a wgmma that
# reads it (3.6); with a softcap, behind the last write to the registers of a wgmma (3.6 and 3.7).
_MISSING = {"3.6": ("fence.proxy.async", "wgmma.fence"), "3.7": ("wgmma.fence",)}
MISSING = _MISSING.get(".".join(triton.__version__.split(".")[:2]), ())
KERNELS = ("_fwd_kernel", "_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel")


class StandInDriver:
    """Answers what Triton's JIT asks of a driver, so that a launch is bound, specialised and compiled without a GPU."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return hash(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class StandInKernel:
    """`kernel[grid](...)` goes the way of a launch up to the compiled kernel, then to `done`."""

    def __init__(self, kernel: Any, done: Callable[..., None]) -> None:
        self.kernel, self.done = kernel, done

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
            self.done(compiled, grid, names, [given[name] for name in names])

        return run


@contextmanager
def launches(arch: int | str, done: Callable[..., None]) -> Iterator[None]:
    """Inside, every launch for `arch` ends in `done(compiled, grid, names, values)`, on CPU tensors."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StandInDriver(target_of(arch)))
    kernels = {name: StandInKernel(getattr(launch, name), done) for name in KERNELS}
    try:
        with patch.multiple(launch, family=lambda device: GPUS[arch].family, **kernels):
            yield
    finally:
        triton.runtime.driver._active = before


def emulate(compiled: Any, grid: tuple[int, ...], names: list[str], values: list[Any], **checks: Any) -> None:
    """Run what was bound in the emulator; the tensors among `values` are changed in place."""
    meta = compiled.metadata
    checks = {"allow_missing": MISSING} | checks
    run_ptx(compiled.asm["ptx"], meta.name, grid, 32 * meta.num_warps, values, meta.shared, names=names, **checks)
