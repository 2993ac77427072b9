"""packing_report: its figures are those of a count by hand, and it recommends what they say."""

import json

import pytest

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
    ("change", "error", "message"),
    [
        ({"lengths": []}, ValueError, "at least one length"),
        ({"capacity": 0}, ValueError, "capacity must be an int of at least 1"),
        ({"ranks": 0}, ValueError, "ranks must be an int of at least 1"),
        ({"minibatch": 1.5}, TypeError, "minibatch must be an int"),
    ],
)
def test_law_10_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        packattn.packing_report(**{"lengths": [1], "capacity": 8, **change})
