"""packing_report: its figures are those of a count by hand, and it recommends what they say."""

import itertools
import json

import pytest
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

import packattn
from benchmarks.packs import lengths as real_lengths
from packattn import packing_report
from packattn.data import Cost
from packattn.data.simulate import Setting, balanced, offline, plain, tally


def by_name(report):
    return {approach.name: approach for approach in report.approaches}


def test_padding_is_counted_by_hand():
    setting = Setting(capacity=100, ranks=2, minibatch=2, accumulation=1)
    lengths = [10, 40, 20, 30]
    ((step,),) = plain(lengths, setting, padded=False)
    drawn = [length for batch in step for row in batch for length in row]
    assert sorted(drawn) == sorted(lengths)
    padded = tally(plain(lengths, setting, padded=True), 2, float)
    first, second = max(drawn[:2]), max(drawn[2:])
    assert padded.work == 2 * first + 2 * second
    assert padded.slowest == 2 * max(first, second)
    flat = tally(plain(lengths, setting, padded=False), 2, float)
    assert flat.work == 100
    assert flat.slowest == max(sum(drawn[:2]), sum(drawn[2:]))
    assert flat.least == 50
    report = packing_report(lengths, 100, ranks=2, minibatch=2, accumulation=1, cost=Cost())
    found = by_name(report)
    assert found["padding"].padding == pytest.approx(1 - 100 / padded.work)
    assert found["packing online"].speed_up == pytest.approx(padded.slowest / flat.slowest)
    assert found["balanced packing"].speed_up == pytest.approx(padded.slowest / 50)
    assert found["balanced packing"].token_imbalance == pytest.approx(1.0)


def test_every_approach_takes_the_same_tokens():
    lengths, setting = real_lengths("math")[:4000], Setting(4096, 8, 4, 2)
    for steps in (plain(lengths, setting, padded=False), offline(lengths, setting), balanced(lengths, setting, Cost())):
        assert tally(steps, 8, float).work == sum(lengths)


def test_what_is_longer_than_a_row_is_counted():
    report = packing_report([10, 20, 130, 150], 100, ranks=1, minibatch=1, accumulation=1)
    assert (report.over, report.tokens_cut, report.tokens_dropped) == (2, 80, 280)
    assert "2 examples are longer than a row: cut, they lose 80 tokens (25.8%); dropped, 280 (90.3%)" in str(report)


def test_it_says_that_offline_packing_takes_fewer_steps():
    report = packing_report(real_lengths("short tasks"), 4096)
    found = by_name(report)
    assert found["padding"].steps == found["balanced packing"].steps == 119
    assert found["packing offline"].steps == 24
    assert found["balanced packing"].speed_up > 1.5 * found["packing online"].speed_up
    assert report.recommendation.startswith("Recommended: balanced packing")
    assert "takes 5.0 times fewer optimiser steps (24)" in report.recommendation


def test_it_recommends_no_more_than_is_needed():
    alike = packing_report([100, 101, 102] * 200, 1024, ranks=4, minibatch=4, accumulation=1)
    assert alike.recommendation.startswith("Recommended: padding")
    alone = packing_report(real_lengths("math")[:2000], 4096, ranks=1, minibatch=16, accumulation=1)
    assert alone.recommendation.startswith("Recommended: packing online")


def test_a_large_data_set_is_simulated_in_part():
    lengths = real_lengths("math") * 20
    whole, part = packing_report(real_lengths("math"), 4096), packing_report(lengths, 4096)
    assert by_name(part)["padding"].steps == -(-len(lengths) // 64)
    for one, other in zip(whole.approaches, part.approaches, strict=True):
        assert other.speed_up == pytest.approx(one.speed_up, rel=0.05)


def test_json_and_picture(tmp_path):
    report = packing_report(real_lengths("code instructions"), 4096, ranks=4)
    figures = json.loads(report.to_json())
    assert figures["capacity"] == 4096
    assert figures["approaches"][3]["name"] == "balanced packing"
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    bars = figure.axes[1].patches
    assert max(bar.get_y() + bar.get_height() for bar in bars) <= 4096
    assert len(bars) == sum(len(report.plan[at]) for at in range(40))


@pytest.mark.parametrize(
    ("lengths", "capacity", "options"),
    [
        ("short tasks", 4096, {}),
        ("whole files", 8192, {}),
        ([100] * 8, 4096, {"ranks": 8}),
        ([*range(300, 900, 7)], 1024, {}),
        ([10_000, 99_000], 100_000, {"ranks": 1}),
        ([1, 10**6], 10**6, {"ranks": 1}),
        ([1], 1, {"ranks": 1}),
        ([7, 7], 7, {"ranks": 1}),
    ],
    ids=str,
)
def test_the_labels_of_the_picture_lie_apart_and_within_it(lengths, capacity, options):
    lengths = real_lengths(lengths) if isinstance(lengths, str) else lengths
    figure = packing_report(lengths, capacity, **options).plot()
    figure.canvas.draw()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), axis
            assert not axis.get_minorticklabels()
    for text in figure.axes[2].texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1
    counts = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(counts) == len(lengths)


