"""One suite for every backend: `TRITON_INTERPRET=1 pytest` runs the tests of the `backend` fixture through Triton.

The interpreter has to be chosen before triton is imported, and the PTX emulator needs the compiler instead, so there
are two runs; `make test` makes both, without what is marked slow. With a GPU the plain run takes the Triton backend on
it as well.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "ptxemu"))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("torch", "cpu"), ("cpu", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("torch", "cuda"), ("triton", "cuda")]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend,device", BACKENDS, ids=["-".join(b) for b in BACKENDS])


def pytest_ignore_collect(collection_path):
    """In the interpreter, files without a test of the backends are not even imported."""
    if INTERPRETING and collection_path.match("test_*.py") and "backend, device" not in collection_path.read_text():
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if INTERPRETING:
        kept = [item for item in items if "backend" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if "backend" not in item.fixturenames])
        items[:] = kept


@pytest.fixture
def dtypes(backend, device):
    """The dtypes in which a backend can be judged here: Triton's interpreter computes bfloat16 wrongly."""
    if backend == "triton" and device == "cpu":
        return [torch.float32, torch.float16]
    if backend == "torch":
        return [torch.float32, torch.bfloat16]
    return [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_backends(request):
    """Poisoned memory for all tests of backends."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("poisoned_memory")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is not written reads as NaN, so that an output tile left out cannot pass."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
