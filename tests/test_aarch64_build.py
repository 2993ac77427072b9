"""packattn._C for aarch64: the sources and flags of setup.py, cross-compiled and linked as far as that goes here.

What the kernels compute there is tested in test_attention_cpu_program.py.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import setuptools  # noqa: F401  brings distutils to Python 3.12 and later
import torch

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} on the PATH")
def test_the_extension_compiles_and_wants_only_what_torch_and_python_offer(tmp_path, monkeypatch):
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", COMPILER)
    [module] = [x for x in run_setup("setup.py", stop_after="init").ext_modules if x.name == "packattn._C"]
    # Debian's pyconfig.h leads to that of the target, which is not there; this machine's says the same of 64 bits.
    (tmp_path / "aarch64-linux-gnu").symlink_to(f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}")
    includes = [f"-I{path}" for path in (*module.include_dirs, sysconfig.get_path("include"), tmp_path)]
    # The libraries of torch and Python are not there for the target: the linker names what it misses.
    link = ["-shared", "-Wl,-z,defs", "-Wl,--warn-unresolved-symbols", "-o", tmp_path / "_C.so"]
    command = [COMPILER, "-fPIC", "-DPy_LIMITED_API", *module.extra_compile_args, *includes, *module.sources, *link]
    built = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wanted = set(re.findall("undefined reference to `(.+?)'", built.stderr))
    here = (ctypes.pythonapi, ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
    assert {"PyModule_Create2", "aoti_torch_library_def", "torch_parallel_for"} <= wanted
    assert not {name for name in wanted if not any(hasattr(library, name) for library in here)}
