"""pack_dataset: every token once, the same rows from every kind of data."""

import dataclasses
import itertools
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

import packattn
from packattn import PackingCollator, pack_dataset, packing_report
from packattn.data import PackedDataset, PackingPlan, PackRows, count_examples

CAPACITY = 64


def make(n=200, longest=CAPACITY, seed=0):
    """Examples whose tokens are all different, so that none can be lost or doubled unseen."""
    generator, numbers = random.Random(seed), itertools.count()
    found = []
    for _ in range(n):
        tokens = list(itertools.islice(numbers, min(longest, 1 + int(generator.expovariate(1 / 20)))))
        found.append({"input_ids": tokens, "labels": [-100] + tokens[1:]})
    return found


def as_lists(rows):
    return [{name: torch.as_tensor(values).tolist() for name, values in row.items()} for row in rows]


def examples_of(rows):
    """The examples of packed rows, cut where the positions restart."""
    found = []
    for row in as_lists(rows):
        for token, position, label in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
            assert label == (-100 if position == 0 else token)
            if position == 0:
                found.append([])
            found[-1].append(token)
    return found


def tokens_of(examples):
    return [example["input_ids"] for example in examples]


def test_every_kind_of_data_gives_the_same_rows(tmp_path):
    examples = make()
    table = datasets.Dataset.from_list(examples)
    packed = pack_dataset(examples, CAPACITY, progress=False)
    assert isinstance(packed, PackedDataset)
    expected = as_lists(packed[i] for i in range(len(packed)))
    assert sorted(examples_of(expected)) == tokens_of(examples)
    assert packed.plan.fill > 0.95
    written = pack_dataset(table, CAPACITY, progress=False)
    assert isinstance(written, datasets.Dataset)
    assert as_lists(written) == expected
    assert as_lists(pack_dataset(table.with_format("torch"), CAPACITY, num_proc=2, progress=False)) == expected
    shuffled = table.shuffle(seed=1)
    assert sorted(examples_of(pack_dataset(shuffled, CAPACITY, progress=False))) == tokens_of(examples)


def test_packing_is_global_not_by_chunks_of_rows():
    examples = [{"input_ids": [1] * n} for n in [40] * 1500 + [24] * 1500]
    table = datasets.Dataset.from_list(examples)
    assert pack_dataset(table, CAPACITY, method="best-fit-decreasing", progress=False).num_rows == 1500


def test_long_examples_are_split_or_dropped():
    examples = [{"input_ids": list(range(150))}, {"input_ids": [200, 201]}]
    with pytest.raises(ValueError, match="example 0 has 150 tokens"):
        pack_dataset(examples, CAPACITY, progress=False)
    split = pack_dataset(datasets.Dataset.from_list(examples), CAPACITY, overlong="split", progress=False)
    assert sorted(examples_of(split)) == [list(range(64)), list(range(64, 128)), list(range(128, 150)), [200, 201]]
    dropped = pack_dataset(examples, CAPACITY, overlong="drop", progress=False)
    assert examples_of([dropped[0]]) == [[200, 201]]
    assert dropped.plan.dropped.tolist() == [0]


def test_a_plan_is_saved_reused_and_refused_for_other_data(tmp_path):
    examples, path = make(), tmp_path / "plan.pt"
    first = pack_dataset(examples, CAPACITY, plan=path, seed=5, progress=False)
    again = pack_dataset(datasets.Dataset.from_list(examples), CAPACITY, plan=path, progress=False)
    assert as_lists(again) == as_lists(first[i] for i in range(len(first)))
    with pytest.raises(ValueError, match="the plan was made for other data"):
        pack_dataset(examples[::-1], CAPACITY, plan=path, progress=False)
    with pytest.raises(ValueError, match="the plan was made with capacity=64, asked for is 128"):
        pack_dataset(examples, 128, plan=path, progress=False)
    with pytest.raises(ValueError, match="one length for each of 200 examples, got 199"):
        pack_dataset(examples, CAPACITY, lengths=[1] * 199, progress=False)


def test_lengths_that_are_not_those_of_the_examples_cut_nothing():
    examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    for lengths in ([2, 1], [4, 1]):
        packed = pack_dataset(examples, CAPACITY, lengths=lengths, progress=False)
        with pytest.raises(ValueError, match=f"example 0 has 3 tokens where the plan counted {lengths[0]}"):
            packed[0]


