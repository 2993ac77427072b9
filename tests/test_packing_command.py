"""`python -m packattn report` and `pack`: what they make, what they refuse, and that nothing is lost on the way."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import packattn
from packattn import __main__
from packattn.data import corpus
from packattn.data.jsonl import Reader

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
        return __main__.main()
    finally:
        sys.argv = before


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "packattn", *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def rows_of(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train").to_list()


def examples_of(folder):
    found = []
    for row in rows_of(folder):
        for token, position in zip(row["input_ids"], row["position_ids"], strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return sorted(found)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in.jsonl", "out"]
    names = sorted(path.name for path in out.iterdir() if path.suffix != ".parquet")
    assert names == ["manifest.json", "packing.json", "plan.pt"]

    before = rows_of(out)
    assert run("pack", source, "--out", out, *options) == 1
    assert "out exists; remove it, or choose another folder" in capsys.readouterr().err
    assert rows_of(out) == before


def test_kinds_of_lines(tmp_path, tokenizer):
    records = [
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"prompt": "w5", "response": "w6"},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]},
        {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
        {"input_ids": [12, 13]},
    ]
    assert run("pack", write(tmp_path / "in.jsonl", records), "--out", tmp_path / "out", "--tokenizer", tokenizer,
               "--capacity", 100, "--quiet") == 0  # fmt: skip
    (row,) = rows_of(tmp_path / "out")
    found = {}
    for token, position, label in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
        if position == 0:
            found[token] = ([], [])
            first = token
        found[first][0].append(token)
        found[first][1].append(label)
    assert found == {
        1: ([1, 2, 3, 4, 3000], [-100, -100, 3, 4, 3000]),
        5: ([5, 6, 3000], [-100, 6, 3000]),
        7: ([7, 8], [-100, 8]),
        9: ([9, 10, 11], [-100, -100, 11]),
        12: ([12, 13], [-100, 13]),
    }


BAD_LINES = [
    ('{"text": "w1"\n', r"line 2: is not JSON \(Expecting ',' delimiter at column 14\)"),
    ('["w1"]\n', "line 2: must be an object, got list"),
    ({"body": "w1"}, "line 2: must have input_ids .* or a field of text 'text', got fields body"),
    ({"text": 3}, "line 2: must have"),
    ({"text": ""}, "line 2: has no tokens"),
    ({"input_ids": []}, "line 2: has no tokens"),
    ({"input_ids": [1.5]}, "line 2: input_ids must be a list of ints"),
    ({"input_ids": [-1]}, r"line 2: input_ids must lie in \[0, 2\*\*31\)"),
    ({"input_ids": [1, 2], "labels": [1]}, "line 2: has 1 labels for 2 input_ids"),
    ({"messages": [3]}, "line 2: messages do not fit the chat template"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:30] for _, message in BAD_LINES])
def test_a_bad_line_is_named_by_its_number_or_skipped_and_counted(tmp_path, tokenizer, line, message, capsys):
    source = write(tmp_path / "in.jsonl", [{"text": "w1 w2"}, line, {"text": "w3"}])
    arguments = ("pack", source, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--quiet")
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert re.search(f"error: .*in.jsonl, {message}", error), error
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--bad-lines", "skip") == 0
    assert "2 examples, 5 tokens in 1 rows" in (said := capsys.readouterr().out)
    assert "1 lines skipped" in said


def test_bytes_that_are_not_utf8_and_files_without_examples(tmp_path, tokenizer, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "\xff"}\n')
    assert run("pack", source, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--quiet") == 1
    assert "line 1: is not UTF-8" in capsys.readouterr().err
    source.write_text("\n\n")
    assert run("pack", source, "--out", tmp_path / "other", "--tokenizer", tokenizer, "--quiet") == 1
    assert "the input holds no examples" in capsys.readouterr().err
    assert run("report", source, "--tokenizer", tokenizer, "--quiet") == 1
    assert "in.jsonl holds no examples" in capsys.readouterr().err
    assert run("report", tmp_path / "none.jsonl", "--quiet") == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
    write(source, [{"text": "w1"}])
    assert run("report", source, "--quiet") == 1
    assert "line 1: has no input_ids; give a tokenizer with --tokenizer" in capsys.readouterr().err
    assert run("report", source, "--tokenizer", tmp_path / "nowhere") == 1
    assert "nowhere: no tokenizer there" in capsys.readouterr().err


def test_lines_longer_than_a_row_are_named_split_or_dropped(tmp_path, tokenizer, capsys):
    source = write(tmp_path / "in.jsonl", ["\n", {"input_ids": [1, 2]}, {"input_ids": list(range(20))}])
    for overlong in ("error", "split", "drop"):
        out = tmp_path / overlong
        code = run("pack", source, "--out", out, "--capacity", 8, "--overlong", overlong, "--quiet")
        said = capsys.readouterr()
        if overlong == "error":
            assert code == 1
            assert "line 3: has 20 tokens where a row takes at most 8 (1 such lines)" in said.err
        elif overlong == "split":
            assert examples_of(out) == [
                [0, 1, 2, 3, 4, 5, 6, 7],
                [1, 2],
                [8, 9, 10, 11, 12, 13, 14, 15],
                [16, 17, 18, 19],
            ]
            assert "1 examples split" in said.out
        else:
            assert examples_of(out) == [[1, 2]]
            assert "1 examples dropped (20 tokens)" in said.out


def big(tmp_path):
    return write(tmp_path / "in.jsonl", texts(2000)[0])


def pack_arguments(source, out, tokenizer):
    return (
        "pack",
        source,
        "--out",
        out,
        "--tokenizer",
        tokenizer,
        "--capacity",
        256,
        "--shard-lines",
        50,
        "--shard-rows",
        20,
    )


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_that_is_ended_goes_on_and_makes_the_same(tmp_path, tokenizer, ending):
    source, out = big(tmp_path), tmp_path / "out"
    stage = "*.parquet" if ending == signal.SIGKILL else "tokens/*.arrow"
    # A shell starts what it runs in the background with SIGINT ignored, and so may have started these tests.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run_ = start(*pack_arguments(source, out, tokenizer), preexec_fn=heard)
    deadline = time.monotonic() + 120
    while len(list(Path(f"{out}.partial").glob(stage))) < 2 and run_.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run_.send_signal(ending)
    _, said = run_.communicate(timeout=60)
    assert not out.exists()
    if ending == signal.SIGKILL:
        assert run_.returncode == -signal.SIGKILL
    else:
        assert run_.returncode == 130, said
        assert f"interrupted; what is done is kept in {out}.partial" in said
        assert "Traceback" not in said
    kept = list(Path(f"{out}.partial").glob(stage))
    assert kept
    written = []
    original = corpus.write_whole

    def watch(path, write_):
        written.append(path)
        original(path, write_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "write_whole", watch)
        assert run(*pack_arguments(source, out, tokenizer), "--quiet") == 0
    assert not set(kept) & set(written)
    assert run(*pack_arguments(source, tmp_path / "whole", tokenizer), "--quiet") == 0
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, tokenizer):
    source, out = big(tmp_path), tmp_path / "out"

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    full = start(*pack_arguments(source, out, tokenizer), preexec_fn=small_files)
    _, said = full.communicate(timeout=120)
    assert full.returncode == 1
    assert "File too large" in said
    assert "make room or mend it, then the same command goes on there" in said
    assert not out.exists()
    assert not list(Path(f"{out}.partial").rglob(".*"))
    assert run(*pack_arguments(source, out, tokenizer), "--quiet") == 0
    assert len(examples_of(out)) == 2000


def test_an_input_or_arguments_that_changed_are_refused(tmp_path, tokenizer, capsys, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", texts()[0]), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    arguments = ("pack", source, "--out", out, "--tokenizer", tokenizer, "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_write_rows", stop)
        assert run(*arguments) == 130
    assert run(*arguments, "--capacity", 128) == 1
    assert "capacity was 4096 and is 128" in capsys.readouterr().err
    write(source, texts(299)[0])
    assert run(*arguments) == 1
    assert "was begun with something else: modified was" in capsys.readouterr().err


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
    assert "1 lines were skipped." in said
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["examples"] == 300
    assert next(a["name"] for a in figures["approaches"]) == "padding"
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"input_ids": [1]}])
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    assert run("pack", source, "--out", tmp_path / "out") == 1
    assert "pip install packattn[data]" in capsys.readouterr().err
    monkeypatch.setattr(__main__.info, "version_of", lambda name: None)
    assert run("report", source, "--tokenizer", "any") == 1
    assert "pip install packattn[hf]" in capsys.readouterr().err


def test_a_reader_skips_what_was_read(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"input_ids": [number]} for number in range(10)])
    reader = Reader(source, None)
    parts = [[e.input_ids[0] for e in examples] for examples, _ in reader.batches(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [[e.input_ids[0] for e in examples] for examples, _ in reader.batches(3, skip=2)] == parts[2:]
    assert list(reader.batches(3, skip=9)) == []
