"""pack_dataset: every token once, the same rows from every kind of data."""

import itertools
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

import packattn
from packattn import PackingCollator, pack_dataset
from packattn.data import PackedDataset, PackingPlan, PackRows

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
    examples = [{"input_ids": list(range(150)), "labels": list(range(150))}, {"input_ids": [200], "labels": [200]}]
    with pytest.raises(ValueError, match="example 0 has 150 tokens"):
        pack_dataset(examples, CAPACITY, progress=False)
    split = pack_dataset(datasets.Dataset.from_list(examples), CAPACITY, overlong="split", progress=False)
    assert sorted(examples_of(split)) == [list(range(64)), list(range(64, 128)), list(range(128, 150)), [200]]
    dropped = pack_dataset(examples, CAPACITY, overlong="drop", progress=False)
    assert examples_of([dropped[0]]) == [[200]]
    assert dropped.plan.dropped.tolist() == [0]


def test_a_plan_is_saved_reused_and_refused_for_other_data(tmp_path):
    examples, path = make(), tmp_path / "plan.pt"
    first = pack_dataset(examples, CAPACITY, plan=path, seed=5, progress=False)
    again = pack_dataset(datasets.Dataset.from_list(examples), CAPACITY, plan=path, progress=False)
    assert as_lists(again) == as_lists(first[i] for i in range(len(first)))
    with pytest.raises(ValueError, match="the plan was made for other data"):
        pack_dataset(examples[::-1], CAPACITY, plan=path, progress=False)
    with pytest.raises(ValueError, match="the plan has a capacity of 64, asked for is 128"):
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


def test_columns_that_are_not_of_tokens_are_named():
    table = datasets.Dataset.from_list([{"input_ids": [1, 2], "text": "a b"}])
    with pytest.raises(Exception, match="field 'text' must hold one number per token"):
        pack_dataset(table, CAPACITY, progress=False)
    with pytest.raises(ValueError, match="dataset has no column input_ids, only text"):
        pack_dataset(datasets.Dataset.from_dict({"text": ["a"]}), CAPACITY, progress=False)
    with pytest.raises(TypeError, match="example 0 must be a mapping with input_ids, got str"):
        pack_dataset(["a"], CAPACITY, progress=False)


def test_a_stream_takes_no_plan():
    with pytest.raises(ValueError, match="leave out lengths, plan, num_proc and any method"):
        pack_dataset({}.values(), CAPACITY, plan="plan.pt")


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
