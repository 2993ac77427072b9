"""pack_dataset and PackedStream: every token once, the same rows from every kind of data, resumption bit by bit."""

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
from packattn.data import PackedDataset, PackedStream, PackingPlan, PackRows

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


class Source:
    """Something to iterate over and nothing else."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


SOURCES = {
    "iterable": Source,
    "datasets": lambda examples: datasets.Dataset.from_list(examples).to_iterable_dataset(num_shards=4),
    "shuffled datasets": lambda examples: (
        datasets.Dataset.from_list(examples).to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=10)
    ),
}


def stream(kind, **options):
    return pack_dataset(SOURCES[kind](make()), CAPACITY, open_bins=5, max_per_bin=6, **options)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_packs_everything_once_and_every_epoch_anew(kind):
    packed = stream(kind)
    assert isinstance(packed, PackedStream)
    rows = list(packed)
    assert sorted(examples_of(rows)) == tokens_of(make())
    assert max(len(row["input_ids"]) for row in rows) <= CAPACITY
    assert as_lists(packed) == as_lists(rows)


@pytest.mark.parametrize("kind", ["iterable", "datasets"])
def test_a_stream_goes_on_bit_by_bit_wherever_it_was_stopped(kind, tmp_path):
    expected = as_lists(stream(kind))
    for stop in (0, 1, 2, 7, len(expected) - 3, len(expected)):
        first = stream(kind)
        iterator = iter(first)
        taken = as_lists(next(iterator) for _ in range(stop))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = stream(kind)
        second.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert second.state_dict() == first.state_dict()
        assert taken + as_lists(second) == expected
        assert as_lists(second) == expected
    with pytest.raises(ValueError, match="open_bins=5, this stream has open_bins=6"):
        PackedStream(Source([]), CAPACITY, open_bins=6, max_per_bin=6).load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["iterable", "datasets"])
def test_workers_share_a_stream_and_stateful_data_loader_resumes_it(kind):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def load():
        return StatefulDataLoader(stream(kind), batch_size=1, num_workers=2, collate_fn=PackingCollator())

    expected = [{name: values[0].tolist() for name, values in batch.items()} for batch in load()]
    assert sorted(examples_of(expected)) == tokens_of(make())
    loader = load()
    iterator = iter(loader)
    taken = [{name: values[0].tolist() for name, values in next(iterator).items()} for _ in range(9)]
    state = loader.state_dict()
    del iterator
    resumed = load()
    resumed.load_state_dict(state)
    left = [{name: values[0].tolist() for name, values in batch.items()} for batch in resumed]
    assert taken + left == expected


def test_a_stream_counts_what_it_splits_and_drops():
    examples = [{"input_ids": list(range(n))} for n in (150, 10, 70)]
    packed = PackedStream(examples, CAPACITY, overlong="split")
    assert sum(len(row["input_ids"]) for row in packed) == 230
    assert (packed.split, packed.dropped) == (2, 0)
    packed = PackedStream(examples, CAPACITY, overlong="drop")
    assert [len(row["input_ids"]) for row in packed] == [10]
    assert (packed.split, packed.dropped, packed.dropped_tokens) == (0, 2, 220)


@pytest.mark.parametrize(
    ("examples", "options", "error", "message"),
    [
        ([{"input_ids": [1] * 70}], {}, ValueError, "example 0 has 70 tokens where a bin takes at most 64"),
        ([{"input_ids": [1]}, {"input_ids": []}], {}, ValueError, "example 1 is empty"),
        ([[1, 2]], {}, TypeError, "example 0 must be a mapping with input_ids, got list"),
        ([], {"open_bins": 0}, ValueError, "open_bins must be an int of at least 1"),
        ([], {"overlong": "cut"}, ValueError, "overlong must be one of error, split, drop"),
        (iter([]), {}, TypeError, "iterable again in every epoch, got an iterator"),
        (3, {}, TypeError, "examples must be iterable, got int"),
    ],
)
def test_law_10_what_cannot_be_streamed_is_named(examples, options, error, message):
    with pytest.raises(error, match=message):
        list(PackedStream(examples, CAPACITY, **options))


def test_a_stream_takes_no_plan():
    with pytest.raises(ValueError, match="leave out lengths, plan, num_proc and any method"):
        pack_dataset(Source([]), CAPACITY, plan="plan.pt")


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
