"""`python -m packattn report` and `pack`: their arguments and what they do."""

import argparse
import hashlib
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from packattn.data.corpus import pack_corpus
from packattn.data.counts import shown
from packattn.data.jsonl import BadLines, Reader
from packattn.data.packing import Method, Overlong
from packattn.data.report import packing_report
from packattn.data.values import write_whole

Load = Callable[[str], Any]


def add_commands(commands: Any) -> None:
    """Add the two to the parsers of the command line."""
    report = commands.add_parser("report", help="what padding wastes and packing saves, for a file of JSON lines")
    pack = commands.add_parser("pack", help="tokenize and pack a file of JSON lines into a folder of rows")
    for parser in (report, pack):
        parser.add_argument("file", type=Path, help="JSON lines: text, prompt and completion, messages, or input_ids")
        parser.add_argument("--tokenizer", help="a model's name or folder; not needed where lines have input_ids")
        parser.add_argument("--capacity", type=int, default=4096, help="tokens of a row (%(default)s)")
        parser.add_argument("--text", default="text", metavar="FIELD", help="the field of text (%(default)s)")
        parser.add_argument("--bad-lines", choices=get_args(BadLines), default="error")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--quiet", action="store_true", help="no progress bars")
    report.add_argument("--ranks", type=int, default=8, help="GPUs that train (%(default)s)")
    report.add_argument("--minibatch", type=int, default=4, help="examples per GPU of a plain run (%(default)s)")
    report.add_argument("--accumulation", type=int, default=2, help="micro-steps of a plain step (%(default)s)")
    report.add_argument("--json", type=Path, metavar="OUT.json", help="also write the figures")
    report.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw them")
    pack.add_argument("--out", type=Path, required=True, help="the folder to make; it must not be there")
    pack.add_argument("--method", choices=get_args(Method), default="mixed")
    pack.add_argument("--overlong", choices=get_args(Overlong), default="error", help="lines longer than a row")
    pack.add_argument("--max-per-bin", type=int, help="the most examples of a row")
    pack.add_argument(
        "--shard-lines", type=int, default=10_000, help="lines that are tokenized at a time (%(default)s)"
    )
    pack.add_argument("--shard-rows", type=int, default=2_000, help="rows of a Parquet file (%(default)s)")


def run(arguments: argparse.Namespace, load: Load) -> str:
    """Run `report` or `pack`; `load` finds a tokenizer. What to print.

    Raises:
        ValueError, OSError: the input or an argument cannot be used; nothing is lost.
        KeyboardInterrupt: interrupted, by the keyboard or a signal to end; the message says how to go on.
    """
    if not arguments.file.is_file():
        raise FileNotFoundError(f"{arguments.file}: no such file.")
    tokenizer = None if arguments.tokenizer is None else load(arguments.tokenizer)
    reader = Reader(arguments.file, tokenizer, arguments.text, arguments.bad_lines)
    return _report(reader, arguments) if arguments.command == "report" else _pack(reader, arguments)


def _report(reader: Reader, arguments: argparse.Namespace) -> str:
    parts = shown(reader.batches(1_000), None, "tokenizing, thousands of lines", not arguments.quiet)
    counted = [([len(example.input_ids) for example in examples], skipped) for examples, skipped in parts]
    lengths = list(itertools.chain(*(part for part, _ in counted)))
    if not lengths:
        raise ValueError(f"{reader.path} holds no examples.")
    report = packing_report(
        lengths, arguments.capacity, ranks=arguments.ranks, minibatch=arguments.minibatch,
        accumulation=arguments.accumulation, seed=arguments.seed,
    )  # fmt: skip
    if arguments.json is not None:
        write_whole(arguments.json, lambda path: path.write_text(report.to_json()))
    if arguments.plot is not None:
        report.plot(arguments.plot)
    skipped = sum(count for _, count in counted)
    return str(report) + (f"\n{skipped:,} lines were skipped." if skipped else "")


def _pack(reader: Reader, arguments: argparse.Namespace) -> str:
    state = "" if reader.tokenizer is None else _state(reader.tokenizer)
    # A signal to end, as a batch system sends it, is an interruption like that from the keyboard.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        packed = pack_corpus(
            reader, arguments.out, arguments.capacity,
            identity={"tokenizer": arguments.tokenizer, "vocabulary": hashlib.sha256(state.encode()).hexdigest()},
            method=arguments.method, seed=arguments.seed, max_per_bin=arguments.max_per_bin,
            overlong=arguments.overlong, shard_lines=arguments.shard_lines, shard_rows=arguments.shard_rows,
            progress=not arguments.quiet,
        )  # fmt: skip
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted; what is done is kept in {arguments.out}.partial, the same command goes on there."
        ) from error
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            f"{error}; what is done is kept in {arguments.out}.partial: make room or mend it, then the same command "
            "goes on there."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return f"{arguments.out}: {packed}\nRead it with datasets.load_dataset({str(arguments.out)!r}, split='train')."


def _state(tokenizer: Any) -> str:
    """What decides a tokenizer's output, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return f"{vocabulary}{getattr(tokenizer, 'chat_template', None)}{tokenizer.special_tokens_map}"
