"""PackedStream: every example once an epoch whatever was read before, exact resumption over any kind of examples."""

import copy
import itertools
import json
import pickle
import random

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from packattn import PackingCollator, pack_dataset
from packattn.data import PackedStream

CAPACITY = 16
LENGTHS = [1 + number * 7 % 14 for number in range(40)]
EXAMPLES = [{"input_ids": [number] * length} for number, length in enumerate(LENGTHS)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def dataset(start=0, stop=40, shards=4):
    return datasets.Dataset.from_list(EXAMPLES[start:stop]).to_iterable_dataset(num_shards=shards)


def generated(shards):
    for shard in shards:
        yield from EXAMPLES[10 * shard : 10 * shard + 10]


class Shuffled:
    """Another order in every epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from random.Random(self.epoch).sample(EXAMPLES, len(EXAMPLES))


class KeepsItsPlace:
    """Goes on where it stands, as torchdata's examples of a stateful data set do."""

    at = 0

    def __iter__(self):
        while self.at < len(EXAMPLES):
            self.at += 1
            yield EXAMPLES[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


KINDS = {
    "list": lambda: EXAMPLES,
    "values": lambda: dict(enumerate(EXAMPLES)).values(),
    "set_epoch": Shuffled,
    "keeps its place": KeepsItsPlace,
    "datasets": dataset,
    "generator": lambda: datasets.IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 1, 2, 3]}),
    "shuffle": lambda: dataset().shuffle(seed=1, buffer_size=16),
    "interleave": lambda: datasets.interleave_datasets(
        [dataset(0, 25, 2), dataset(25, 40, 2)], probabilities=[0.3, 0.7], seed=5, stopping_strategy="all_exhausted"
    ),
    "concatenate": lambda: datasets.concatenate_datasets([dataset(0, 25), dataset(25, 40)]).shuffle(2, buffer_size=5),
    "filter": lambda: dataset().filter(lambda example: example["input_ids"][0] % 3),
    "map": lambda: dataset().map(lambda rows: {"input_ids": [ids + [7] for ids in rows["input_ids"]]}, batched=True),
    "batch": lambda: dataset().batch(3).map(lambda row: {"input_ids": joined(row["input_ids"])[:CAPACITY]}),
    "take": lambda: dataset().shuffle(seed=1, buffer_size=16).skip(3).take(30),
    "torch": lambda: dataset().with_format("torch"),
    "split": lambda: split_dataset_by_node(dataset(), 1, 2),
}
OPTIONS = {"a pass": {}, "rows": {"rows_per_epoch": 9}}
with_everything = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:so that all of 2 ranks")


def tokens(rows):
    return [torch.as_tensor(row["input_ids"]).tolist() for row in rows]


def make(kind, **options):
    return PackedStream(KINDS[kind](), CAPACITY, open_bins=4, **options)


def epochs(stream, count=3):
    found = []
    for epoch in range(count):
        stream.set_epoch(epoch)
        found.append(tokens(stream))
    return found


@with_everything
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_resumes_exactly_over_every_kind_of_examples(kind, options):
    uncut = epochs(make(kind, **options))
    for epoch, stop in itertools.product((0, 2), (0, 1, 3, 5)):
        first = make(kind, **options)
        first.set_epoch(epoch)
        rows = iter(first)
        head = tokens(next(rows) for _ in range(stop))
        state = json.loads(json.dumps(first.state_dict()))
        assert head + tokens(rows) == uncut[epoch]  # taking a state changes nothing
        second = make(kind, **options)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert head + tokens(second) == uncut[epoch]
        second.set_epoch(1)
        assert tokens(second) == uncut[1]


