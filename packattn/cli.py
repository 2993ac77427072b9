"""The command line: info, selftest, verify, report and pack."""

import argparse
import hashlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from packattn import info, ops, selftest
from packattn.attention import Backend
from packattn.data.corpus import LONG_LINES, Packed, counted, pack_corpus
from packattn.data.counts import shown
from packattn.data.examples import targets
from packattn.data.fit import LARGEST_CAPACITY
from packattn.data.formats import Targets
from packattn.data.jsonl import BadLines, Reader
from packattn.data.packing import Method
from packattn.data.report import packing_report
from packattn.data.values import whole, write_whole
from packattn.errors import UnsupportedModelError
from packattn.requirements import missing

_LARGEST = 2**31 - 1
# What numbers of `report` and `pack` may be: at least, at most.
_NUMBERS = {
    "capacity": (1, LARGEST_CAPACITY), "seed": (0, 2**63 - 1), "ranks": (1, _LARGEST), "minibatch": (1, _LARGEST),
    "accumulation": (1, _LARGEST), "max_per_bin": (1, _LARGEST), "shard_lines": (1, _LARGEST),
    "shard_rows": (1, _LARGEST),
}  # fmt: skip


def main() -> int:
    """Parse the command line and run the command: 0, or 1 with the reason, or 130 if it was interrupted."""
    arguments = make_parser().parse_args()
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt as interruption:
        print(f"\n{interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, UnsupportedModelError) as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options; each sets `run`."""
    parser = argparse.ArgumentParser(prog="python -m packattn", description="Boundary-aware packed attention.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        return added

    command("info", run_info, "what is installed, what is missing and what that costs")
    command("selftest", run_selftest, "every kernel against the oracle on this machine, in about a minute")
    probe = command("verify", run_verify, "whether the packed sequences of a model see each other")
    probe.add_argument("model", metavar="MODEL", help="a folder, a name on the Hub, or a model type: a tiny one")
    probe.add_argument("--plain", action="store_true", help="transformers as it is, without packattn.patch")
    probe.add_argument("--attention", metavar="NAME", help="attn_implementation to probe with --plain: sdpa, eager ...")
    probe.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of the sequences")
    report = command("report", run_report, "what padding wastes and packing saves, for a file of JSON lines")
    pack = command("pack", run_pack, "tokenize and pack a file of JSON lines into a folder of rows")
    for data in (report, pack):
        data.add_argument("file", type=Path, help="JSON lines: text, prompt and completion, messages, input_ids ...")
        data.add_argument("--tokenizer", help="a model's name or folder; not needed where lines have input_ids")
        data.add_argument("--capacity", type=int, default=4096, help="tokens of a row (%(default)s)")
        data.add_argument("--text", default="text", metavar="FIELD", help="the field of text (%(default)s)")
        data.add_argument("--no-end", action="store_true", help="append no end-of-text token to texts and completions")
        data.add_argument(
            "--columns", nargs="*", metavar="NAME",
            help="of lines with input_ids, the further fields to keep (all that are lists of numbers)",
        )  # fmt: skip
        data.add_argument(
            "--bad-lines", choices=get_args(BadLines), default="error", help="a line that cannot be used (%(default)s)"
        )
        data.add_argument("--seed", type=int, default=0, help="of the random order (%(default)s)")
        data.add_argument("--quiet", action="store_true", help="no progress bars")
    report.add_argument("--ranks", type=int, default=8, help="GPUs that train (%(default)s)")
    report.add_argument("--minibatch", type=int, default=4, help="examples per GPU of a plain run (%(default)s)")
    report.add_argument("--accumulation", type=int, default=2, help="micro-steps of a plain step (%(default)s)")
    report.add_argument("--json", type=Path, metavar="OUT.json", help="also write the figures")
    report.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw them")
    pack.add_argument("--out", type=Path, required=True, help="the folder to make; it must not be there")
    pack.add_argument(
        "--targets", choices=get_args(Targets), default="assistant",
        help="what is learnt of messages: the assistant's turns, as the chat template marks them, or all; "
        "of a prompt and its completion: the completion, or all (%(default)s)",
    )  # fmt: skip
    pack.add_argument("--method", choices=get_args(Method), default="mixed", help="the packer (%(default)s)")
    long_ = pack.add_mutually_exclusive_group()
    long_.add_argument(
        "--overlong", choices=LONG_LINES,
        default="error", help="an example longer than a row (%(default)s)",
    )  # fmt: skip
    long_.add_argument(
        "--truncate", action="store_const", const="truncate", dest="overlong", help="short for --overlong truncate"
    )
    pack.add_argument("--max-per-bin", type=int, metavar="N", help="the most examples of a row")
    pack.add_argument(
        "--shard-lines", type=int, default=10_000, help="lines that are tokenized at a time (%(default)s)"
    )
    pack.add_argument("--shard-rows", type=int, default=2_000, help="rows of a Parquet file (%(default)s)")
    return parser


def run_info(_: argparse.Namespace) -> int:
    """Print what is installed."""
    print(info.report())
    return 0


def run_selftest(_: argparse.Namespace | None = None) -> int:
    """Run every named case on every backend that this machine has; 0 if all hold."""
    backends: list[tuple[Backend, str]] = [("torch", "cpu")]
    if ops.HAS_C:
        backends.append(("cpu", "cpu"))
    if torch.cuda.is_available():
        backends.append(("triton", "cuda"))
    failed = 0
    for backend, device in backends:
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


def run_verify(arguments: argparse.Namespace) -> int:
    """Probe a saved model, or a tiny random one of a model type; 0 if its packed sequences are isolated and exact."""
    from packattn.hf import patch, verify
    from packattn.hf.tiny import load

    model = load(Path(arguments.model) if Path(arguments.model).exists() else arguments.model)
    if arguments.attention is not None:
        model.set_attn_implementation(arguments.attention)
    if not arguments.plain:
        print(patch(model))
    report = verify(model, lengths=arguments.lengths) if arguments.lengths else verify(model)
    print(report)
    return 0 if report.ok else 1


def run_report(arguments: argparse.Namespace) -> int:
    """Print what each way of packing saves; then write the files that were asked for."""
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing("--plot", "matplotlib", "plot")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{name} {path}: there is no folder {path.parent}; make it.")
    reader = _reader(arguments, "all")
    lengths: list[int] = []
    problems: list[str] = []
    without_target = 0
    for lines in shown(reader.parts(1_000), None, "tokenizing, thousands of lines", not arguments.quiet):
        part = reader.read(lines)
        lengths.extend(example.tokens for example in part.examples)
        problems.extend(part.problems)
        without_target += sum(targets(example, 1) == 0 for example in part.examples)
    if not lengths:
        why = f" All {counted(len(problems), 'line')} were skipped, the first: {problems[0]}" if problems else ""
        raise ValueError(f"{reader.path} holds no examples.{why}")
    report = packing_report(
        lengths, arguments.capacity, ranks=arguments.ranks, minibatch=arguments.minibatch,
        accumulation=arguments.accumulation, seed=arguments.seed,
    )  # fmt: skip
    print(report)
    if problems:
        print(f"{counted(len(problems), 'line')} skipped, the first: {problems[0]}")
    if without_target:
        print(f"{counted(without_target, 'example')} without a target.")
    if arguments.json is not None:
        write_whole(arguments.json, lambda path: path.write_text(report.to_json()))
    if arguments.plot is not None:
        report.plot(arguments.plot)
    return 0


def run_pack(arguments: argparse.Namespace) -> int:
    """Make a folder of packed rows, and print what became of every line."""
    # A signal to end, as a batch system sends it, is an interruption like that from the keyboard.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        packed = _packed(arguments)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted; what is done is kept in {arguments.out}.partial, the same command goes on there."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{arguments.out}: {packed}\nRead it with datasets.load_dataset({str(arguments.out)!r}, split='train').")
    return 0


def _packed(arguments: argparse.Namespace) -> Packed:
    reader = _reader(arguments, arguments.targets)
    state = "" if reader.tokenizer is None else _state(reader.tokenizer)
    try:
        return pack_corpus(
            reader, arguments.out, arguments.capacity,
            identity={"tokenizer": arguments.tokenizer, "vocabulary": hashlib.sha256(state.encode()).hexdigest()},
            method=arguments.method, seed=arguments.seed, max_per_bin=arguments.max_per_bin,
            overlong=arguments.overlong, shard_lines=arguments.shard_lines, shard_rows=arguments.shard_rows,
            progress=not arguments.quiet,
        )  # fmt: skip
    except OSError as error:
        if isinstance(error, FileExistsError) or not Path(f"{arguments.out}.partial").is_dir():
            raise
        raise OSError(
            f"{error}; what is done is kept in {arguments.out}.partial: make room or mend it, then the same command "
            "goes on there."
        ) from error


def _reader(arguments: argparse.Namespace, learnt: Targets) -> Reader:
    """The lines of the file, once the numbers are checked."""
    for name, (least, most) in _NUMBERS.items():
        if getattr(arguments, name, None) is not None:
            whole(f"--{name.replace('_', '-')}", getattr(arguments, name), least, most)
    if not arguments.file.is_file():
        raise FileNotFoundError(f"{arguments.file}: {'not a file' if arguments.file.exists() else 'no such file'}.")
    tokenizer = None
    if arguments.tokenizer is not None:
        if info.version_of("transformers") is None:
            raise missing("--tokenizer", "transformers", "hf")
        from packattn.hf.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
    return Reader(
        arguments.file, tokenizer, arguments.text, arguments.bad_lines, learnt, not arguments.no_end, arguments.columns
    )


def _state(tokenizer: Any) -> str:
    """What decides a tokenizer's output, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return f"{vocabulary}{getattr(tokenizer, 'chat_template', None)}{tokenizer.special_tokens_map}"
