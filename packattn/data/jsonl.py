"""JSON lines in, examples of tokens out; every complaint names the file and the line."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import torch

from packattn.data.examples import Example, read_example
from packattn.data.formats import Encoder, Source, Targets

BadLines = Literal["error", "skip"]
Lines = list[tuple[int, bytes]]
_BLOCK = 1 << 16


class LineError(ValueError):
    """A line that cannot be used: the file, the line and what is wrong with it."""


class Part(NamedTuple):
    """What some lines hold.

    Attributes:
        examples: the examples, in the order of the lines.
        numbers: the number of each one's line.
        problems: what is wrong with each line that was skipped.
        unused: the names of fields that were not read, and of how many lines.
    """

    examples: list[Example]
    numbers: list[int]
    problems: list[str]
    unused: Counter[str]


class Reader:
    """Examples from a file of JSON lines.

    A line is an object with one of: `input_ids`, with what `PackingCollator` takes beside them; `messages`, or
    `conversations` of ShareGPT, through the tokenizer's chat template; `prompt` and `completion` or `response`, two
    texts or two lists of messages; `instruction`, `input` and `output` of Alpaca; a field of text. `Encoder` says how
    they are tokenized and what their targets are. Examples of one file have the same columns.

    Args:
        path: the file, UTF-8. A byte order mark at its begin and blank lines at its end are passed over.
        tokenizer: a Hugging Face tokenizer; None where the lines have input_ids.
        text: the name of the field of text.
        bad_lines: "error" stops at a line that cannot be used, "skip" passes over it and keeps its problem.
        targets, end, columns: as for `Encoder`.

    Raises:
        ValueError: an argument is none of its values.
    """

    def __init__(
        self, path: Path, tokenizer: Any | None, text: str = "text", bad_lines: BadLines = "error",
        targets: Targets = "assistant", end: bool = True, columns: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        for name, value, values in (("bad_lines", bad_lines, BadLines), ("targets", targets, Targets)):
            if value not in get_args(values):
                raise ValueError(f"{name} must be one of {', '.join(get_args(values))}, got {value!r}.")
        self.path, self.tokenizer, self.bad_lines = path, tokenizer, bad_lines
        self.encoder = Encoder(tokenizer, text, targets, end, columns)
        self.options = {
            "text": text, "bad_lines": bad_lines, "targets": targets, "end": end,
            "columns": None if columns is None else sorted(columns),
        }  # fmt: skip

    def parts(self, lines: int) -> Iterator[Lines]:
        """The numbered lines of the file, so many at a time, unread."""
        with self.path.open("rb") as file:
            numbered = enumerate(_up_to_the_last(file), start=1)
            while part := list(itertools.islice(numbered, lines)):
                yield part

    def read(self, lines: Lines, columns: Sequence[str] | None = None) -> Part:
        """The examples of some lines.

        Args:
            lines: of `parts`.
            columns: what the examples must have, as those before; None: as the first of these.

        Raises:
            LineError: a line cannot be used, and `bad_lines` is "error".
        """
        sources, numbers, problems = [], [], list[str]()
        for number, line in lines:
            try:
                sources.append(self._source(number, line))
                numbers.append(number)
            except LineError as error:
                problems.append(self._skipped(error))
        examples, kept, unused = [], [], Counter[str]()
        for number, (source, fields), found in zip(numbers, sources, self._encoded(numbers, sources), strict=True):
            try:
                if isinstance(found, LineError):
                    raise found
                example = self._example(number, found)
                names = tuple(sorted(example.columns))
                columns = columns or names
                if set(names) != set(columns):
                    raise self._error(
                        number, f"has the columns {', '.join(names)} where those before have {', '.join(columns)}"
                    )
            except LineError as error:
                problems.append(self._skipped(error))
                continue
            examples.append(example)
            kept.append(number)
            unused.update(fields - set(source.used))
        return Part(examples, kept, problems, unused)

    def _skipped(self, error: LineError) -> str:
        """What is wrong with a line that is skipped; if none is to be skipped, raise it."""
        if self.bad_lines == "error":
            raise LineError(f"{error} Correct the line, or pass over such lines with --bad-lines skip.") from error
        return str(error)

    def _named(self, number: int) -> str:
        return f"{self.path}, line {number}"

    def _error(self, number: int, problem: object) -> LineError:
        return LineError(f"{self._named(number)}: {problem}.")

    def _source(self, number: int, line: bytes) -> tuple[Source, set[str]]:
        """What one line gives to the tokenizer, and the names of its fields."""
        try:
            record = parsed(line, first=number == 1)
            return self.encoder.source(record), {name for name, value in record.items() if value is not None}
        except ValueError as error:
            raise self._error(number, error) from error

    def _encoded(self, numbers: list[int], sources: list[tuple[Source, set[str]]]) -> list[Any]:
        """The columns of each source, or the LineError of one that cannot be tokenized, which is found one by one."""
        try:
            return list(self.encoder.encode([source for source, _ in sources]))
        except Exception as error:
            if len(sources) == 1:
                return [self._error(numbers[0], f"cannot be tokenized ({error or type(error).__name__})")]
        return [self._encoded([number], [source])[0] for number, source in zip(numbers, sources, strict=True)]

    def _example(self, number: int, columns: Any) -> Example:
        """The example of one line, checked as PackingCollator checks it, and that its numbers can be kept."""
        if columns["input_ids"] == []:
            raise self._error(number, "has no tokens")
        try:
            example = read_example(columns, self._named(number))
        except (TypeError, ValueError) as error:
            raise LineError(str(error)) from error
        if example.label is not None:
            raise self._error(number, "has one label for the whole example, where rows hold one value per token")
        for name, values in example.columns.items():
            if values.is_floating_point():
                if not bool(torch.isfinite(values).all()):
                    raise self._error(number, f"{name} must hold finite numbers of 32 bits")
                continue
            least = 0 if name == "input_ids" else -(2**31)
            if not bool(((values >= least) & (values < 2**31)).all()):
                raise self._error(number, f"{name} must lie in [{'0' if least == 0 else '-2**31'}, 2**31)")
        return example


def parsed(line: bytes, first: bool) -> dict[str, Any]:
    """The object of one line of JSON; `first`: of the file, where a byte order mark may be.

    Raises:
        ValueError: it is not JSON as RFC 8259 has it, holds what UTF-8 cannot write, or is no object.
    """
    if not line.strip():
        raise ValueError("is blank")
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        record = json.loads(text.strip(), parse_constant=_no_constant, object_pairs_hook=_object)
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair ({error.object[error.start]!r}), which is no text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # of the hooks below, or of Python's limit on the digits of an integer
        raise ValueError(f"is not JSON that can be read ({str(error).partition(';')[0]})") from error
    except RecursionError as error:
        raise ValueError("is not JSON that can be read (it is nested too deeply)") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the field {twice!r} twice")
    return found


def _up_to_the_last(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file up to the last that is not blank."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        rest = file.read(end - start).rstrip()
        end = start + len(rest)
        if rest:
            break
    file.seek(0)
    at = 0
    for line in file:
        if at >= end:
            return
        at += len(line)
        yield line
