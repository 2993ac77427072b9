"""PackedStream in Trainer, Accelerate and a plain loop: a resumed run equals an uncut one on 1 and 2 ranks."""

import itertools

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from processes import on_ranks
from stream_loops import EPOCHS, ROWS, Shuffled, by_accelerate, by_hand, by_trainer, every_way, real_tokens, stream

from packattn.data import PackedStream


def rows_of_all_epochs(**options):
    packed = stream(rows_per_epoch=ROWS, **options)
    return [real_tokens(row["input_ids"]) for _ in range(EPOCHS) for row in packed]


EVERYWHERE = range(1, EPOCHS * ROWS)


@pytest.mark.parametrize(
    ("way", "stops"),
    [
        (lambda stops: by_trainer(None, stops), (1, ROWS, 2 * ROWS + 5)),
        (lambda stops: by_accelerate(None, stops), EVERYWHERE),
        (lambda stops: by_accelerate(None, stops, stateful=True), EVERYWHERE),
        (lambda stops: by_hand(0, 1, stops, rows_per_epoch=ROWS), EVERYWHERE),
    ],
    ids=["trainer", "accelerate", "stateful accelerate", "by hand"],
)
def test_a_resumed_run_equals_an_uncut_one_on_one_rank(way, stops):
    uncut, resumed = way(stops)
    assert uncut == rows_of_all_epochs()
    assert resumed == {stop: uncut[stop:] for stop in stops}


def test_a_resumed_run_equals_an_uncut_one_on_two_ranks_and_what_cannot_is_refused():
    stops = (1, 4, 6, 11)  # in every epoch of 4 steps, and at the end of one
    found, refused = on_ranks(2, every_way, stops)
    for way, of_ranks in found.items():
        for uncut, resumed in of_ranks:
            assert len(uncut) == EPOCHS * ROWS // 2, way
            assert resumed == {stop: uncut[stop:] for stop in stops}, way
        dealt = [row for step in zip(*(uncut for uncut, _ in of_ranks), strict=True) for row in step]
        assert dealt == rows_of_all_epochs(), way
    for what, words in {
        "rows of many sizes": ("PackingCollator(pad_to=capacity)", "accelerator_config={'dispatch_batches': False}"),
        "split_batches": ("split_batches=True", "'split_batches': False"),
        "one rank's rows": ("num_replicas", "2 ranks"),
        "odd rows": (f"rows_per_epoch={ROWS + 1} must be a multiple of 2",),
        "stateful": ("use_stateful_dataloader=True", "skip_first_batches"),
        "no number of rows": ("repeats rows of the first step", "rows_per_epoch, a multiple of 2"),
    }.items():
        assert all(word in refused[what] for word in words), (what, refused[what])


def test_a_trainer_that_cannot_know_the_epoch_is_refused():
    uncut, resumed = by_trainer(None, (3,), rows=None, max_steps=14)
    assert resumed[3] == uncut[3:]
    with pytest.raises(ValueError, match=r"resumed after 13 batches, and the epoch has only 10 rows.*rows_per_epoch"):
        by_trainer(None, (13,), rows=None, max_steps=14)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_rank_has_as_many_rows_and_every_example_is_on_one(ranks):
    for epoch in range(3):
        of_ranks = []
        for rank in range(ranks):
            mine = stream(num_replicas=ranks, rank=rank)
            mine.set_epoch(epoch)
            of_ranks.append([real_tokens(row["input_ids"]) for row in mine])
        assert len({len(rows) for rows in of_ranks}) == 1
        tokens = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(of_ranks)))
        assert tokens == sorted(token for example in Shuffled() for token in example["input_ids"])


def test_examples_too_few_for_all_ranks_are_counted():
    examples = [{"input_ids": [number]} for number in range(3)]
    for rank in range(2):
        packed = PackedStream(examples, 1, num_replicas=2, rank=rank)
        with pytest.warns(UserWarning, match="1 examples at the end of the epoch were left out.*2 ranks"):
            assert [row["input_ids"].tolist() for row in packed] == [[rank]]
        assert (packed.left_out, packed.state_dict()["left_out"]) == (1, 1)


def of_rank(rank, ranks, **options):
    examples = datasets.Dataset.from_list(list(Shuffled())).to_iterable_dataset(num_shards=4)
    return PackedStream(split_dataset_by_node(examples, rank, ranks), 16, open_bins=4, **options)


def test_examples_split_by_node_are_read_whole_for_equal_epochs_or_apart_for_stated_ones():
    with pytest.warns(
        UserWarning, match="so that all of 2 ranks have as many rows, each of them reads the examples of"
    ):
        rows = [[real_tokens(row["input_ids"]) for row in of_rank(rank, 2)] for rank in range(2)]
    assert len(rows[0]) == len(rows[1])
    assert sum(map(len, rows[0] + rows[1])) == sum(len(example["input_ids"]) for example in Shuffled())
    apart = [of_rank(rank, 2, rows_per_epoch=7) for rank in range(2)]
    for packed in apart:
        assert len(packed) == 7
        assert [len(list(packed)) for _ in range(3)] == [7, 7, 7]
    state = apart[0].state_dict()
    other = of_rank(0, 4, rows_per_epoch=7)
    with pytest.raises(ValueError, match="saved with ranks=2, this stream has ranks=4"):
        other.load_state_dict(state)
    other = of_rank(1, 2, rows_per_epoch=7)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"examples, which the saved state had packed into .* are not the same now"):
        list(other)
    with pytest.raises(ValueError, match="num_replicas=2 was given, and split_dataset_by_node split the examples"):
        of_rank(0, 2, num_replicas=2)
