"""One reader of an example: what is a target, what is refused by name, the same wherever an example is packed."""

import contextlib

import datasets
import numpy as np
import pytest
import torch

from packattn import PackingCollator, pack_dataset
from packattn.data.examples import MASKS, read_example

IDS = [5, 6, 7, 8]


def as_rows(example, kind, **options):
    """The row of one example, by everything that packs."""
    if kind == "collator":
        return {name: values[0].tolist() for name, values in PackingCollator()([example]).items()}
    if kind == "stream":
        source = type("Source", (), {"__iter__": lambda self: iter([example])})()
    else:
        source = [example] if kind == "sequence" else datasets.Dataset.from_list([example])
    if kind != "stream":
        options["progress"] = False
    (row,) = list(pack_dataset(source, 8, **options))
    return {name: torch.as_tensor(values).tolist() for name, values in row.items()}


KINDS = ["collator", "sequence", "dataset", "stream"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("field", MASKS)
def test_a_token_outside_a_mask_is_no_target(field, kind):
    row = as_rows({"input_ids": IDS, field: [0, 0, 1, 1], "weight": [0.5] * 4}, kind)
    assert row == {"input_ids": IDS, "labels": [-100, -100, 7, 8], "position_ids": [0, 1, 2, 3], "weight": [0.5] * 4}


@every_kind
def test_a_target_lies_inside_every_mask(kind):
    example = {"input_ids": IDS, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert as_rows(example, kind)["labels"] == [-100, 6, -100, 8]


@pytest.mark.parametrize(
    "mask",
    [[False, False, True, True], np.array([0, 0, 1, 1], np.uint8), torch.tensor([0, 0, 1, 1]).bool(), [0.0, 0, 1, 1]],
    ids=["list", "numpy", "torch", "floats"],
)
def test_masks_come_as_any_zeros_and_ones(mask):
    labels = read_example({"input_ids": IDS, "completion_mask": mask}, "it").columns["labels"]
    assert labels.tolist() == [-100, -100, 7, 8]


def test_labels_beside_a_mask_agree_with_it_or_are_refused():
    labels = [-100, -100, -100, 8]
    example = {"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}
    assert PackingCollator()([example | {"labels": labels}])["labels"].tolist() == [labels]
    message = "example 0 has labels for 2 tokens where its completion_mask is 0, the first at token 0"
    with pytest.raises(ValueError, match=message):
        PackingCollator()([example | {"labels": IDS}])
    with pytest.raises(ValueError, match="one label for the whole example and completion_mask"):
        PackingCollator()([example | {"label": 1}])


@pytest.mark.parametrize("field", ["label", "label_ids"])
def test_labels_of_tokens_are_labels_by_any_of_their_names(field):
    assert PackingCollator()([{"input_ids": IDS, field: [1, 2, -100, 4]}])["labels"].tolist() == [[-100, 2, -100, 4]]
    with pytest.raises(ValueError, match=f"has labels twice, as labels and as {field}"):
        PackingCollator()([{"input_ids": IDS, field: IDS, "labels": IDS}])


@every_kind
@pytest.mark.parametrize("given", [{"position_ids": [0, 1, 0, 1]}, {"seq_lengths": [2, 2]}], ids=["positions", "trl"])
def test_a_packed_row_keeps_its_boundaries(given, kind):
    row = as_rows({"input_ids": IDS, "completion_mask": [1, 1, 1, 1]} | given, kind)
    assert row == {"input_ids": IDS, "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}


@pytest.mark.parametrize("kind", ["sequence", "dataset", "stream"])
def test_a_packed_row_that_is_split_keeps_its_boundaries_and_every_piece_begins_at_the_first_position(kind):
    example = {"input_ids": list(range(10)), "seq_lengths": [3, 5, 2], "completion_mask": [1] * 7 + [0] * 3}
    make = {
        "sequence": list,
        "dataset": datasets.Dataset.from_list,
        "stream": lambda one: dict(enumerate(one)).values(),
    }
    with (
        contextlib.nullcontext() if kind == "stream" else pytest.warns(UserWarning, match="1 of 3 rows have no target")
    ):
        packed = pack_dataset(make[kind]([example]), 4, overlong="split")
    rows = sorted([torch.as_tensor(row[n]).tolist() for n in ("input_ids", "position_ids", "labels")] for row in packed)
    assert rows == [
        [[0, 1, 2, 3], [0, 1, 2, 0], [-100, 1, 2, -100]],
        [[4, 5, 6, 7], [0, 1, 2, 3], [-100, 5, 6, -100]],
        [[8, 9], [0, 1], [-100, -100]],
    ]


BAD = [
    ({"completion_mask": [0, 1]}, ValueError, "'completion_mask' must hold one value for each of the 4 .* got 2"),
    ({"assistant_masks": []}, ValueError, "'assistant_masks' must hold one value for each of the 4 input_ids, got 0"),
    ({"completion_mask": [0, 2, 1, 1]}, ValueError, "'completion_mask' must hold 0 and 1 alone, got 2"),
    ({"completion_mask": [0.0, float("nan"), 1, 1]}, ValueError, "must hold 0 and 1 alone, got nan"),
    ({"labels": list(range(6))}, ValueError, "'labels' must hold one value for each of the 4 input_ids, got 6"),
    ({"weight": [1.0]}, ValueError, "'weight' must hold one value for each of the 4 input_ids, got 1"),
    ({"attention_mask": [1, 1, 1, 0]}, ValueError, "'attention_mask' marks 1 of 4 tokens as padding"),
    ({"position_ids": [1, 2, 3, 4]}, ValueError, "'position_ids' must begin at the start_position"),
    ({"seq_lengths": [2, 3]}, ValueError, r"'seq_lengths' .* the sum 4, .* got \[2, 3\] with the sum 5"),
    ({"seq_lengths": [4, 0]}, ValueError, "'seq_lengths' must hold lengths of at least 1"),
    ({"seq_lengths": [2, 2], "position_ids": [0, 1, 0, 1]}, ValueError, "has position_ids and seq_lengths"),
    ({"seq_idx": [0, 0, 1, 1]}, ValueError, "has seq_idx, which packing decides"),
]


@every_kind
@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_law_10_an_example_that_contradicts_itself_is_named(given, error, message, kind):
    with pytest.raises(error, match=f"example 0.*{message}"):
        as_rows({"input_ids": IDS} | given, kind)


@pytest.mark.parametrize("kind", ["sequence", "dataset", "stream"])
@pytest.mark.parametrize("labels", [12, 9])
def test_splitting_cuts_no_labels_that_do_not_fit(labels, kind):
    example = {"input_ids": list(range(10)), "labels": list(range(labels))}
    with pytest.raises(ValueError, match=f"'labels' must hold one value for each of the 10 input_ids, got {labels}"):
        as_rows(example, kind, overlong="split")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([2**63], TypeError, "must hold one number per token, got list .*Overflow"),
        (np.array([2**63], np.uint64), ValueError, "holds values beyond int64"),
        ([None], TypeError, "must hold one number per token"),
        (["a"], TypeError, "must hold one number per token"),
        ([True], TypeError, "must hold integers, got torch.bool"),
        ([1.0], TypeError, "must hold integers, got torch.float32"),
        ([[1]], ValueError, r"must have shape \(tokens,\), got \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("field", ["input_ids", "labels", "position_ids"])
def test_law_10_numbers_of_another_kind_are_named(field, values, error, message):
    with pytest.raises(error, match=f"line 7, field '{field}' {message}"):
        read_example({"input_ids": [1], field: values}, "line 7")


def test_an_example_is_named_by_its_number_in_the_data_set():
    examples = [{"input_ids": IDS}] * 9 + [{"input_ids": IDS, "labels": [1]}]
    packed = pack_dataset(examples, 4, lengths=[4] * 10, progress=False)
    with pytest.raises(ValueError, match="example 9, field 'labels'"):
        packed.__getitems__(range(10))


def test_numbers_that_rows_are_not_written_in_are_refused_and_other_columns_keep_theirs():
    large = [2**31, 2**40, 0, -(2**33)]
    with pytest.raises(ValueError, match="field 'labels' holds 1099511627776, rows are written as int32"):
        as_rows({"input_ids": IDS, "labels": large}, "dataset")
    for kind in KINDS:
        assert as_rows({"input_ids": IDS, "hash": large}, kind)["hash"] == large


def test_examples_with_other_fields_are_refused_before_the_first_row():
    with pytest.raises(
        ValueError, match="example 1 has fields input_ids where example 0 has input_ids, completion_mask"
    ):
        pack_dataset([{"input_ids": IDS, "completion_mask": [0, 1, 1, 1]}, {"input_ids": IDS}], 4, progress=False)


def test_the_first_labels_of_each_sequence_are_ignored_for_heads_that_look_ahead():
    examples = [
        {"input_ids": IDS, "seq_lengths": [4]},
        {"input_ids": [9], "seq_lengths": [1]},
        {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]},
    ]
    for count, wanted in [
        (1, [-100, 6, 7, 8, -100, -100, 2, -100, 4, 5]),
        (2, [-100, -100, 7, 8, -100, -100, -100, -100, -100, 5]),
        (3, [-100, -100, -100, 8, -100, -100, -100, -100, -100, -100]),
    ]:
        assert PackingCollator(mask_first=count, pad_to=12)(examples)["labels"].tolist() == [[*wanted, -100, -100]]
    with pytest.raises(ValueError, match="mask_first must be an int of at least 1, got 0"):
        PackingCollator(mask_first=0)
    with pytest.raises(ValueError, match="give keep_first_labels=True or mask_first=2, not both"):
        PackingCollator(mask_first=2, keep_first_labels=True)


def test_a_batch_without_a_target_is_said_once():
    collate = PackingCollator()
    nothing = [{"input_ids": IDS, "labels": [-100] * 4}, {"input_ids": [5]}]
    with pytest.warns(UserWarning, match="a batch has no target") as said:
        batches = [collate(examples) for examples in (nothing[:1], nothing[1:], [{"input_ids": IDS}])]
    assert batches[0]["labels"].tolist() == [[-100] * 4]
    assert len(said) == 1


@pytest.mark.parametrize("lengths", [[4], [5], [7]])
def test_a_split_example_has_the_tokens_that_the_plan_counted(lengths):
    packed = pack_dataset([{"input_ids": list(range(6))}], 2, lengths=lengths, overlong="split", progress=False)
    with pytest.raises(ValueError, match=f"example 0 has 6 tokens where the plan counted {lengths[0]}"):
        list(packed)


def test_labels_of_all_examples_are_of_one_kind():
    with pytest.raises(ValueError, match=r"example 1, field 'labels' must hold .*, got the single value 3"):
        PackingCollator()([{"input_ids": IDS, "labels": IDS}, {"input_ids": [1], "labels": 3}])
