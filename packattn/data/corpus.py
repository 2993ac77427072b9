"""pack_corpus: a file of JSON lines to a folder of packed rows, in parts that survive interruption."""

import contextlib
import fcntl
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from packattn.data.counts import count_tokens, shown
from packattn.data.dataset import PackRows
from packattn.data.jsonl import LineError, Reader
from packattn.data.packing import Method, Overlong, longest, make_limits, pack
from packattn.data.plan import PackingPlan
from packattn.data.values import write_whole
from packattn.requirements import missing

_FORMAT = 1


class Packed(NamedTuple):
    """What `pack_corpus` did; printed by the command line and kept as packing.json."""

    examples: int
    skipped_lines: int
    dropped_examples: int
    dropped_tokens: int
    split_examples: int
    tokens: int
    rows: int
    capacity: int
    fill: float

    def __str__(self) -> str:
        lost = [
            f"{self.skipped_lines:,} lines skipped" if self.skipped_lines else "",
            f"{self.dropped_examples:,} examples dropped ({self.dropped_tokens:,} tokens)"
            if self.dropped_examples
            else "",
            f"{self.split_examples:,} examples split" if self.split_examples else "",
        ]
        said = f"{self.examples:,} examples, {self.tokens:,} tokens in {self.rows:,} rows, {self.fill:.2%} full"
        return "; ".join([said, *filter(None, lost)])


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
    overlong: Overlong = "error",
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
        shard_lines: lines of a part that is tokenized.
        shard_rows: rows of a Parquet file.

    Raises:
        ImportError: datasets is not installed.
        FileExistsError: `out` is there, or another run is at work on it.
        ValueError: the partial folder belongs to other arguments or another input; a line is bad; an example too long.
    """
    if importlib.util.find_spec("datasets") is None:
        raise missing("packing a file", "datasets", "data")
    out, partial = Path(out), Path(f"{out}.partial")
    make_limits(capacity, max_per_bin, max_square)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or choose another folder.")
    options: dict[str, Any] = {
        "method": method, "seed": seed, "max_per_bin": max_per_bin, "max_square": max_square, "overlong": overlong,
    }  # fmt: skip
    status = reader.path.stat()
    manifest = {
        "format": _FORMAT, "input": str(reader.path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns,
        "text": reader.text, "bad_lines": reader.bad_lines, "capacity": capacity, "shard_lines": shard_lines,
        "shard_rows": shard_rows, **options, **identity,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        _begin_or_go_on(partial, manifest)
        figures = partial / "packing.json"
        if not figures.exists():
            skipped = _tokenize(reader, partial, shard_lines, progress)
            examples = _opened(partial)
            plan = _planned(partial, examples, capacity, options, reader)
            _write_rows(partial, examples, plan, shard_rows, progress)
            packed = Packed(
                examples=len(examples), skipped_lines=skipped, dropped_examples=plan.dropped.numel(),
                dropped_tokens=plan.dropped_tokens, split_examples=plan.num_split, tokens=plan.tokens, rows=len(plan),
                capacity=capacity, fill=plan.fill,
            )  # fmt: skip
            write_whole(figures, lambda path: path.write_text(json.dumps(packed._asdict(), indent=1)))
        shutil.rmtree(partial / "tokens", ignore_errors=True)
        (partial / "lock").unlink()
        partial.rename(out)
    return Packed(**json.loads((out / "packing.json").read_text()))


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
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(name for name in {*before, *manifest} if before.get(name) != manifest.get(name))
        finished = any(path.suffix in (".arrow", ".parquet") for path in partial.rglob("*"))
        if changed and finished:  # else nothing is lost by beginning anew
            shown_ = ", ".join(f"{name} was {before.get(name)!r} and is {manifest.get(name)!r}" for name in changed)
            raise ValueError(f"{partial} was begun with something else: {shown_}. Remove it to begin anew.")
    (partial / "tokens").mkdir(exist_ok=True)
    for unfinished in partial.rglob(".*.unfinished"):
        unfinished.unlink()
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(manifest, indent=1)))


def _tokenize(reader: Reader, partial: Path, shard_lines: int, progress: bool) -> int:
    """Write the tokens of what is not there yet; the number of lines that were skipped."""
    import pyarrow as pa

    folder = partial / "tokens"
    schema = pa.schema([*((name, pa.list_(pa.int32())) for name in ("input_ids", "labels")), ("line", pa.int64())])

    def write(path: Path, examples: list[Any], skipped: int) -> None:
        columns = [pa.array([e[at] for e in examples], schema.types[at]) for at in range(3)]
        table = pa.Table.from_arrays(columns, schema=schema.with_metadata({"skipped": str(skipped)}))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    done = len(list(folder.glob("*.arrow")))
    batches = reader.batches(shard_lines, skip=done)
    for at, (examples, skipped) in enumerate(shown(batches, None, "tokenizing, parts", progress), start=done):
        target = folder / f"{at:06}.arrow"
        write_whole(target, lambda path, e=examples, s=skipped: write(path, e, s))  # type: ignore[misc]
    counts = [pa.ipc.open_stream(pa.memory_map(str(path))).schema.metadata for path in folder.glob("*.arrow")]
    return sum(int(count[b"skipped"]) for count in counts)


def _opened(partial: Path) -> Any:
    """All tokens as one data set, mapped from the files."""
    import datasets

    parts = [datasets.Dataset.from_file(str(path)) for path in sorted((partial / "tokens").glob("*.arrow"))]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError(f"the input holds no examples; nothing to pack ({partial} can be removed).")
    return datasets.concatenate_datasets(parts).with_format("numpy")


def _planned(partial: Path, examples: Any, capacity: int, options: dict[str, Any], reader: Reader) -> PackingPlan:
    """The plan, made once."""
    path = partial / "plan.pt"
    if not path.exists():
        lengths = torch.tensor(count_tokens(examples, progress=False))
        most = longest(make_limits(capacity, options["max_per_bin"], options["max_square"]))
        too_long = (lengths > most).nonzero().flatten()
        if options["overlong"] == "error" and too_long.numel():
            first = int(too_long[0])
            raise LineError(
                f"{reader.path}, line {examples[first]['line']}: has {int(lengths[first])} tokens where a row takes at "
                f"most {most} ({too_long.numel()} such lines); raise --capacity, or choose --overlong split or "
                "--overlong drop."
            )
        pack(lengths, capacity, **options).save(path)
    return PackingPlan.load(path)


def _write_rows(partial: Path, examples: Any, plan: PackingPlan, shard_rows: int, progress: bool) -> None:
    """Write the Parquet files that are not there yet."""
    import pyarrow.parquet

    rows = PackRows(examples.select_columns(["input_ids", "labels"]), plan)
    starts = range(0, len(plan), shard_rows)
    for at, start in enumerate(shown(starts, len(starts), "packing rows, files", progress)):
        target = partial / f"train-{at:05}-of-{len(starts):05}.parquet"
        if not target.exists():
            table = rows({"bin": range(start, min(start + shard_rows, len(plan)))})
            write_whole(target, lambda path, t=table: pyarrow.parquet.write_table(t, path))  # type: ignore[misc]
