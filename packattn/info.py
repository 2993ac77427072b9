"""`python -m packattn info`: what is installed, what is missing and what that costs; what has been verified here."""

import importlib.metadata
import json
import platform
from datetime import date
from pathlib import Path

import torch

import packattn
from packattn import ops
from packattn.attention import default_backend

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


def report() -> str:
    """The whole report as text."""
    rows = [
        ("packattn", packattn.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"),
        ("triton", version_of("triton") or 'missing: no backend "triton"; pip install triton'),
        ("transformers", version_of("transformers") or "missing: no patch, no verify; pip install packattn[hf]"),
        ("packattn._C", _compiled("_C", ops.HAS_C)),
        ("packattn._C_cuda", _compiled("_C_cuda", ops.HAS_C_CUDA)),
        ("backend on cpu", default_backend(torch.device("cpu"), torch.float32)),
        ("backend on cuda", default_backend(torch.device("cuda"), torch.float32)),
        ("GPU", _gpu()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _compiled(name: str, loaded: bool) -> str:
    if loaded:
        return "built"
    if name == "_C":
        return (
            "not built: attention on the CPU runs in plain torch, several times slower, and boundaries take several "
            "passes; install a C++ compiler and run `pip install --no-build-isolation .`"
        )
    if torch.version.cuda is None:
        return "not built, and not needed: this torch has no CUDA"
    return (
        "not built: on a GPU the boundaries are found in plain torch, a dozen small launches a forward instead of two; "
        f"install nvcc {torch.version.cuda} and run `pip install --no-build-isolation .`"
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
