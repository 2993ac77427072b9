"""JSON lines in, token ids out; every complaint names the file and the line."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

BadLines = Literal["error", "skip"]
_KINDS = "input_ids (and labels); messages; prompt and completion (or response); or a field of text"


class Example(NamedTuple):
    """Token ids, their labels (-100 where nothing is learnt), and the number of the line."""

    input_ids: list[int]
    labels: list[int]
    line: int


class LineError(ValueError):
    """A line that cannot be used: the file, the line and what is wrong with it."""


class Reader:
    """Examples from a file of JSON lines.

    A line is an object with one of: `input_ids`, optionally with `labels`; `messages`, through the tokenizer's chat
    template; `prompt` and `completion` or `response`, of which only the latter is learnt; a field of text. The
    tokenizer's end-of-text token is appended to completions and texts. Blank lines are passed over.

    Args:
        path: the file, UTF-8.
        tokenizer: a Hugging Face tokenizer; None where the lines have input_ids.
        text: the name of the field of text.
        bad_lines: "error" stops at a line that cannot be used, "skip" counts it in `skipped`.
    """

    def __init__(self, path: Path, tokenizer: Any | None, text: str = "text", bad_lines: BadLines = "error") -> None:
        self.path, self.tokenizer, self.text, self.bad_lines = path, tokenizer, text, bad_lines

    def batches(self, lines: int, skip: int = 0) -> Iterator[tuple[list[Example], int]]:
        """Batch by batch of so many lines, after the first `skip` batches: examples, and lines skipped."""
        with self.path.open("rb") as file:
            numbered = enumerate(file, start=1)
            next(itertools.islice(numbered, skip * lines, skip * lines), None)
            while part := list(itertools.islice(numbered, lines)):
                good, skipped = [], 0
                for number, line in part:
                    if not line.strip():
                        continue
                    try:
                        good.append((number, self._parsed(number, line)))
                    except LineError:
                        if self.bad_lines == "error":
                            raise
                        skipped += 1
                examples = []
                for example in self._encoded(good):
                    if example.input_ids:
                        examples.append(example)
                    elif self.bad_lines == "error":
                        raise self._error(example.line, "has no tokens")
                    else:
                        skipped += 1
                yield examples, skipped

    def _error(self, number: int, problem: str) -> LineError:
        return LineError(
            f"{self.path}, line {number}: {problem}; correct the line, or pass over such lines with --bad-lines skip."
        )

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        """The object of one line, checked."""
        try:
            record = json.loads(line.strip())
        except UnicodeDecodeError as error:
            raise self._error(number, f"is not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise self._error(number, f"is not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise self._error(number, f"must be an object, got {type(record).__name__}")
        if "input_ids" in record:
            for name in ("input_ids", "labels"):
                values = record.get(name, [])
                if not isinstance(values, list) or not all(type(value) is int for value in values):
                    raise self._error(number, f"{name} must be a list of ints")
            if "labels" in record and len(record["labels"]) != len(record["input_ids"]):
                raise self._error(
                    number, f"has {len(record['labels'])} labels for {len(record['input_ids'])} input_ids"
                )
            if any(not 0 <= value < 2**31 for value in record["input_ids"]):
                raise self._error(number, "input_ids must lie in [0, 2**31)")
            return record
        if self.tokenizer is None:
            raise self._error(number, "has no input_ids; give a tokenizer with --tokenizer")
        if "messages" in record:
            try:
                rendered = self.tokenizer.apply_chat_template(record["messages"], tokenize=False)
            except Exception as error:
                raise self._error(number, f"messages do not fit the chat template ({error})") from error
            return {"parts": [rendered], "whole": True}
        parts = [record.get("prompt"), record.get("completion", record.get("response"))]
        if None in parts:
            parts = [record.get(self.text)]
        if not all(isinstance(value, str) for value in parts):
            raise self._error(number, f"must have {_KINDS} {self.text!r}, got fields {', '.join(record) or 'none'}")
        return {"parts": parts, "whole": False}

    def _encoded(self, records: list[tuple[int, dict[str, Any]]]) -> list[Example]:
        """Token ids of checked records, through the tokenizer in one call; a `whole` text gets no tokens added."""
        texts = [text for _, record in records for text in record.get("parts", [])]
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts and self.tokenizer else []
        found = iter(tokens)
        end = getattr(self.tokenizer, "eos_token_id", None)
        begin = getattr(self.tokenizer, "bos_token_id", None)
        begins = begin is not None and getattr(self.tokenizer, "add_bos_token", False)
        examples = []
        for number, record in records:
            if "parts" not in record:
                examples.append(Example(record["input_ids"], record.get("labels", record["input_ids"]), number))
                continue
            pieces = [list(next(found)) for _ in record["parts"]]
            if not record["whole"] and any(pieces):
                if begins and pieces[0][:1] != [begin]:
                    pieces[0].insert(0, begin)
                if end is not None and pieces[-1][-1:] != [end]:
                    pieces[-1].append(end)
            ids = [token for piece in pieces for token in piece]
            learnt = pieces[-1]
            examples.append(Example(ids, [-100] * (len(ids) - len(learnt)) + learnt, number))
        return examples
