"""`python -m packattn report` and `pack`: what they make, what they refuse, and that nothing is lost on the way."""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import packattn
from packattn import cli, pack
from packattn.data import corpus, tokens

ROOT = Path(packattn.__file__).parent.parent
WORDS = [f"w{number}" for number in range(3000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of whole words: w0 is token 0, and so on; the end is token 3000."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<end>", "<unknown>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder


def write(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def texts(n=300, seed=0):
    """Texts of 1 to 60 words, and their tokens."""
    generator = random.Random(seed)
    words = [[generator.randrange(3000) for _ in range(generator.randint(1, 60))] for _ in range(n)]
    return [{"text": " ".join(f"w{w}" for w in part)} for part in words], [[*part, 3000] for part in words]


def run(*arguments):
    """The command line in this process: exit status."""
    before = sys.argv
    sys.argv = ["packattn", *map(str, arguments)]
    try:
        return cli.main()
    finally:
        sys.argv = before


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def examples_of(folder):
    found = []
    for row in rows_of(folder):
        for token, position in zip(row["input_ids"], row["position_ids"], strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return sorted(found)


def test_a_file_is_packed_whole(tmp_path, tokenizer, capsys):
    records, tokens = texts()
    source, out = write(tmp_path / "in.jsonl", [*records, "\n"]), tmp_path / "out"
    options = ("--tokenizer", tokenizer, "--capacity", 64, "--shard-lines", 50, "--shard-rows", 30)
    assert run("pack", source, "--out", out, *options) == 0
    assert examples_of(out) == sorted(tokens)
    assert all(len(row["input_ids"]) <= 64 for row in rows_of(out))
    said = capsys.readouterr()
    assert f"300 examples, {sum(map(len, tokens)):,} tokens in" in said.out
    assert "tokenizing" in said.err
    assert "packing rows" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
    names = sorted(path.name for path in out.iterdir() if path.suffix != ".parquet")
    assert names == ["manifest.json", "packing.json", "plan.pt"]

    loaded = datasets.load_dataset(str(out), split="train", cache_dir=tmp_path / "cache")
    before = rows_of(out)
    assert loaded.to_list() == before
    assert run("pack", source, "--out", out, *options) == 1
    assert "out exists; remove it, or choose another folder" in capsys.readouterr().err
    assert rows_of(out) == before


def test_what_is_learnt_is_in_the_rows(tmp_path, tokenizer, capsys):
    records = [
        {"prompt": "w1 w2", "completion": " w3 w4", "id": 7},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}], "id": 8},
        {"input_ids": [9, 10, 11], "completion_mask": [0, 0, 1]},
        {"input_ids": [12, 13, 14, 15], "position_ids": [0, 1, 0, 1], "source": "elsewhere"},
        {"input_ids": [16, 17], "labels": [-100, -100]},
    ]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out"
    assert run("pack", source, "--out", out, "--tokenizer", tokenizer, "--capacity", 100, "--quiet") == 1
    assert "line 2: has messages, " in (said := capsys.readouterr().err)
    assert "--targets all" in said
    arguments = ("pack", source, "--out", out, "--tokenizer", tokenizer, "--capacity", 100, "--quiet")
    assert run(*arguments, "--bad-lines", "skip") == 0
    (row,) = rows_of(out)
    found = {}
    for token, position, label in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
        if position == 0:
            first, found[token] = token, ([], [])
        found[first][0].append(token)
        found[first][1].append(label)
    assert found == {
        1: ([1, 2, 3, 4, 3000], [-100, -100, 3, 4, 3000]),
        9: ([9, 10, 11], [-100, -100, 11]),
        12: ([12, 13], [-100, 13]),
        14: ([14, 15], [-100, 15]),
        16: ([16, 17], [-100, -100]),
    }
    said = capsys.readouterr().out
    assert "4 examples, 14 tokens in 1 row, 14.00% full; 1 line skipped; 1 example without a target" in said
    assert "The first line skipped: " in said
    assert "Fields not used: id (1 line), source (1 line)." in said
    figures = json.loads((out / "packing.json").read_text())
    assert figures["unused_fields"] == {"id": 1, "source": 1}
    assert figures["examples_without_target"] == 1


@pytest.mark.parametrize("values", [[0.5, 1, 0], [1, 0, 1], [True, False, True]])
def test_a_column_of_numbers_goes_along_whatever_its_kind_in_each_part(tmp_path, values):
    records = [{"input_ids": [1, 2, 3], "weights": [1, 2, 3]}, {"input_ids": [4, 5, 6], "weights": values}]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out"
    assert run("pack", source, "--out", out, "--capacity", 3, "--shard-lines", 1, "--shard-rows", 1, "--quiet") == 0
    assert {tuple(row["input_ids"]): row["weights"] for row in rows_of(out)} == {
        (1, 2, 3): [1, 2, 3],
        (4, 5, 6): values,
    }
    assert len({str(pyarrow.parquet.read_schema(path)) for path in out.glob("*.parquet")}) == 1


def test_columns_that_differ_are_named_whatever_part_they_are_in(tmp_path, capsys):
    records = [{"input_ids": [1], "w": [1]}, {"input_ids": [2]}, {"input_ids": [3], "w": [3]}]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out"
    arguments = ("pack", source, "--out", out, "--shard-lines", 1, "--quiet")
    assert run(*arguments) == 1
    assert "line 2: has the columns input_ids, labels, position_ids where those before have" in capsys.readouterr().err
    assert run(*arguments, "--columns") == 1  # other arguments than those of the parts that are there
    assert "columns was None and is []" in capsys.readouterr().err
    assert run("pack", source, "--out", tmp_path / "other", "--columns", "--quiet") == 0
    assert "3 examples, 3 tokens in 1 row" in (said := capsys.readouterr().out)
    assert "Fields not used: w (2 lines)." in said
    assert run("pack", source, "--out", tmp_path / "third", "--columns", "w", "--quiet") == 1
    assert "line 2: lacks w, which --columns asks for; it has input_ids" in capsys.readouterr().err


BAD_LINES = [
    ('{"text": "w1"\n', r"line 2: is not JSON \(Expecting ',' delimiter at column 14\)"),
    ("\n", "line 2: is blank"),
    ('{"text": "\\ud800"}\n', "line 2: holds half of a surrogate pair"),
    ('{"text": "w1", "n": ' + "9" * 5000 + "}\n", "line 2: is not JSON that can be read .*digits"),
    ({"body": "w1"}, "line 2: must have input_ids .* or a field of text 'text', got fields body"),
    ({"text": ""}, "line 2: has no tokens"),
    ({"input_ids": [1], "w": [1]}, "line 2: has the columns input_ids, labels, position_ids, w where those before"),
    ({"input_ids": [1, 2], "labels": [1]}, "line 2, field 'labels' must hold one value for each of the 2"),
    ({"messages": [3]}, "line 2: messages do not fit the chat template"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:30] for _, message in BAD_LINES])