def test_rows_are_a_function_for_map_on_any_machine(tmp_path):
    examples = make(50)
    datasets.Dataset.from_list(examples).save_to_disk(tmp_path / "data")
    plan = packattn.pack([len(e["input_ids"]) for e in examples], CAPACITY)
    plan.save(tmp_path / "plan.pt")
    rows = PackRows(partial(datasets.load_from_disk, str(tmp_path / "data")), tmp_path / "plan.pt")
    bins = datasets.Dataset.from_dict({"bin": range(len(plan))})
    found = bins.map(rows, batched=True, batch_size=3, remove_columns="bin", num_proc=2)
    assert sorted(examples_of(found)) == tokens_of(examples)
    assert found.features["input_ids"].feature.dtype == "int32"


@pytest.fixture
def ray_cluster():
    """Ray on two nodes of this machine."""
    ray = pytest.importorskip("ray", reason="pip install 'packattn[heavy]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_rows_are_a_function_for_ray_data(tmp_path, ray_cluster):
    examples = make(100)
    datasets.Dataset.from_list(examples).save_to_disk(tmp_path / "data")
    plan = packattn.pack([len(e["input_ids"]) for e in examples], CAPACITY)
    plan.save(tmp_path / "plan.pt")
    rows = PackRows(partial(datasets.load_from_disk, str(tmp_path / "data")), tmp_path / "plan.pt")
    assert len(ray_cluster.nodes()) == 2
    bins = ray_cluster.data.range(len(plan), override_num_blocks=4)
    bins.map_batches(rows, batch_size=3).write_parquet(str(tmp_path / "rows"))
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows" / "*.parquet"), split="train")
    assert len(found) == len(plan)
    assert sorted(examples_of(found)) == tokens_of(examples)


def test_packed_rows_train_through_the_collator_and_several_make_one():
    packed = pack_dataset(make(), CAPACITY, progress=False)
    loader = DataLoader(packed, batch_size=2, collate_fn=PackingCollator(pad_to=2 * CAPACITY))
    rows = [{name: values[0][batch["attention_mask"][0] == 1] for name, values in batch.items()} for batch in loader]
    assert sorted(examples_of(rows)) == tokens_of(make())


OTHER_COLUMNS = {
    "text": "a b",
    "length": 2,
    "tokens": ["a", "b"],
    "boxes": [[1, 2], [3, 4]],
    "chat": [{"role": "user"}],
}


@pytest.mark.parametrize(
    "kind", [list, datasets.Dataset.from_list, lambda examples: dict(enumerate(examples)).values()]
)
def test_columns_that_hold_no_number_per_token_are_left_out_and_named(kind):
    example = {"input_ids": [1, 2], "weight": [0.5, 1.0], "completion_mask": [1, 1]} | OTHER_COLUMNS
    with pytest.warns(UserWarning, match="are not packed") as said:
        rows = as_lists(pack_dataset(kind([example]), CAPACITY))
    wanted = {"input_ids": [1, 2], "labels": [-100, 2], "position_ids": [0, 1]}
    assert rows == [wanted | {"weight": [0.5, 1.0]}]
    (message,) = {str(warning.message) for warning in said if "not packed" in str(warning.message)}
    assert all(name in message for name in OTHER_COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_lists(pack_dataset(kind([example]), CAPACITY, columns=[])) == [wanted]
        assert as_lists(pack_dataset(kind([example]), CAPACITY, columns=["weight"])) == rows
    for columns, error, match in [
        (["text"], TypeError, "example 0, field 'text' must hold one number per token"),
        (
            ["height", "weight"],
            ValueError,
            "columns names height, which the data set has not; it has input_ids, weight",
        ),
        ("weight", TypeError, "columns must be a list of names, got the string 'weight'"),
    ]:
        with pytest.raises(error, match=match):
            list(pack_dataset(kind([example]), CAPACITY, columns=columns))
    with pytest.raises(ValueError, match="field 'weight' must hold one value for each of the 2 input_ids, got 1"):
        list(pack_dataset(kind([{"input_ids": [1, 2], "weight": [0.5]}]), CAPACITY))


def test_the_format_of_a_data_set_chooses_its_columns_and_its_transform_is_not_passed_over():
    table = datasets.Dataset.from_list([{"input_ids": [1, 2], "weight": [0.5, 1.0]}])
    for chosen in (table.with_format("torch", columns=["input_ids"]), table.select_columns("input_ids")):
        assert "weight" not in pack_dataset(chosen, CAPACITY, progress=False).column_names
    every = table.with_format("torch", columns=["input_ids"], output_all_columns=True)
    assert "weight" in pack_dataset(every, CAPACITY, progress=False).column_names
    with pytest.raises(TypeError, match="dataset must have a length and numbered examples, got IterableDataset"):
        count_examples(table.to_iterable_dataset())
    with pytest.raises(TypeError, match="got a DataFrame that has no 0"):
        pack_dataset(table.to_pandas(), 8)
    with pytest.raises(ValueError, match="makes its examples by a transform"):
        pack_dataset(table.with_transform(lambda batch: batch), CAPACITY, progress=False)


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_without_a_target_are_counted_and_said(kind):
    masked = {"input_ids": [1] * 6, "labels": [1, 2, 3, 4, -100, -100]}
    examples = [masked, {"input_ids": [1, 2], "labels": [5, -100]}, {"input_ids": [1], "labels": [5]}]
    for options, wanted in [({}, "2 of 3"), ({"overlong": "split"}, "3 of 4")]:
        with pytest.warns(UserWarning, match=f"{wanted} rows have no target"):
            pack_dataset(kind(examples), 6 if not options else 4, max_per_bin=1, progress=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_dataset(kind(examples[:1]), 6, progress=False)
        collator = PackingCollator(keep_first_labels=True)
        pack_dataset(kind(examples), 6, max_per_bin=1, collator=collator, progress=False)


def test_tokens_and_targets_of_a_data_set_are_counted():
    examples = [
        {"input_ids": [1] * 6, "completion_mask": [0, 0, 1, 1, 1, 0], "text": "a"},
        {"input_ids": [1], "completion_mask": [1], "text": "b"},
        {"input_ids": [1] * 4, "completion_mask": [1] * 4, "text": "c"},
    ]
    table = datasets.Dataset.from_list(examples)
    for data in (table, [{name: example[name] for name in ("input_ids", "completion_mask")} for example in examples]):
        assert [part.tolist() for part in count_examples(data)] == [[6, 1, 4], [3, 0, 3]]
        assert count_examples(data, mask_first=3).targets.tolist() == [2, 0, 1]
    assert count_examples(table.remove_columns("completion_mask")).targets.tolist() == [5, 0, 3]
    labelled = datasets.Dataset.from_list([{"input_ids": [1] * 4, "label": 0}, {"input_ids": [1], "label": 1}])
    assert [part.tolist() for part in count_examples(labelled)] == [[4, 1], [1, 1]]
    with pytest.raises(ValueError, match="makes its examples by a transform"):
        count_examples(labelled.with_transform(lambda batch: batch))
    rows = datasets.Dataset.from_list([{"input_ids": [1] * 4, "position_ids": [0, 1, 0, 1]}])
    assert count_examples(rows).targets.tolist() == [2]


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({}, {"max_per_bin": 1, "seed": 9}, "max_per_bin=None, asked for is 1; seed=0, asked for is 9"),
        ({"method": "first-fit"}, {"method": "mixed"}, "method='first-fit', asked for is 'mixed'"),
        ({"seed": 3}, {"seed": None}, "seed=3, asked for is None"),
        ({"seed": 3}, {"seed": 0}, "seed=3, asked for is 0"),
        ({"max_square": 9999}, {"max_square": 8888}, "max_square=9999, asked for is 8888"),
        ({"overlong": "split"}, {"overlong": "error"}, "overlong='split', asked for is 'error'"),
        ({"method": "best-fit"}, {"open_bins": 3}, "open_bins=64, asked for is 3"),
    ],
)
def test_a_plan_made_with_other_arguments_is_refused(made, asked, message, tmp_path):
    examples = make(20)
    path, plan = tmp_path / "plan.pt", packattn.pack([len(e["input_ids"]) for e in examples], CAPACITY, **made)
    plan.save(path)
    for given in (plan, path):
        for options in ({}, made):
            assert list(pack_dataset(examples, CAPACITY, plan=given, progress=False, **options).plan) == list(plan)
        with pytest.raises(ValueError, match=f"the plan was made with {message}"):
            pack_dataset(examples, CAPACITY, plan=given, progress=False, **asked)
    with pytest.raises(TypeError, match="plan must be a PackingPlan or the path of its file, got list"):
        pack_dataset(examples, CAPACITY, plan=[[0]], progress=False)


def test_a_damaged_plan_is_refused_wherever_it_is_taken(tmp_path):
    examples = make(20)
    plan = packattn.pack([len(e["input_ids"]) for e in examples], CAPACITY)
    wrong = plan.examples.clone()
    wrong[3] = -1
    damaged = dataclasses.replace(plan, examples=wrong)
    damaged.save(tmp_path / "plan.pt")
    for given in (damaged, tmp_path / "plan.pt"):
        with pytest.raises(ValueError, match="one has the number -1; make a new one"):
            pack_dataset(examples, CAPACITY, plan=given, progress=False)
        with pytest.raises(ValueError, match="one has the number -1; make a new one"):
            PackRows(examples, given)({"bin": [0]})
    with pytest.raises(ValueError, match="one has the number -1; make a new one"):
        PackedDataset(examples, damaged)
    for rows in (lambda data: PackedDataset(data, plan), lambda data: PackRows(data, plan)({"bin": [0]})):
        with pytest.raises(ValueError, match="the plan was made of 20 examples, the data set has 21"):
            rows([*examples, examples[0]])


def test_columns_that_are_not_of_tokens_are_named():
    with pytest.raises(ValueError, match="dataset has no column input_ids, only text"):
        pack_dataset(datasets.Dataset.from_dict({"text": ["a"]}), CAPACITY, progress=False)
    for column, kind in ((["a"], "string"), ([["a"]], "list<element: string>|list<item: string>"), ([3], "int32")):
        with pytest.raises(TypeError, match=f"column input_ids must hold lists of numbers, got ({kind})"):
            pack_dataset(datasets.Dataset.from_dict({"input_ids": column}), CAPACITY, progress=False)
    with pytest.raises(ValueError, match="example 1 is empty"):
        pack_dataset(datasets.Dataset.from_dict({"input_ids": [[1], None]}), CAPACITY, progress=False)
    for several in ({"input_ids": [[1]]}, datasets.DatasetDict({"input_ids": datasets.Dataset.from_list([])})):
        with pytest.raises(
            TypeError, match=f"must hold examples, got a {type(several).__name__} of input_ids; give one"
        ):
            pack_dataset(several, CAPACITY)
    with pytest.raises(TypeError, match="example 0 must be a mapping with input_ids, got str"):
        pack_dataset(["a"], CAPACITY, progress=False)


def test_a_stream_takes_no_plan_and_keeps_its_order():
    nothing = {}.values()
    for options in ({"plan": "plan.pt"}, {"seed": 1}, {"num_proc": 2}, {"method": "mixed"}, {"lengths": [1]}):
        with pytest.raises(ValueError, match="leave out lengths, plan, num_proc, seed and any method"):
            pack_dataset(nothing, CAPACITY, **options)
    assert not list(pack_dataset(nothing, CAPACITY, method="best-fit", seed=None))


def test_packing_does_not_import_datasets():
    code = (
        "import sys, packattn; packattn.pack_dataset([{'input_ids': [1]}], 8, progress=False)[0];"
        "print(*({'datasets', 'transformers', 'triton', 'pyarrow'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert found.stdout.strip() == ""


def test_plans_of_many_shapes_are_read_back(tmp_path):
    for method in ("first-fit", "best-fit-decreasing"):
        plan = packattn.pack([3, 5, 9], 10, method=method)
        plan.save(tmp_path / "plan.pt")
        assert list(PackingPlan.load(tmp_path / "plan.pt")) == list(plan)


def test_a_torch_stream_with_a_length_is_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([{"input_ids": [number] * 2} for number in range(3)])

    rows = pack_dataset(Stream(), 4)
    assert sorted(token for row in rows for token in row["input_ids"].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(TypeError, match=r"packing_report cannot count a stream \(Stream\)"):
        packing_report(Stream(), 4)
