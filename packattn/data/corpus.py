"""pack_corpus: a file of JSON lines to a folder of packed rows, in parts that survive interruption."""

import contextlib
import fcntl
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from packattn.data.counts import shown
from packattn.data.dataset import PackRows, plan_for
from packattn.data.jsonl import LineError, Reader
from packattn.data.packing import Method, Overlong, longest, make_limits
from packattn.data.plan import PackingPlan
from packattn.data.tokens import tokenize
from packattn.data.values import whole, write_whole
from packattn.requirements import missing

if TYPE_CHECKING:
    import pyarrow as pa

LongLines = Literal[Overlong, "truncate"]
LONG_LINES = (*get_args(Overlong), "truncate")
_FORMAT = 2
_MADE_OF = b"packattn"


class Packed(NamedTuple):
    """What `pack_corpus` did with the lines; printed by the command line and kept as packing.json."""

    examples: int
    skipped_lines: int
    first_skipped: str
    dropped_examples: int
    dropped_tokens: int
    truncated_examples: int
    truncated_tokens: int
    split_examples: int
    examples_without_target: int
    unused_fields: dict[str, int]
    tokens: int
    rows: int
    capacity: int
    fill: float

    def __str__(self) -> str:
        examples, tokens = counted(self.examples, "example"), counted(self.tokens, "token")
        parts = [f"{examples}, {tokens} in {counted(self.rows, 'row')}, {self.fill:.2%} full"]
        for count, noun, said in (
            (self.skipped_lines, "line", "skipped"),
            (self.dropped_examples, "example", f"dropped ({counted(self.dropped_tokens, 'token')})"),
            (self.truncated_examples, "example", f"truncated (by {counted(self.truncated_tokens, 'token')})"),
            (self.split_examples, "example", "split"),
            (self.examples_without_target, "example", "without a target"),
        ):
            parts.extend([f"{counted(count, noun)} {said}"] if count else [])
        lines = ["; ".join(parts)]
        if self.first_skipped:
            lines.append(f"The first line skipped: {self.first_skipped}")
        fields = ", ".join(f"{name} ({counted(n, 'line')})" for name, n in sorted(self.unused_fields.items()))
        return "\n".join([*lines, f"Fields not used: {fields}."] if fields else lines)