def test_equal_examples_are_not_faster_packed():
    report = packing_report([100] * 8, 4096, ranks=8)
    found = by_name(report)
    for name in ("packing online", "balanced packing"):
        assert found[name].speed_up == 1.0
        assert found[name].token_imbalance == 1.0
    assert report.recommendation.startswith("Recommended: padding, without packing and without a patch: none of the")


@pytest.mark.parametrize(("n", "ranks", "minibatch", "accumulation"), [(26, 4, 3, 2), (8, 8, 4, 2), (50, 2, 2, 4)])
def test_a_plain_run_deals_every_step_as_distributed_sampler_does(n, ranks, minibatch, accumulation):
    setting = Setting(10**6, ranks, minibatch, accumulation, seed=5)
    lengths = [10**3 + i for i in range(n)]
    mine = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(n), ranks, rank, seed=5)
        mine.append(list(BatchSampler([10**3 + i for i in sampler], minibatch, False)))
    expected = [[[row] for row in batches] for batches in zip(*mine, strict=True)]
    steps = list(plain(lengths, setting, padded=False))
    assert [batches for step in steps for batches in step] == expected
    assert [len(step) for step in steps[:-1]] == [accumulation] * (len(steps) - 1)
    padded = list(plain(lengths, setting, padded=True))
    for step, wider in zip(steps, padded, strict=True):
        for batches, rows in zip(step, wider, strict=True):
            assert rows == [[[max(row)]] * len(row) for (row,) in batches]


EXAMPLES = [
    {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]},
    {"input_ids": [4], "labels": [4]},
    {"input_ids": [5, 6], "labels": [5, 6]},
]


@pytest.mark.parametrize("kind", ["list", "datasets", "lengths"])
def test_examples_and_rows_without_a_target_are_counted(kind):
    if kind == "lengths":
        report = packing_report([3, 1, 2], 4, ranks=1, targets=[0, 0, 1])
    else:
        datasets = pytest.importorskip("datasets")
        report = packing_report(EXAMPLES if kind == "list" else datasets.Dataset.from_list(EXAMPLES), 4, ranks=1)
    assert report.lengths.tolist() == [3, 1, 2]
    assert (report.without_target, report.rows_without_target) == (2, 1)
    assert "2 examples have no target, and with them 1 row: nothing is learnt from them" in str(report)
    assert json.loads(report.to_json())["rows_without_target"] == 1


def test_without_labels_every_token_but_the_first_is_a_target():
    assert packing_report([{"input_ids": [1, 2]}, {"input_ids": [3]}], 4).without_target == 1
    report = packing_report([2, 1], 4)
    assert report.without_target is None
    assert "target" not in str(report)


def test_a_part_of_a_pandas_column_is_taken_as_lengths():
    column = pytest.importorskip("pandas").Series([9, 3, 4, 5])
    part = column[column < 9]  # whose index begins at 1
    assert packing_report(part, 8, ranks=1).lengths.tolist() == [3, 4, 5]
    assert packing_report(column.to_numpy()[::-1], 9, ranks=1).lengths.tolist() == [5, 4, 3, 9]


def test_one_is_not_many():
    said = str(packing_report([12], 12, ranks=1, targets=[0]))
    assert said.startswith("1 example, 12 tokens;")
    assert "rows of 12 tokens: 1 bin, 100.00% full, 1.0 examples each" in said
    assert "\n0 examples are longer than a row\n1 example has no target, and with them 1 row:" in said
    assert "1 rank x mini-batch" in said
    assert "1 example is longer than a row: cut" in str(packing_report([13, 5], 12))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": []}, ValueError, "at least one length"),
        ({"capacity": 0}, ValueError, "capacity must be an int of at least 1"),
        ({"ranks": 0}, ValueError, "ranks must be an int of at least 1"),
        ({"minibatch": 1.5}, TypeError, "minibatch must be an int"),
        ({"lengths": {"train": [1]}}, TypeError, "got a dict with train; give one of its splits or columns"),
        ({"lengths": iter(EXAMPLES)}, TypeError, r"cannot count a stream \(list_iterator\), which may have no end"),
        ({"lengths": EXAMPLES, "targets": [1, 2, 3]}, ValueError, "targets are counted where"),
        ({"targets": [1, 2]}, ValueError, "targets must hold one number for each of 1 lengths, got 2"),
        ({"targets": [-1]}, ValueError, "targets must hold numbers of at least 0, got -1"),
        ({"targets": [0.5]}, TypeError, "targets must be integers"),
    ],
)
def test_law_10_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        packattn.packing_report(**{"lengths": [1], "capacity": 8, **change})
