"""The tokens of a file of JSON lines, kept part by part: each part is whole and of its lines, or is made again."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from packattn.data.counts import shown
from packattn.data.examples import Example, targets
from packattn.data.jsonl import Lines, Part, Reader
from packattn.data.values import write_whole

if TYPE_CHECKING:
    import pyarrow as pa

_MADE_OF = b"packattn"
_EMPTY = ("input_ids", "labels", "position_ids")


class Tokens(NamedTuple):
    """All tokens of a file.

    Attributes:
        table: a row for each example: columns of one value per token, and `line`, the number of its line. Its memory is
            mapped from the parts.
        counts: skipped_lines, truncated_examples, truncated_tokens, examples_without_target.
        first_skipped: what is wrong with the first line that was skipped; empty: none was.
        unused: the names of fields that were not read, and of how many lines.
    """

    table: "pa.Table"
    counts: Counter[str]
    first_skipped: str
    unused: Counter[str]


def tokenize(reader: Reader, folder: Path, lines: int, longest: int | None, progress: bool) -> Tokens:
    """Read a file in parts of so many lines, each kept in `folder`; those that are there are not made again.

    Args:
        longest: longer examples are cut to so many tokens; None: none is cut.

    Raises:
        ValueError: a line is bad, or there is no example.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    columns: Sequence[str] | None = None
    counts, unused, first_skipped = Counter[str](), Counter[str](), ""
    for at, numbered in enumerate(shown(reader.parts(lines), None, "tokenizing, parts", progress)):
        path = folder / f"{at:06}.arrow"
        table = _opened(path, numbered)
        if table is None:
            made = _table(reader.read(numbered, columns), numbered, longest)
            write_whole(path, lambda unfinished, table=made: _write(unfinished, table))  # type: ignore[misc]
            table = _opened(path, numbered)
            if table is None:
                raise OSError(f"{path} was written and cannot be read; see to the disk")
        made_of = _made_of(table)
        counts.update(made_of["counts"])
        first_skipped = first_skipped or made_of["first_skipped"]
        unused.update(made_of["unused"])
        if table.num_rows:
            columns = columns or sorted(set(table.column_names) - {"line"})
            tables.append(table)
    if not tables:
        why = (
            f" All {counts['skipped_lines']:,} lines were skipped, the first: {first_skipped}" if first_skipped else ""
        )
        raise ValueError(f"{reader.path}: the input holds no examples; nothing to pack.{why}")
    return Tokens(pa.concat_tables(tables, promote_options="permissive"), counts, first_skipped, unused)


def _opened(path: Path, lines: Lines) -> "pa.Table | None":
    """A part, mapped from its file; None if the file is not there, not whole, or not of these lines."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate()
        made_of = _made_of(table)
        found = made_of["lines"], table.num_rows + made_of["counts"]["skipped_lines"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if found == (_span(lines), len(lines)) else None


def _table(part: Part, lines: Lines, longest: int | None) -> "pa.Table":
    import pyarrow as pa

    examples = part.examples
    cut = [example.tokens - longest for example in examples if longest is not None and example.tokens > longest]
    if longest is not None:
        examples = [example.cut(0, min(longest, example.tokens)) for example in examples]
    counts = {
        "skipped_lines": len(part.problems), "truncated_examples": len(cut), "truncated_tokens": sum(cut),
        "examples_without_target": sum(targets(example, 1) == 0 for example in examples),
    }  # fmt: skip
    names = sorted(examples[0].columns) if examples else _EMPTY
    columns = {name: _column(name, examples) for name in names}
    made_of = {
        "lines": _span(lines), "counts": counts, "first_skipped": next(iter(part.problems), ""), "unused": part.unused
    }  # fmt: skip
    table = pa.table({**columns, "line": pa.array(part.numbers, pa.int64())})
    return table.replace_schema_metadata({_MADE_OF: json.dumps(made_of).encode()})


def _column(name: str, examples: Sequence[Example]) -> Any:
    """One column of some examples: lists of int32 or float."""
    import pyarrow as pa

    if not examples:
        return pa.array([], pa.list_(pa.int32()))
    values = torch.cat([example.columns[name] for example in examples])
    ends = torch.tensor([0, *(example.tokens for example in examples)]).cumsum(0)
    values = values if values.is_floating_point() else values.int()
    return pa.ListArray.from_arrays(pa.array(ends.numpy(), pa.int32()), pa.array(values.numpy()))


def _write(path: Path, table: "pa.Table") -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def _made_of(table: "pa.Table") -> dict[str, Any]:
    """What a part was made of: its lines, counts and unused fields."""
    found: dict[str, Any] = json.loads(table.schema.metadata[_MADE_OF])
    return found


def _span(lines: Lines) -> list[int]:
    return [lines[0][0], lines[-1][0]]
