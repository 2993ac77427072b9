"""`python -m packattn`: info, selftest, verify, report and pack."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from packattn import info, ops, selftest
from packattn.attention import Backend
from packattn.data import command
from packattn.errors import UnsupportedModelError
from packattn.requirements import missing


def run_selftest() -> int:
    """Run every named case on every backend that this machine has; 0 if all hold."""
    targets: list[tuple[Backend, str]] = [("torch", "cpu")]
    if ops.HAS_C:
        targets.append(("cpu", "cpu"))
    if torch.cuda.is_available():
        targets.append(("triton", "cuda"))
    failed = 0
    for backend, device in targets:
        began, passed, wrong = time.perf_counter(), 0, 0
        for name, problem in selftest.run_all(backend, device):
            if problem is None:
                passed += 1
            else:
                wrong += 1
                print(f"FAILED  {backend} on {device}: {name}: {problem}")
            if sys.stdout.isatty():
                print(f"{backend} on {device}: {passed + wrong} checks", end="\r", flush=True)
        print(f"{backend} on {device}: {passed} passed, {wrong} failed in {time.perf_counter() - began:.0f} s")
        failed += wrong
    if torch.cuda.is_available() and failed == 0:
        info.record_pass()
    elif not torch.cuda.is_available():
        print("No GPU here: the Triton kernels were not run.")
    return 1 if failed else 0


def run_data_command(arguments: argparse.Namespace) -> int:
    """Run `report` or `pack`."""

    def load(name: str) -> object:
        if info.version_of("transformers") is None:
            raise missing("--tokenizer", "transformers", "hf")
        from packattn.hf.tokenizer import load_tokenizer

        return load_tokenizer(name)

    print(command.run(arguments, load))
    return 0


def run_verify(what: str, *, plain: bool, implementation: str | None, lengths: list[int] | None) -> int:
    """Probe a saved model, or a tiny random one of a model type; 0 if its packed sequences are isolated and exact."""
    from pathlib import Path

    from packattn.hf import patch, verify
    from packattn.hf.tiny import load

    model = load(Path(what) if Path(what).exists() else what)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if not plain:
        print(patch(model))
    report = verify(model, lengths=lengths) if lengths else verify(model)
    print(report)
    return 0 if report.ok else 1


def or_the_reason(run: Callable[[], int]) -> int:
    """What a command returns; 1 with the reason if it cannot be done, 130 if it was interrupted."""
    try:
        return run()
    except KeyboardInterrupt as interruption:
        print(f"\n{interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, UnsupportedModelError) as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return 1


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m packattn", description="Boundary-aware packed attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, what is missing and what that costs")
    commands.add_parser("selftest", help="every kernel against the oracle on this machine, in about a minute")
    probe = commands.add_parser("verify", help="whether the packed sequences of a model see each other")
    probe.add_argument("model", metavar="MODEL", help="a folder, a name on the Hub, or a model type: a tiny one")
    probe.add_argument("--plain", action="store_true", help="transformers as it is, without packattn.patch")
    probe.add_argument("--attention", metavar="NAME", help="attn_implementation to probe with --plain: sdpa, eager ...")
    probe.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of the sequences")
    command.add_commands(commands)
    arguments = parser.parse_args()
    if arguments.command == "selftest":
        return run_selftest()
    if arguments.command == "verify":
        given = {"plain": arguments.plain, "implementation": arguments.attention, "lengths": arguments.lengths}
        return or_the_reason(partial(run_verify, arguments.model, **given))
    if arguments.command in ("report", "pack"):
        return or_the_reason(partial(run_data_command, arguments))
    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
