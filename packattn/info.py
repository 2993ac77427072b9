"""`python -m packattn info`: what is installed, what is missing and what that costs; what has been verified here."""

import importlib.metadata
import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch

import packattn
from packattn import ops
from packattn.attention import default_backend
from packattn.requirements import how_to_build, how_to_install, outside_tested

RECORD = Path.home() / ".cache" / "packattn" / "selftest.json"


def version_of(name: str) -> str | None:
    """The installed version of a distribution, None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_key() -> str:
    """What a passed selftest vouches for: this GPU with these versions."""
    name = torch.cuda.get_device_name()
    return f"{name}, packattn {packattn.__version__}, torch {torch.__version__}, triton {version_of('triton')}"


def verified_on() -> str | None:
    """The date of the last passed selftest on this GPU with these versions, None if there is none."""
    if not RECORD.exists():
        return None
    recorded: dict[str, str] = json.loads(RECORD.read_text())
    return recorded.get(gpu_key())


def record_pass() -> None:
    """Remember that the selftest passed on this GPU today."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(recorded | {gpu_key(): date.today().isoformat()}, indent=1))


def shadowed() -> list[Path]:
    """Other copies of packattn that Python would import if this one did not come first: an installed one, under a
    source checkout."""
    here = Path(packattn.__file__).parent.resolve()
    copies = [(Path(entry) / "packattn").resolve() for entry in sys.path]
    return [copy for copy in dict.fromkeys(copies) if copy != here and (copy / "__init__.py").is_file()]


def report() -> str:
    """The whole report as text."""
    first = Path(packattn.__file__).parent.parent
    moved = "; run Python in another folder to use that one" if first.resolve() == Path.cwd().resolve() else ""
    others = [f"shadows {copy}: {first} comes first in sys.path{moved}" for copy in shadowed()]
    rows = [
        ("packattn", f"{packattn.__version__}, {Path(packattn.__file__).parent}"),
        *(("", line) for line in others),
        ("python", platform.python_version()),
        ("torch", f"{_tested('torch', torch.__version__)} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"),
        ("triton", _version("triton", 'no backend "triton"; run `pip install triton`')),
        ("transformers", _version("transformers", f"no patch, no verify; {how_to_install('transformers', 'hf')}")),
        ("packattn._C", _compiled("_C", ops.HAS_C)),
        ("packattn._C_cuda", _compiled("_C_cuda", ops.HAS_C_CUDA)),
        ("backend on cpu", default_backend(torch.device("cpu"), torch.float32)),
        ("backend on cuda", default_backend(torch.device("cuda"), torch.float32)),
        ("GPU", _gpu()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _tested(name: str, version: str) -> str:
    """The version, and whether it is outside of those tested."""
    outside = outside_tested(name, version)
    return f"{version}, {outside}" if outside else version


def _version(name: str, without: str) -> str:
    version = version_of(name)
    return f"missing: {without}" if version is None else _tested(name, version)


def _compiled(name: str, loaded: bool) -> str:
    if loaded:
        return "built"
    if name == "_C":
        return (
            "not built: attention on the CPU runs in plain torch, several times slower, and boundaries take several "
            f"passes; {how_to_build('a C++ compiler')}"
        )
    if torch.version.cuda is None:
        return "not built, and not needed: this torch has no CUDA"
    return (
        "not built: on a GPU the boundaries are found in plain torch, a dozen small launches a forward instead of two; "
        + how_to_build(f"nvcc {torch.version.cuda}")
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: attention runs on the CPU"
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    since = verified_on()
    if since is None:
        return f"{name}: not verified on this GPU; run `python -m packattn selftest`"
    return f"{name}: verified on {since}"
