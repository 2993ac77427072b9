"""What packattn stands on: the versions that its tests have passed with, and what to do where something is missing."""

import re
from pathlib import Path

# The oldest that pass `make test-oldest`, the newest that pass `make test-newest`; pyproject.toml and README.md agree.
TESTED = {"torch": ("2.10", "2.15"), "triton": ("3.6", "3.9"), "transformers": ("5.8", "5.24")}


def outside_tested(name: str, version: str) -> str:
    """In words, on which side a version lies of those tested; empty: on neither."""
    oldest, newest = TESTED[name]
    found = _minor(version)
    if found > _minor(newest):
        return f"newer than {newest}, the newest tested"
    return f"older than {oldest}, the oldest tested" if found < _minor(oldest) else ""


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def missing(what: str, package: str, extra: str) -> ImportError:
    """The error of something that needs a package of an extra, which is not installed."""
    return ImportError(f"{what} needs {package}, of the extra packattn[{extra}]; {how_to_install(package, extra)}.")


def how_to_install(package: str, extra: str) -> str:
    """How to get a package of an extra: packattn is installed from its source, where alone pip knows its extras."""
    wanted = f'"{package}>={TESTED[package][0]}"' if package in TESTED else package
    return (
        f"run `pip install {wanted}`, or, in the folder of packattn's source, "
        f'`pip install --no-build-isolation ".[{extra}]"`'
    )


def how_to_build(compiler: str) -> str:
    """How to get the compiled modules of the package that is imported: a source checkout has them in its own folder."""
    checkout = Path(__file__).parent.parent
    if (checkout / "setup.py").is_file():
        return f"install {compiler} and run `python setup.py build_ext --inplace` in {checkout}"
    return f"install {compiler} and run `pip install --no-build-isolation .` in the folder of packattn's source"
