"""The shape of the package: what imports what, how long files are, what they must not hold."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import packattn
from packattn.requirements import TESTED

ROOT = Path(packattn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
REPOSITORY = Path(__file__).parent.parent
# Imports point downwards: what each part of the package may import of it.
ALLOWED = {
    "errors": set(),
    "arguments": set(),
    "requirements": set(),
    "schemas": set(),
    "ops": {"schemas", "boundaries", "blocked", "kernels", "data"},
    "boundaries": {"arguments", "ops"},
    "plot": {"mask", "requirements"},
    "mask": {"arguments", "boundaries", "errors", "plot"},
    "dropout": set(),
    "reference": {"mask", "dropout"},
    "blocked": {"dropout", "ops"},
    "kernels": {"dropout"},
    "attention": {"arguments", "ops", "mask", "schemas", "kernels", "requirements"},
    "varlen": {"arguments", "attention", "boundaries", "mask"},
    "losses": {"arguments", "boundaries"},
    "hf": {"attention", "mask", "boundaries", "errors", "data", "schemas", "requirements"},
    "data": {"arguments", "ops", "requirements"},
    "selftest": {"attention", "boundaries", "mask", "reference", "schemas", "ops"},
    "info": {"attention", "ops", "schemas", "selftest", "requirements"},
    "__init__": {"losses", "attention", "varlen", "boundaries", "errors", "mask", "hf", "data"},
    "cli": {"info", "selftest", "attention", "errors", "ops", "data", "hf", "requirements"},
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "packattn" else [f"packattn.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("packattn.")}
    return {name for name in parts if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()} - {part_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    assert imported_parts(path) <= ALLOWED[part_of(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_thing(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_environment_variables_and_no_float_atomics(path):
    text = path.read_text()
    assert not re.search(r"os\.environ|getenv", text)
    assert not re.search(r"tl\.atomic_|make_block_ptr|tl\.advance|triton\.autotune", text)


def test_importing_packattn_imports_neither_triton_nor_transformers():
    code = "import sys, packattn; print(*({'triton', 'transformers', 'matplotlib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_without_transformers_what_needs_it_names_the_extra():
    """In a new process: sys.modules of this one holds transformers."""
    code = """
import sys
sys.modules["transformers"] = None
import packattn
packattn.PackingCollator, packattn.pack_dataset, packattn.packing_report
for name in ("patch", "Patch", "verify"):
    try:
        getattr(packattn, name)
    except ImportError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = found.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith("packattn.patch, as packattn.verify, needs transformers, of the extra packattn[hf]; ")
        assert 'run `pip install "transformers>=' in line


def test_no_text_sends_to_an_index_for_packattn_which_is_not_there():
    """What is installed from its source names the extra in the folder of the source."""
    for path in [*FILES, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        assert not re.search(r"pip install [\"']?packattn", path.read_text()), path


def test_versions_are_said_alike_wherever_they_are_said():
    readme, project, make = ((REPOSITORY / name).read_text() for name in ("README.md", "pyproject.toml", "Makefile"))
    project = " ".join(project.replace("#", " ").split())
    for name, (oldest, newest) in TESTED.items():
        assert f"{name} {oldest} to {newest}" in readme
        assert f"{name}>={oldest},<" in project
        assert f"{name} {newest}" in project
        assert name == "triton" or f'"{name}=={oldest}.0"' in make  # triton is what that torch brings


def test_only_hf_imports_transformers():
    for path in FILES:
        if part_of(path) not in ("hf", "info"):
            assert not re.search(r"^\s*(import|from) transformers", path.read_text(), re.M), path


def test_every_public_name_is_there_documented_and_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    for name in packattn.__all__:
        assert getattr(packattn, name).__doc__, name
        assert name in readme, f"README.md does not name {name}"


def test_type_checkers_see_every_public_name():
    """Also those that are loaded at first use, which are nothing but objects to them otherwise."""
    tree = ast.parse(Path(packattn.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(packattn.__all__) <= imported


def test_docstring_examples_hold():
    names = ["boundaries", "mask", "data.collator", "data.packing", "data.sampler"]
    for name in names:
        result = doctest.testmod(importlib.import_module(f"packattn.{name}"), extraglobs={"torch": __import__("torch")})
        assert result.attempted > 0, name
        assert result.failed == 0, name


def test_the_compiled_module_registers_the_schemas_of_the_package():
    torch = pytest.importorskip("torch")
    for name, schema in packattn.schemas.SCHEMAS.items():
        registered = getattr(torch.ops.packattn, name).default._schema
        wanted = torch._C.parse_schema(f"packattn::{name}{schema}")
        assert str(registered) == str(wanted)


def test_a_source_distribution_holds_what_builds_and_tests_it(tmp_path):
    copy = tmp_path / "packattn"
    made = shutil.ignore_patterns(".*", "build", "out", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(REPOSITORY, copy, ignore=made)
    wanted = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=copy, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not wanted - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
