"""Build packattn: `packattn._C` where there is a C++ compiler, `packattn._C_cuda` where there is CUDA as well.

Both are abi3 modules on torch's stable ABI, so that one build serves every later torch and Python. Metadata is in
pyproject.toml, the version in packattn/__init__.py.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

ROOT = Path(__file__).parent
GENERATED = ROOT / "build" / "generated"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# torch 2.10 is the oldest whose stable ABI has all that csrc/ uses.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def version() -> str:
    text = (ROOT / "packattn" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.M).group(1)


def write_schemas() -> None:
    """packattn/schemas.py, the home of the schemas, as a C++ header."""
    spec = importlib.util.spec_from_file_location("schemas", ROOT / "packattn" / "schemas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = ",\n".join(f'    "{name}{schema}"' for name, schema in module.SCHEMAS.items())
    text = f"#pragma once\nstatic const char* const kPackattnSchemas[] = {{\n{lines}}};\n"
    header = GENERATED / "packattn_schemas.h"
    GENERATED.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def nvcc_flags() -> list[str] | None:
    """Flags for the architectures that this nvcc knows; None where CUDA code cannot be built for this torch."""
    if torch.version.cuda is None or CUDA_HOME is None:
        return None
    nvcc = shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) or shutil.which("nvcc")
    if nvcc is None:
        return None
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout)
    wanted = torch.version.cuda.split(".")[0]
    if release is None or release.group(1) != wanted:
        print(f"packattn: {nvcc} is not of CUDA {wanted}, as torch is; packattn._C_cuda is not built")
        return None
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [arch for arch in ARCHITECTURES if f"compute_{arch}" in known.split()]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [*FLAGS, "-DUSE_CUDA", *targets]


def has_compiler() -> bool:
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        print(f"packattn: no C++ compiler ({compiler}) is on the PATH; installing without packattn._C")
        return False
    return True


def extensions() -> list:
    if not has_compiler():
        return []
    write_schemas()
    options = {"include_dirs": [str(ROOT / "csrc"), str(GENERATED)], "py_limited_api": True}
    # Relative, as setuptools wants them.
    attention = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/attention_cpu*.cpp"))
    cpu = ["csrc/bindings.cpp", "csrc/boundaries.cpp", "csrc/packing.cpp", *attention]
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*.h")) + sorted(ROOT.glob("csrc/*.cuh"))]
    found = [CppExtension("packattn._C", cpu, extra_compile_args=[*FLAGS, "-Wall"], depends=headers, **options)]
    nvcc = nvcc_flags()
    if nvcc is not None:
        arguments = {"nvcc": nvcc}
        cuda = CUDAExtension(
            "packattn._C_cuda", ["csrc/boundaries_cuda.cu"], extra_compile_args=arguments, depends=headers, **options
        )
        # torch_cuda brings its own cudart; the wheel of nvcc has none to link against.
        cuda.libraries.remove("cudart")
        found.append(cuda)
    return found


setup(
    version=version(),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