def test_a_stream_resumes_at_the_first_the_last_and_every_other_row_of_three_epochs():
    uncut = joined(epochs(make("shuffle", rows_per_epoch=9)))
    first, states = make("shuffle", rows_per_epoch=9), []
    for _ in range(3):
        states += [first.state_dict() for _ in first]
    for stop, state in enumerate(states, 1):
        second = make("shuffle", rows_per_epoch=9)
        second.load_state_dict(state)
        left = [tokens(second) for _ in range(4 - -(-stop // 9))]
        assert joined(left) == uncut[stop:], stop


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_holds_every_example_once_whatever_was_read_before(kind):
    examples = KINDS[kind]()
    for epoch, rows in enumerate(epochs(make(kind))):
        fresh = KINDS[kind]() if kind != "split" else dataset()
        if hasattr(fresh, "set_epoch"):
            fresh.set_epoch(epoch)
        found = sorted(joined(rows))
        if kind == "split":
            assert found
        else:
            assert found == sorted(joined(tokens(fresh)))
    if kind != "keeps its place":
        list(itertools.islice(examples, 7))
    if isinstance(examples, datasets.IterableDataset):
        examples.load_state_dict(examples.state_dict())
    before = examples.state_dict() if hasattr(examples, "state_dict") else None
    packed = PackedStream(examples, CAPACITY, open_bins=4)
    next(iter(packed))
    assert epochs(packed, 2) == epochs(make(kind), 2)
    assert (examples.state_dict() if hasattr(examples, "state_dict") else None) == before
    assert getattr(examples, "_epoch", 0) == 0


@with_everything
def test_iterations_over_one_stream_do_not_disturb_each_other(options):
    packed, uncut = make("generator", **options), epochs(make("generator", **options))
    for epoch in (0, 1):
        packed.set_epoch(epoch)
        one, other = iter(packed), iter(packed)
        first, second = tokens(itertools.islice(one, 2)), []
        for row in other:
            second += tokens([row])
            first += tokens(itertools.islice(one, 1))
        assert first == second == uncut[epoch]


def test_a_stream_does_not_disturb_who_reads_the_same_data_set():
    found = []
    for packs in (False, True):
        examples = KINDS["generator"]()
        reader = iter(examples)
        list(itertools.islice(reader, 3))
        if packs:
            next(iter(PackedStream(examples, CAPACITY)))
        list(itertools.islice(reader, 9))
        found.append(examples.state_dict())
    assert found[0] == found[1]


def test_a_copy_of_a_stream_begins_at_the_beginning():
    packed = make("shuffle")
    next(iter(packed))
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(make("list")))):
        assert len(tokens(copied)) == len(tokens(copied)) > 0
    assert tokens(copy.deepcopy(packed)) == tokens(make("shuffle"))


def test_rows_of_an_epoch_go_on_where_the_one_before_ended():
    every = make("set_epoch")
    passes = joined(epochs(every, 4))
    packed = make("set_epoch", rows_per_epoch=7)
    assert len(packed) == 7
    found = [tokens(packed) for _ in range(5)]
    assert joined(found) == passes[:35]
    assert packed.waiting + packed.taken > 0
    for epoch in (3, 0, 4):  # in any order: what an epoch holds depends on its number alone
        packed.set_epoch(epoch)
        assert tokens(packed) == found[epoch]
    next(iter(packed))  # an epoch that is left begins again
    packed.set_epoch(2)
    list(itertools.islice(packed, 3))
    assert tokens(packed) == found[2]


def test_endless_examples_have_epochs():
    class Endless:
        def __iter__(self):
            for number in itertools.count():
                yield {"input_ids": [number] * (1 + number % 9)}

    packed = PackedStream(Endless(), CAPACITY, rows_per_epoch=50, open_bins=4)
    first, second = tokens(packed), tokens(packed)
    assert first + second == tokens(itertools.islice(PackedStream(Endless(), CAPACITY, open_bins=4), 100))


def saved(kind="shuffle", rows=4, **options):
    packed = make(kind, **options)
    list(itertools.islice(packed, rows))
    return packed.state_dict()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make("list"), "are not the same now, or come in another order"),
        (
            lambda: PackedStream(dataset().shuffle(seed=2, buffer_size=16), CAPACITY, open_bins=4),
            "are not the same now",
        ),
        (lambda: PackedStream(EXAMPLES[:5], CAPACITY, open_bins=4), "are not the same now"),
        (lambda: PackedStream([], CAPACITY, open_bins=4), "are not the same now"),
        (lambda: make("shuffle", rows_per_epoch=9), "rows_per_epoch=None, this stream has rows_per_epoch=9"),
        (lambda: PackedStream(EXAMPLES, CAPACITY), "open_bins=4, this stream has open_bins=64"),
        (lambda: make("shuffle", max_per_bin=3), "limits="),
        (lambda: make("shuffle", overlong="drop"), "overlong='error', this stream has overlong='drop'"),
        (lambda: make("shuffle", collator=PackingCollator(2)), "collator='PackingCollator"),
        (lambda: make("shuffle", num_replicas=2), "ranks=1, this stream has ranks=2"),
    ],
)
def test_a_state_of_other_examples_or_options_is_refused(other, message):
    stream = other()
    with pytest.raises(ValueError, match=message):  # noqa: PT012  (some differ only in what is read)
        stream.load_state_dict(saved())
        list(stream)