def test_a_bad_line_is_named_by_its_number_or_skipped_and_counted(tmp_path, tokenizer, line, message, capsys):
    source = write(tmp_path / "in.jsonl", [{"text": "w1 w2"}, line, {"text": "w3"}])
    arguments = ("pack", source, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--quiet")
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert re.search(f"error: .*in.jsonl, {message}", error), error
    assert "--bad-lines skip" in error
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--bad-lines", "skip") == 0
    assert "2 examples, 5 tokens in 1 row" in (said := capsys.readouterr().out)
    assert re.search(f"1 line skipped\nThe first line skipped: .*in.jsonl, {message}", said), said


def test_files_without_examples(tmp_path, tokenizer, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n")
    assert run("pack", source, "--out", tmp_path / "other", "--tokenizer", tokenizer, "--quiet") == 1
    assert "the input holds no examples" in capsys.readouterr().err
    assert run("report", source, "--tokenizer", tokenizer, "--quiet") == 1
    assert "in.jsonl holds no examples" in capsys.readouterr().err
    assert run("report", tmp_path / "none.jsonl", "--quiet") == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
    write(source, [{"text": "w1"}, {"text": "w2"}])
    assert run("report", source, "--quiet") == 1
    assert "line 1: has no input_ids; give a tokenizer with --tokenizer" in capsys.readouterr().err
    for command in (("report", source), ("pack", source, "--out", tmp_path / "third")):
        assert run(*command, "--quiet", "--bad-lines", "skip") == 1
        assert re.search("All 2 lines were skipped, the first: .*line 1: has no input_ids", capsys.readouterr().err)
    assert run("report", source, "--tokenizer", tmp_path / "nowhere") == 1
    assert "nowhere: no tokenizer there" in capsys.readouterr().err


OPTIONS = [
    "--capacity",
    "--max-per-bin",
    "--shard-lines",
    "--shard-rows",
    "--ranks",
    "--minibatch",
    "--accumulation",
    "--seed",
]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_that_cannot_be_is_refused_by_its_option_before_any_work(tmp_path, option, capsys, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", [{"input_ids": [1]}]), tmp_path / "out"
    monkeypatch.setattr(cli, "Reader", lambda *_: pytest.fail("work was begun"))
    command = ("report", source) if option in OPTIONS[4:7] else ("pack", source, "--out", out)
    for value in (-1, 2**64):
        assert run(*command, option, value) == 1
        assert f"error: {option} must be an int" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_what_the_functions_under_the_command_refuse(tmp_path):
    reader = corpus.Reader(write(tmp_path / "in.jsonl", [{"input_ids": [1]}]), None)
    for options in (
        {"shard_rows": -1},
        {"shard_lines": 0},
        {"overlong": "cut"},
        {"method": "best"},
        {"seed": -1},
        {"max_per_bin": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            corpus.pack_corpus(reader, tmp_path / "out", 8, identity={}, **options)
    for options in ({"bad_lines": "drop"}, {"targets": "user"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            corpus.Reader(reader.path, None, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_lines_longer_than_a_row_are_named_split_dropped_or_truncated(tmp_path, capsys):
    row = {"input_ids": list(range(20)), "position_ids": [*range(6), *range(14)]}
    source = write(tmp_path / "in.jsonl", [{"input_ids": [31, 32]}, row])
    wanted = {
        "drop": ([[31, 32]], "1 example dropped (20 tokens)"),
        "truncate": ([[0, 1, 2, 3, 4, 5], [6, 7], [31, 32]], "1 example truncated (by 12 tokens)"),
        "split": (
            [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18, 19], [31, 32]], "1 example split",
        ),
    }  # fmt: skip
    arguments = ("pack", source, "--capacity", 8, "--quiet", "--out")
    assert run(*arguments, tmp_path / "error") == 1
    assert "line 2: has 20 tokens where a row takes at most 8 (1 such line)" in capsys.readouterr().err
    for overlong, (examples, said) in wanted.items():
        out = tmp_path / overlong
        assert run(*arguments, out, *(("--truncate",) if overlong == "truncate" else ("--overlong", overlong))) == 0
        assert examples_of(out) == examples
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*arguments, tmp_path / "both", "--truncate", "--overlong", "drop")
    assert "not allowed with argument" in capsys.readouterr().err


def big(tmp_path):
    """A file of 2,000 lines in 40 parts, and what packs it."""
    source = write(tmp_path / "in.jsonl", [{"input_ids": ids} for ids in texts(2000)[1]])
    return lambda out: ("pack", source, "--out", out, "--capacity", 256, "--shard-lines", 50, "--shard-rows", 20)


def goes_on(arguments, out, kept):
    """The same command again: it keeps what is there, and makes what an uninterrupted run makes."""
    assert kept
    assert not out.exists()
    written = []
    original = corpus.write_whole

    def watch(path, write_):
        written.append(path)
        original(path, write_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "write_whole", watch)
        patch.setattr(tokens, "write_whole", watch)
        assert run(*arguments(out), "--quiet") == 0
    assert not set(kept) & set(written)
    assert run(*arguments(out.parent / "whole"), "--quiet") == 0
    assert rows_of(out) == rows_of(out.parent / "whole")


def test_a_run_that_is_killed_goes_on_and_makes_the_same(tmp_path):
    arguments, out = big(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "packattn", *map(str, arguments(out))]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out.partial/*.parquet"))) < 2 and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    goes_on(arguments, out, list(tmp_path.glob("out.partial/*.parquet")))


def test_a_run_that_is_told_to_end_goes_on_and_makes_the_same(tmp_path, capsys, monkeypatch):
    arguments, out = big(tmp_path), tmp_path / "out"
    original, before = tokens.write_whole, signal.getsignal(signal.SIGTERM)

    def end_after(path, write_):
        original(path, write_)
        if path.name == "000003.arrow":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_whole", end_after)
        assert run(*arguments(out), "--quiet") == 130
    assert f"interrupted; what is done is kept in {out}.partial" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    kept = list(tmp_path.glob("out.partial/tokens/*.arrow"))
    assert len(kept) == 4
    goes_on(arguments, out, kept)


def test_a_full_disk_loses_nothing(tmp_path, capsys):
    arguments, out = big(tmp_path), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        assert run(*arguments(out), "--quiet") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "File too large" in said
    assert "make room or mend it, then the same command goes on there" in said
    assert not list(tmp_path.glob("out.partial/**/.*"))
    goes_on(arguments, out, list(tmp_path.glob("out.partial/tokens/*.arrow")))


@pytest.fixture
def interrupted(tmp_path):
    """A run of 100 lines that was interrupted before its rows were written, and what goes on there."""
    source, out = write(tmp_path / "in.jsonl", [{"input_ids": [n] * (1 + n % 7)} for n in range(100)]), tmp_path / "out"
    arguments = ("pack", source, "--out", out, "--capacity", 16, "--shard-lines", 10, "--shard-rows", 5, "--quiet")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_write_rows", stop)
        assert run(*arguments) == 130
    return out, Path(f"{out}.partial"), arguments


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "lose",
    [
        lambda parts: parts[3].unlink(),
        lambda parts: [part.unlink() for part in parts[:2]],
        lambda parts: parts[-1].unlink(),
        lambda parts: cut_in_half(parts[4]),
        lambda parts: parts[5].write_bytes(b""),
        lambda parts: parts[2].write_bytes(parts[6].read_bytes()),
    ],
    ids=["one", "the first two", "the last", "half of one", "the content of one", "one for another"],
)
def test_a_part_that_was_lost_is_made_again(interrupted, lose):
    out, partial, arguments = interrupted
    lose(sorted(partial.glob("tokens/*.arrow")))
    assert run(*arguments) == 0
    assert examples_of(out) == sorted([n] * (1 + n % 7) for n in range(100))
    assert json.loads((out / "packing.json").read_text())["examples"] == 100


def test_rows_that_were_lost_are_made_again(interrupted, monkeypatch):
    out, partial, arguments = interrupted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments) == 130
    files = sorted(partial.glob("*.parquet"))
    shutil.copy(files[1], partial / "train-00000-of-00999.parquet")  # of no plan that is there
    files[0].unlink()
    cut_in_half(files[1])
    files[2].write_bytes(files[3].read_bytes())
    assert run(*arguments) == 0
    assert examples_of(out) == sorted([n] * (1 + n % 7) for n in range(100))


def test_a_plan_of_other_data_or_options_or_none_at_all_is_refused(interrupted, capsys):
    out, partial, arguments = interrupted
    path, lengths = partial / "plan.pt", [1 + n % 7 for n in range(100)]
    good = path.read_bytes()
    others = [
        (pack([3] * 100, 16), "made for other data"),
        (pack(lengths, 8), "capacity=8, asked for is 16"),
        (pack(lengths, 16, seed=1), "seed=1, asked for is 0"),
        (pack(lengths, 16, max_per_bin=2), "max_per_bin=2, asked for is None"),
    ]
    for plan, problem in others:
        plan.save(path)
        assert run(*arguments) == 1
        assert re.search(
            f"plan.pt is not of this run: .*{problem}.* Remove .*partial to begin again", capsys.readouterr().err
        )
    for damaged in (b"", b"{}", good[: len(good) // 2]):
        path.write_bytes(damaged)
        assert run(*arguments) == 1
        assert "plan.pt is not of this run: " in capsys.readouterr().err
    assert not out.exists()
    path.write_bytes(good)
    assert run(*arguments) == 0


def test_an_input_or_arguments_that_changed_are_refused(interrupted, tokenizer, capsys):
    _, partial, arguments = interrupted
    for option, value, problem in (
        ("--capacity", 128, "capacity was 16 and is 128"),
        ("--targets", "all", "targets was 'assistant' and is 'all'"),
        ("--overlong", "drop", "overlong was 'error' and is 'drop'"),
        ("--tokenizer", tokenizer, "tokenizer was None and is"),
    ):
        assert run(*arguments, option, value) == 1
        assert problem in capsys.readouterr().err
    manifest = (partial / "manifest.json").read_text()
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("[]")):
        damage(partial / "manifest.json")
        assert run(*arguments) == 1
        assert "its manifest.json cannot be read" in capsys.readouterr().err
    (partial / "manifest.json").write_text(manifest)
    write(arguments[1], texts(299)[0])
    assert run(*arguments) == 1
    assert "was begun with something else: size was" in capsys.readouterr().err


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"input_ids": [1]}])
    original = corpus.tokenize

    def tokenize(*arguments):
        found = original(*arguments)
        write(source, [{"input_ids": [1]}, {"input_ids": [2]}])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "tokenize", tokenize)
        assert run("pack", source, "--out", tmp_path / "out", "--quiet") == 1
    assert "in.jsonl changed while it was read: size was" in capsys.readouterr().err


def test_two_runs_do_not_write_one_folder(tmp_path, tokenizer, capsys):
    source, out = write(tmp_path / "in.jsonl", texts()[0]), tmp_path / "out"
    Path(f"{out}.partial").mkdir()
    with corpus._locked(Path(f"{out}.partial")):
        assert run("pack", source, "--out", out, "--tokenizer", tokenizer, "--quiet") == 1
    assert "another run is at work in" in capsys.readouterr().err


def test_the_report_is_a_table_json_and_a_picture(tmp_path, tokenizer, capsys):
    source = write(tmp_path / "in.jsonl", [*texts()[0], "{broken\n"])
    arguments = ("report", source, "--tokenizer", tokenizer, "--capacity", 64, "--ranks", 4)
    assert run(*arguments) == 1
    assert "line 301: is not JSON" in capsys.readouterr().err
    assert run(*arguments, "--bad-lines", "skip", "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png") == 0
    said = capsys.readouterr().out
    assert "balanced packing" in said
    assert "Recommended: " in said
    assert "1 line skipped, the first: " in said
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["examples"] == 300
    assert next(a["name"] for a in figures["approaches"]) == "padding"
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"input_ids": [1]}])
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    assert run("pack", source, "--out", tmp_path / "out") == 1
    assert "of the extra packattn[data]" in capsys.readouterr().err
    monkeypatch.setattr(cli.info, "version_of", lambda name: None)
    assert run("report", source, "--tokenizer", "any") == 1
    assert "of the extra packattn[hf]" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"input_ids": [1, 2], "labels": [-100, -100]}])
    for option in ("--json", "--plot"):
        assert run("report", source, option, tmp_path / "none" / "r.png", "--quiet") == 1
        assert "there is no folder" in capsys.readouterr().err
    assert run("report", source, "--quiet", "--json", tmp_path / "r.json") == 0
    assert "1 example without a target" in capsys.readouterr().out