def counted(count: int, noun: str) -> str:
    """A number of things, in words: "1 line", "2,000 lines"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def pack_corpus(
    reader: Reader,
    out: Path,
    capacity: int,
    *,
    identity: dict[str, Any],
    method: Method = "mixed",
    seed: int = 0,
    max_per_bin: int | None = None,
    max_square: int | None = None,
    overlong: LongLines = "error",
    shard_lines: int = 10_000,
    shard_rows: int = 2_000,
    progress: bool = True,
) -> Packed:
    """Tokenize, pack globally, and write `out`: rows as Parquet files (`datasets.load_dataset(out)` reads them), the
    plan as plan.pt, the figures as packing.json.

    Work is kept in `out` + ".partial", part by part, each part whole or not there; a run that was interrupted, killed
    or ran out of space goes on there when it is started again with the same arguments. `out` appears at the end.

    Args:
        identity: what else decides the result (the tokenizer); a partial folder of anything else is refused.
        overlong: as for `pack`, or "truncate": an example that no empty row takes is cut at its end.
        shard_lines: lines of a part that is tokenized, at least 1.
        shard_rows: rows of a Parquet file, at least 1.

    Raises:
        ImportError: datasets is not installed.
        FileExistsError: `out` is there, or another run is at work on it.
        TypeError, ValueError: an argument is not as described; the partial folder belongs to other arguments or another
            input, or is damaged; a line is bad; an example too long.
    """
    if importlib.util.find_spec("datasets") is None:
        raise missing("packing a file", "datasets", "data")
    whole("shard_lines", shard_lines, 1)
    whole("shard_rows", shard_rows, 1)
    most = longest(make_limits(capacity, max_per_bin, max_square))
    whole("seed", seed, 0)
    for name, value, values in (("method", method, get_args(Method)), ("overlong", overlong, LONG_LINES)):
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}.")
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or choose another folder.")
    options: dict[str, Any] = {
        "method": method, "seed": seed, "max_per_bin": max_per_bin, "max_square": max_square, "overlong": overlong,
    }  # fmt: skip
    manifest = {
        "format": _FORMAT, **_state(reader.path), **reader.options, "capacity": capacity, "shard_lines": shard_lines,
        "shard_rows": shard_rows, **options, **identity,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        _begin_or_go_on(partial, manifest)
        truncated = most if overlong == "truncate" else None
        tokens = tokenize(reader, partial / "tokens", shard_lines, truncated, progress)
        changed = _changed(manifest, _state(reader.path))
        if changed:
            raise ValueError(f"{reader.path} changed while it was read: {changed}. Remove {partial} to begin again.")
        plan = _planned(partial, tokens.table, capacity, options, most, reader)
        _write_rows(partial, tokens.table, plan, shard_rows, progress)
        counts = tokens.counts
        packed = Packed(
            examples=tokens.table.num_rows, skipped_lines=counts["skipped_lines"], first_skipped=tokens.first_skipped,
            dropped_examples=plan.dropped.numel(), dropped_tokens=plan.dropped_tokens,
            truncated_examples=counts["truncated_examples"], truncated_tokens=counts["truncated_tokens"],
            split_examples=plan.num_split, examples_without_target=counts["examples_without_target"],
            unused_fields=dict(tokens.unused), tokens=plan.tokens, rows=len(plan), capacity=capacity, fill=plan.fill,
        )  # fmt: skip
        write_whole(partial / "packing.json", lambda path: path.write_text(json.dumps(packed._asdict(), indent=1)))
        del tokens
        shutil.rmtree(partial / "tokens")
        (partial / "lock").unlink()
        partial.rename(out)
    return packed


def _state(path: Path) -> dict[str, Any]:
    """What tells whether a file is the same as before."""
    status = path.stat()
    return {"input": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How the entries of `after` differ from those of `before`, in words; empty: they do not."""
    names = [name for name in after if before.get(name) != after[name]]
    return ", ".join(f"{name} was {before.get(name)!r} and is {after[name]!r}" for name in names)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the folder against a second run; the system lets go of it if this one is killed."""
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another run is at work in {partial}; wait for it, or end it.") from error
        yield


def _begin_or_go_on(partial: Path, manifest: dict[str, Any]) -> None:
    """Check that what is in the folder was made by the same arguments of the same input; remove what is not whole."""
    path = partial / "manifest.json"
    if any(made.suffix in (".arrow", ".parquet", ".pt") for made in partial.rglob("*")):  # else nothing is lost
        try:
            before = json.loads(path.read_text())
            changed = _changed({**dict.fromkeys(manifest), **before}, {**dict.fromkeys(before), **manifest})
        except (OSError, ValueError, TypeError) as error:
            changed = f"its manifest.json cannot be read ({error})"
        if changed:
            raise ValueError(f"{partial} was begun with something else: {changed}. Remove it to begin again.")
    (partial / "tokens").mkdir(exist_ok=True)
    for unfinished in partial.rglob(".*.unfinished"):
        unfinished.unlink()
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(manifest, indent=1)))


def _planned(
    partial: Path, table: "pa.Table", capacity: int, options: dict[str, Any], most: int, reader: Reader
) -> PackingPlan:
    """The plan, made once; one that is there must be of these tokens and options."""
    import pyarrow.compute

    lengths = torch.tensor(pyarrow.compute.list_value_length(table["input_ids"]).to_numpy(), dtype=torch.int64)
    too_long = (lengths > most).nonzero().flatten()
    if options["overlong"] == "error" and too_long.numel():
        first = int(too_long[0])
        raise LineError(
            f"{reader.path}, line {table['line'][first]}: has {int(lengths[first])} tokens where a row takes at most "
            f"{most} ({counted(too_long.numel(), 'such line')}); raise --capacity, or choose --overlong split, drop or "
            "truncate."
        )
    if options["overlong"] == "truncate":
        options = {**options, "overlong": "error"}
    try:
        return plan_for(partial / "plan.pt", lengths, capacity, options)
    except ValueError as error:
        if not (partial / "plan.pt").exists():
            raise
        raise ValueError(
            f"{partial / 'plan.pt'} is not of this run: {error} Remove {partial} to begin again."
        ) from error


def _write_rows(partial: Path, table: "pa.Table", plan: PackingPlan, shard_rows: int, progress: bool) -> None:
    """Write the Parquet files that are not there yet, or not whole."""
    import datasets
    import pyarrow.parquet

    # Its own fingerprint, since datasets would read all tokens to make one.
    examples = datasets.Dataset(datasets.table.InMemoryTable(table.drop_columns("line")), fingerprint=plan.fingerprint)
    rows = PackRows(examples.with_format("numpy"), plan)
    starts = range(0, len(plan), shard_rows)
    names = [f"train-{at:05}-of-{len(starts):05}.parquet" for at in range(len(starts))]
    for other in {*partial.glob("*.parquet")} - {partial / name for name in names}:
        other.unlink()  # its rows would be read twice
    for name, start in zip(names, shown(starts, len(starts), "packing rows, files", progress), strict=True):
        target = partial / name
        bins = range(start, min(start + shard_rows, len(plan)))
        made_of = json.dumps({"plan": plan.fingerprint, "bins": [bins.start, bins.stop]}).encode()
        if _made_of(target) != made_of:
            made = rows({"bin": bins}).replace_schema_metadata({_MADE_OF: made_of})
            write_whole(target, lambda path, t=made: pyarrow.parquet.write_table(t, path))  # type: ignore[misc]


def _made_of(path: Path) -> bytes | None:
    """What a Parquet file was made of, as its end says; None if it is not there, or not whole."""
    import pyarrow.parquet

    try:
        return (pyarrow.parquet.read_metadata(path).metadata or {}).get(_MADE_OF)
    except (OSError, ValueError):
        return None