def test_a_state_of_another_epoch_is_refused():
    state = saved("set_epoch")
    packed = make("set_epoch")
    packed.set_epoch(2)
    first = make("set_epoch")
    first.set_epoch(1)
    list(itertools.islice(first, 3))
    with pytest.raises(ValueError, match=r"saved in epoch 1, and the epoch was set to 2; call set_epoch\(1\)"):
        packed.load_state_dict(first.state_dict())
    packed = make("set_epoch")
    packed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="saved in epoch 1, and the epoch was set to 0"):
        packed.set_epoch(0)
    packed = make("set_epoch")
    packed.set_epoch(3)
    packed.load_state_dict(state)  # of no epoch: the order is compared as it is read
    with pytest.raises(ValueError, match="are not the same now"):
        list(packed)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [(None, TypeError, "got NoneType"), ({}, ValueError, "lacks limits, open_bins"), ([1], TypeError, "got list")],
)
def test_what_is_no_state_is_named(state, error, message):
    with pytest.raises(error, match=message):
        make("list").load_state_dict(state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", -1, "rows of the state must be an int of at least 0, got -1"),
        ("rows", 10**9, "state has rows=1000000000 and pass_rows="),
        ("taken", "3", "taken of the state must be an int, got '3'"),
        ("epoch", -2, "epoch of the state must be an int of at least 0"),
        ("ended", 1, "ended of the state must be True or False, got 1"),
    ],
)
def test_a_field_that_cannot_be_is_named_and_makes_no_empty_epoch(field, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make("shuffle").load_state_dict({**saved(), field: value})


def test_examples_that_can_be_read_only_once_are_refused():
    class Once:
        def __init__(self, give):
            self.left, self.give = iter(EXAMPLES), give

        def __iter__(self):
            return self.give(self.left)

    for give, said in (
        (lambda left: left, "gives the same list_iterator"),
        (lambda left: (e for e in left), "has none"),
    ):
        packed = PackedStream(Once(give), CAPACITY)
        list(packed)
        with pytest.raises(ValueError, match=f"examples can be read only once: .*{said}"):
            list(packed)


def test_examples_that_give_no_row_end_no_epoch_in_silence():
    with pytest.raises(ValueError, match=r"rows_per_epoch=3 rows were asked for, and a whole pass .* gave none"):
        list(PackedStream([], CAPACITY, rows_per_epoch=3))
    assert list(PackedStream([], CAPACITY)) == []


def batches(loader):
    return [batch["input_ids"][0].tolist() for batch in loader]


def load(kind, workers, loader=DataLoader, **options):
    persistent = options.pop("persistent_workers", False)
    packed = make(kind, **options)
    return packed, loader(
        packed, num_workers=workers, collate_fn=PackingCollator(), persistent_workers=persistent and workers > 0
    )


def test_workers_share_the_rows_of_an_epoch():
    kind = "shuffle"
    packed, loader = load(kind, 2, rows_per_epoch=7)
    found = batches(loader)
    assert len(found) == len(loader) == 7
    with pytest.raises(RuntimeError, match=r"call set_epoch\(epoch\) of the stream before every epoch"):
        batches(loader)
    packed.set_epoch(1)
    second = batches(loader)
    packed, loader = load(kind, 2, rows_per_epoch=7, persistent_workers=True)
    assert [batches(loader), batches(loader)] == [found, second]
    packed.set_epoch(0)  # reaches workers that live on
    assert batches(loader) == found
    with pytest.raises(RuntimeError, match="workers of a loader read the stream"):
        packed.state_dict()


@pytest.mark.parametrize("options", [{}, {"rows_per_epoch": 10}], ids=["a pass", "rows"])
def test_stateful_workers_resume_a_shuffled_stream_and_another_number_of_workers_is_refused(options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    packed, loader = load("shuffle", 2, StatefulDataLoader, **options)
    packed.set_epoch(1)
    rows = iter(loader)
    head = batches(next(rows) for _ in range(5))
    state = loader.state_dict()
    uncut = head + batches(rows)
    packed, loader = load("shuffle", 2, StatefulDataLoader, **options)
    loader.load_state_dict(state)
    assert head + batches(loader) == uncut
    packed, _ = load("shuffle", 0, **options)
    workers = state["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
    with pytest.raises(ValueError, match="saved with workers=2, this stream has workers=0"):
        packed.load_state_dict(workers)
    _, loader = load("shuffle", 1, StatefulDataLoader, **options)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with workers=2, this stream has workers=1"):
        list(loader)
    packed, loader = load("shuffle", 2, **options)
    packed.load_state_dict(saved(**options))
    with pytest.raises(ValueError, match="saved with workers=0, this stream has workers=2"):
        batches(loader)


def test_a_stream_counts_what_it_splits_and_drops():
    examples = [{"input_ids": list(range(n))} for n in (150, 10, 70)]
    packed = PackedStream(examples, 64, overlong="split")
    assert sum(len(row["input_ids"]) for row in packed) == 230
    assert (packed.split, packed.dropped, packed.taken, packed.waiting) == (2, 0, 3, 0)
    packed = PackedStream(examples, 64, overlong="drop")
    assert [len(row["input_ids"]) for row in packed] == [10]
    assert (packed.split, packed.dropped, packed.dropped_tokens) == (0, 2, 220)


@pytest.mark.parametrize(
    ("examples", "options", "error", "message"),
    [
        ([{"input_ids": [1] * 70}], {}, ValueError, "example 0 has 70 tokens where a bin takes at most 16"),
        ([{"input_ids": [1]}, {"input_ids": []}], {}, ValueError, "example 1, field 'input_ids' is empty"),
        ([[1, 2]], {}, TypeError, "example 0 must be a mapping with input_ids, got list"),
        ([{"input_ids": [1]}, None], {}, TypeError, "example 1 must be a mapping with input_ids, got NoneType"),
        ([], {"open_bins": 0}, ValueError, "open_bins must be an int of at least 1"),
        ([], {"rows_per_epoch": 0}, ValueError, "rows_per_epoch must be an int of at least 1"),
        ([], {"num_replicas": 2, "rank": 2}, ValueError, "rank must be an int from 0 to 1"),
        ([], {"overlong": "cut"}, ValueError, "overlong must be one of error, split, drop"),
        (iter([]), {}, TypeError, "iterable again in every epoch, got an iterator"),
        ({"input_ids": [[1, 2]]}, {}, TypeError, r"got a dict, which iterates over its keys \('input_ids'"),
        (3, {}, TypeError, "examples must be iterable, got int"),
    ],
)
def test_law_10_what_cannot_be_streamed_is_named(examples, options, error, message):
    with pytest.raises(error, match=message):
        list(PackedStream(examples, CAPACITY, **options))


def test_what_has_no_length_is_packed_as_a_stream():
    assert tokens(pack_dataset(dataset(), CAPACITY, open_bins=4)) == epochs(make("datasets"), 1)[0]
    with pytest.raises(TypeError, match="rows_per_epoch states it"):
        len(make("list"))
    assert bool(make("list"))
