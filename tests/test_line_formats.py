"""Lines of JSON to tokens and targets: the tokens are the tokenizer's own, and what is learnt is what should be."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from packattn.data.jsonl import LineError, Reader, parsed

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["<begin>", "<end>", "[CLS]", "[SEP]", "<user>", "<assistant>", "<unknown>"]
IDS = {word: number for number, word in enumerate([*WORDS, *SPECIAL])}
ENDS = {
    "no special tokens": ("$A", {}),
    "an end token alone": ("$A", {"eos_token": "<end>"}),
    "a begin token": ("<begin> $A", {"bos_token": "<begin>", "eos_token": "<end>"}),
    "an end token of its own": ("$A <end>", {"eos_token": "<end>"}),
    "a separator and another end token": ("$A [SEP]", {"sep_token": "[SEP]", "eos_token": "<end>"}),
    "a class and a separator": ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}),
}
MARKED = (
    "{% if tools %}<user>{{ tools[0].name }} {% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<assistant>{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}<user>{{ m.content }} {% endif %}"
    "{% endfor %}{{ extra }}{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7"},
]


def make(kind="a begin token", template=None, **options):
    """A tokenizer of whole words."""
    single, special = ENDS[kind]
    words = Tokenizer(models.WordLevel(IDS, **({"unk_token": "<unknown>"} | options)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, IDS[token]) for token in SPECIAL if token in single]
    )
    added = [token for token in SPECIAL if token not in special.values()]
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=added, **special)
    found.chat_template = template
    return found


def read(folder, tokenizer, *records, **options):
    """The token ids and the labels of each line; -100 is None."""
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    part = Reader(path, tokenizer, **options).read(next(iter(Reader(path, None).parts(1000))))
    return [
        tuple(
            [None if value == -100 else value for value in example.columns[name].tolist()]
            for name in ("input_ids", "labels")
        )
        for example in part.examples
    ]


def one(folder, tokenizer, record, **options):
    (found,) = read(folder, tokenizer, record, **options)
    return found


def ids(words):
    return [IDS[word] for word in words.split()]


def learnt(found):
    return " ".join([*WORDS, *SPECIAL][label] for label in found[1] if label is not None)


@pytest.mark.parametrize("kind", ENDS)
def test_a_text_has_the_tokens_of_the_tokenizer_and_an_end(tmp_path, kind):
    tokenizer = make(kind)
    own = tokenizer("w1 w2")["input_ids"]
    assert one(tmp_path, tokenizer, {"text": "w1 w2"}, end=False) == (own, own)
    whole = [*own, IDS["<end>"]] if kind in ("an end token alone", "a begin token") else own
    assert one(tmp_path, tokenizer, {"text": "w1 w2"}) == (whole, whole)


def test_begin_and_end_are_not_doubled(tmp_path):
    for kind in ("a begin token", "an end token of its own"):
        found, _ = one(tmp_path, make(kind), {"text": "<begin> w1 <end>"})
        assert found == ids("<begin> w1 <end>")


@pytest.mark.parametrize("kind", ENDS)
def test_prompt_and_completion_are_one_text_of_which_the_completion_is_learnt(tmp_path, kind):
    tokenizer = make(kind)
    own = tokenizer("w1 w2 w3 w4")["input_ids"]
    found = one(tmp_path, tokenizer, {"prompt": "w1 w2", "completion": " w3 w4"})
    assert found[0][: len(own)] == own
    assert learnt(found).replace(" <end>", "").replace(" [SEP]", "") == "w3 w4"
    assert found[1][-1] is not None  # the end is learnt
    every = one(tmp_path, tokenizer, {"prompt": "w1 w2", "response": " w3 w4"}, targets="all")
    assert every[0] == every[1] == found[0]


def test_a_token_over_the_end_of_the_prompt_is_learnt(tmp_path):
    assert learnt(one(tmp_path, make(), {"prompt": "w1 w", "completion": "12 w3"}, end=False)) == "w12 w3"


def test_a_tokenizer_without_offsets_does_the_same(tmp_path):
    tokenizer = transformers.ByT5Tokenizer()
    tokens, labels = one(tmp_path, tokenizer, {"prompt": "ab", "completion": "cd"})
    assert tokens == tokenizer("abcd")["input_ids"]
    assert labels == [None, None, *tokens[2:]]


def test_turns_of_the_assistant_alone_are_learnt(tmp_path):
    tokenizer = make(template=MARKED)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    own = tokenizer.apply_chat_template(CHAT, **options)
    found = one(tmp_path, tokenizer, {"messages": CHAT})
    assert found[0] == own["input_ids"]
    assert [label is not None for label in found[1]] == [bool(mask) for mask in own["assistant_masks"]]
    assert learnt(found) == "w4 <end> w6 w7 <end>"
    assert one(tmp_path, tokenizer, {"messages": CHAT}, targets="all") == (found[0], found[0])


def test_turns_that_the_template_does_not_mark_need_a_choice(tmp_path):
    tokenizer = make(template=UNMARKED)
    with pytest.raises(LineError, match=r"line 1: .* does not mark the turns .* choose --targets all"):
        read(tmp_path, tokenizer, {"messages": CHAT})
    own = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert one(tmp_path, tokenizer, {"messages": CHAT}, targets="all") == (own, own)
    with pytest.raises(LineError, match="the tokenizer has no chat template"):
        read(tmp_path, make(), {"messages": CHAT}, targets="all")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "must be a list of messages, got an empty one"),
        ("w1", "must be a list of messages, got str"),
        ([{"from": ["human"], "value": "w1"}], r"message 0 is from \['human'\]"),
        ([3], "message 0 must be an object with role and content, got int"),
        (
            [*CHAT, {"role": "user", "text": "w1"}],
            "message 5 must be an object with role and content, got fields role, text",
        ),
        ([*CHAT, {"role": "assistant", "content": "w1", "weight": 0}], "have a weight of 0 in message 5"),
        ([{"role": "user", "content": {"a": 1}}], "messages do not fit the chat template"),
    ],
)
def test_messages_that_would_be_lost_or_learnt_wrongly_are_refused(tmp_path, messages, problem):
    with pytest.raises(LineError, match=problem):
        read(tmp_path, make(template=MARKED), {"messages": messages})


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_a_prompt_and_a_completion_of_messages(tmp_path, template):
    tokenizer = make(template=template)
    found = one(tmp_path, tokenizer, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    assert found[0] == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert learnt(found) == "w6 w7 <end>"
    assert one(tmp_path, tokenizer, {"prompt": CHAT[:4], "completion": CHAT[4:]}, targets="all")[1] == found[0]
    with pytest.raises(LineError, match="has turns of user in its completion"):
        read(tmp_path, tokenizer, {"prompt": CHAT[:2], "completion": CHAT[2:]})
    with pytest.raises(LineError, match="completion must be a list of messages, got str"):
        read(tmp_path, tokenizer, {"prompt": CHAT[:2], "completion": "w1"})


def test_a_template_that_writes_the_prompt_in_another_way(tmp_path):
    header = UNMARKED.replace(
        "{% if add_generation_prompt %}<assistant>", "{% if add_generation_prompt %}<assistant>w9"
    )
    record = {"prompt": CHAT[:2], "completion": CHAT[2:3]}
    assert learnt(one(tmp_path, make(template=header), record)) == "w4 <end>"
    closed = UNMARKED + "{% if not add_generation_prompt %}w9{% endif %}"
    assert learnt(one(tmp_path, make(template=closed), record)) == "w4 <end> w9"
    without = UNMARKED.replace("{% if add_generation_prompt %}<assistant>{% endif %}", "")
    assert learnt(one(tmp_path, make(template=without), record)) == "<assistant> w4 <end>"
    counting = "{{ messages | length }} " + UNMARKED
    with pytest.raises(LineError, match="writes in another way where the completion follows"):
        read(tmp_path, make(template=counting), record)


def test_conversations_of_sharegpt(tmp_path):
    tokenizer = make(template=MARKED)
    turns = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT[1:]]
    wanted = one(tmp_path, tokenizer, {"messages": CHAT})
    assert one(tmp_path, tokenizer, {"conversations": turns, "system": "w1"}) == wanted
    assert one(tmp_path, tokenizer, {"conversations": [{"from": "system", "value": "w1"}, *turns]}) == wanted
    with pytest.raises(LineError, match="message 0 is from 'alien'"):
        read(tmp_path, tokenizer, {"conversations": [{"from": "alien", "value": "w1"}]})


def test_tools_and_variables_of_the_template_reach_it(tmp_path):
    tokenizer = make(template=MARKED)
    plain = one(tmp_path, tokenizer, {"messages": CHAT})[0]
    for tools in ([{"name": "w8"}], json.dumps([{"name": "w8"}])):
        assert one(tmp_path, tokenizer, {"messages": CHAT, "tools": tools})[0] == [*ids("<user> w8"), *plain]
    found = one(tmp_path, tokenizer, {"messages": CHAT, "chat_template_kwargs": {"extra": "w9"}})
    assert found[0] == [*plain, IDS["w9"]]


def test_instruction_input_and_output_of_alpaca(tmp_path):
    record = {"instruction": "w1", "input": "w2", "output": " w3 w4"}
    found = one(tmp_path, make(), record)
    assert learnt(found) == "w3 w4 <end>"
    assert {IDS["w1"], IDS["w2"]} <= {*found[0]}
    assert len(one(tmp_path, make(), record | {"input": ""})[0]) < len(found[0])
    tokens, labels = one(tmp_path, make(template=UNMARKED), record | {"system": "w5"})
    assert tokens == ids("<user> w5 <user> w1 w2 <assistant> w3 w4 <end>")
    assert [label for label in labels if label is not None] == ids("w3 w4 <end>")


def test_lines_of_tokens_are_read_as_the_collator_reads_them(tmp_path):
    path = tmp_path / "in.jsonl"
    record = {
        "input_ids": [1, 2, 3, 4], "completion_mask": [0, 0, 1, 1], "position_ids": [0, 1, 0, 1], "w": [1, 1, 0.5, 0],
        "id": "a", "words": ["a", "b", "c", "d"], "none": None,
    }  # fmt: skip
    path.write_text(json.dumps(record) + "\n" + json.dumps({"input_ids": [1]}) + "\n")
    (lines,) = Reader(path, None).parts(10)
    part = Reader(path, None, bad_lines="skip").read(lines)
    columns = {name: values.tolist() for name, values in part.examples[0].columns.items()}
    assert columns == {
        "input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "position_ids": [0, 1, 0, 1], "w": [1, 1, 0.5, 0],
    }  # fmt: skip
    assert part.unused == {"id": 1, "words": 1}
    with pytest.raises(LineError, match="line 1, field 'w' must hold one value for each of the 1 input_ids, got 2"):
        read(tmp_path, None, {"input_ids": [1], "w": [1, 2]})
    assert read(tmp_path, None, {"input_ids": [1], "w": [1, 2]}, columns=[]) == [([1], [1])]
    assert len(part.problems) == 1
    assert "line 2: has the columns input_ids, labels, position_ids where those before have" in part.problems[0]


def test_a_text_that_the_tokenizer_refuses_is_found_among_others(tmp_path):
    strict = make(unk_token=None)
    records = [{"text": "w1"}, {"text": "w2 other"}, {"text": "w3"}]
    with pytest.raises(LineError, match="line 2: cannot be tokenized"):
        read(tmp_path, strict, *records)
    assert [tokens for tokens, _ in read(tmp_path, strict, *records, bad_lines="skip", end=False)] == [
        ids("<begin> w1"),
        ids("<begin> w3"),
    ]


ODD = [
    (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    (b'{"\\udc00": 1}', "half of a surrogate pair"),
    (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a": NaN}', "NaN is no number of JSON"),
    (b'{"a": [-Infinity]}', "-Infinity is no number"),
    (b'{"a": 1, "a": 2}', "the field 'a' twice"),
    (b'{"a": {"b": 1, "b": 2}}', "the field 'b' twice"),
    (b"  ", "is blank"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    (b'{"a": 1} {"a": 2}', "Extra data"),
    (b"\0", "is not JSON"),
    (b"null", "must be an object, got NoneType"),
]


@pytest.mark.parametrize(("line", "problem"), ODD, ids=[problem for _, problem in ODD])
def test_what_is_no_line_of_json_is_refused(line, problem):
    with pytest.raises(ValueError, match=problem):
        parsed(line, first=False)


def test_what_is_odd_but_right_is_taken():
    assert parsed(b'\xef\xbb\xbf{"a": 1}\r\n', first=True) == {"a": 1}
    assert parsed(b' {"a": "\\ud83d\\ude00"} ', first=False) == {"a": "\U0001f600"}
    assert (
        parsed(b'{"a": 123456789012345678901234567890, "b": 1e999}', first=False)["a"] == 123456789012345678901234567890
    )


NUMBERS = [
    ({"input_ids": [1, 2**31]}, "input_ids must lie in"),
    ({"input_ids": [1, 2**70]}, "'input_ids' must hold one number per token"),
    ({"input_ids": [-1, 2]}, "input_ids must lie in"),
    ({"input_ids": [1.5]}, "must hold integers"),
    ({"input_ids": [True]}, "must hold integers"),
    ({"input_ids": []}, "has no tokens"),
    ({"input_ids": [1, 2], "labels": [1]}, "'labels' must hold one value for each of the 2"),
    ({"input_ids": [1, 2], "labels": [1, 2**40]}, "labels must lie in"),
    ({"input_ids": [1, 2], "label": 1}, "has one label for the whole example"),
    ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "as padding"),
    ({"input_ids": [1, 2], "position_ids": [3, 4]}, "must begin at the start_position"),
    ({"input_ids": [1, 2], "w": [0, 2**40]}, "w must lie in"),
    ({"input_ids": [1, 2], "w": [0, 1e300]}, "w must hold finite numbers"),
]


@pytest.mark.parametrize(("record", "problem"), NUMBERS, ids=[str(record) for record, _ in NUMBERS])
def test_numbers_that_cannot_be_kept_are_refused(tmp_path, record, problem):
    with pytest.raises(LineError, match=f"in.jsonl, line 1.*{problem}"):
        read(tmp_path, None, record)


def test_parts_are_the_lines_of_the_file_up_to_the_last_that_is_not_blank(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n\nb\nc" + b"\n \n" * 60_000)
    parts = list(Reader(path, None).parts(2))
    assert parts == [[(1, b"a\n"), (2, b"\n")], [(3, b"b\n"), (4, b"c\n")]]
    path.write_bytes(b"\n \n")
    assert list(Reader(path, None).parts(2)) == []
