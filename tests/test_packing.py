"""Packers: nothing is lost, nothing overflows, C++ equals Python, plans survive the disk, bad input is named."""

import dataclasses
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import packattn
from packattn import PackedMask
from packattn.data import PackingPlan, fit, pack_histogram
from packattn.data.fit import Bin, Limits
from packattn.data.packing import lengths_tensor

METHODS = ["mixed", "first-fit", "best-fit", "next-fit", "best-fit-decreasing"]
LIMITS = [Limits(64), Limits(64, 3), Limits(64, 0, 1500), Limits(64, 5, 1500), Limits(1), Limits(1000)]


def draw(seed, limits, n=300):
    generator = random.Random(seed)
    most = Bin().room(limits)
    return [min(most, 1 + int(generator.expovariate(1 / 20))) for _ in range(n)]


def contents(plan):
    return [[(piece.example, piece.start, piece.stop) for piece in bin_] for bin_ in plan]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_example_lies_in_one_bin_and_no_bin_overflows(method, limits):
    for seed in range(5):
        lengths = draw(seed, limits)
        plan = packattn.pack(
            lengths, limits.capacity, method=method, seed=seed if seed else None,
            max_per_bin=limits.max_per_bin or None, max_square=limits.max_square or None, open_bins=4,
        )  # fmt: skip
        packed = [piece for bin_ in plan for piece in bin_]
        assert sorted(piece.example for piece in packed) == list(range(len(lengths)))
        assert all((piece.start, piece.stop) == (0, lengths[piece.example]) for piece in packed)
        for bin_ in plan:
            sizes = [piece.stop - piece.start for piece in bin_]
            assert 0 < sum(sizes) <= limits.capacity
            assert not limits.max_per_bin or len(sizes) <= limits.max_per_bin
            assert not limits.max_square or sum(size**2 for size in sizes) <= limits.max_square
        assert plan.tokens == sum(lengths)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_compiled_walks_equal_their_python_twins(limits):
    for seed in range(5):
        lengths = torch.tensor(draw(seed, limits, 2000))
        assert torch.equal(torch.ops.packattn.pack_first_fit(lengths, *limits), fit.first_fit(lengths, *limits))
        for open_bins in (0, 1, 7):
            compiled = torch.ops.packattn.pack_best_fit(lengths, *limits, open_bins)
            assert torch.equal(compiled, fit.best_fit(lengths, *limits, open_bins))


def test_the_walks_are_what_their_names_say():
    lengths = draw(1, Limits(64), 400)
    room: list[int] = []
    first, best, following = [], [], []
    for length in lengths:
        at = next((bin_ for bin_, left in enumerate(room) if left >= length), len(room))
        room[at : at + 1] = [(room[at] if at < len(room) else 64) - length]
        first.append(at)
    assert torch.ops.packattn.pack_first_fit(torch.tensor(lengths), 64, 0, 0).tolist() == first
    room = []
    for length in lengths:
        fits = [left for left in room if left >= length]
        best.append(min(fits) if fits else 64)
        if fits:
            room.remove(min(fits))
        room.append(best[-1] - length)
    bins = torch.ops.packattn.pack_best_fit(torch.tensor(lengths), 64, 0, 0, 0).tolist()
    filled = dict.fromkeys(bins, 64)
    for bin_, length, before in zip(bins, lengths, best, strict=True):
        assert filled[bin_] == before
        filled[bin_] -= length
    used = 0
    for length in lengths:
        used = used + length if used and used + length <= 64 else length
        following.append((following[-1] if following else -1) + (used == length))
    assert torch.ops.packattn.pack_best_fit(torch.tensor(lengths), 64, 0, 0, 1).tolist() == following


@pytest.mark.parametrize("limits", [Limits(64), Limits(1000)], ids=str)
def test_the_histogram_makes_the_bins_of_best_fit_on_the_sorted_lengths(limits):
    lengths = sorted(draw(3, limits, 3000), reverse=True)
    walked = torch.bincount(torch.ops.packattn.pack_best_fit(torch.tensor(lengths), *limits, 0), torch.tensor(lengths))
    plan = packattn.pack(lengths, limits.capacity, method="best-fit-decreasing")
    assert plan.per_bin(plan.lengths).sort().values.tolist() == walked.long().sort().values.tolist()


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_histogram_plan_says_what_its_bins_hold_and_assigns_in_parts(limits):
    lengths = torch.tensor(draw(4, limits, 2000))
    counts = {int(size): int((lengths == size).sum()) for size in lengths.unique()}
    plan = pack_histogram(counts, limits.capacity, max_per_bin=limits.max_per_bin or None,
                          max_square=limits.max_square or None)  # fmt: skip
    assert plan.tokens == int(lengths.sum())
    compositions = plan.compositions()
    assert sum(times for _, times in compositions) == plan.num_bins
    totals = dict.fromkeys(counts, 0)
    for composition, times in compositions:
        assert sum(length * count for length, count in composition.items()) <= limits.capacity
        for length, count in composition.items():
            totals[length] += times * count
    assert totals == counts
    whole, seen = plan.assign(lengths), {}
    parts = torch.cat([plan.assign(part, seen) for part in lengths.split(123)])
    assert torch.equal(whole, parts)
    with pytest.raises(ValueError, match="the histogram"):
        plan.assign(lengths[:1], seen)


def test_a_billion_examples_cost_what_their_different_lengths_cost():
    counts = {length: 1_000_000 - 200 * length for length in range(1, 4096)}
    plan = pack_histogram(counts, 4096)
    assert sum(counts.values()) > 2_000_000_000
    assert plan.length.numel() < 20_000
    assert plan.fill > 0.999


def test_packing_depends_on_nothing_but_its_arguments():
    lengths = draw(5, Limits(64))
    assert contents(packattn.pack(lengths, 64, seed=3)) == contents(packattn.pack(torch.tensor(lengths), 64, seed=3))
    assert contents(packattn.pack(lengths, 64, seed=3)) != contents(packattn.pack(lengths, 64, seed=4))
    assert contents(packattn.pack(np.array(lengths, dtype=np.uint16), 64)) == contents(packattn.pack(iter(lengths), 64))


def test_long_examples_are_split_or_dropped_by_choice_and_counted():
    lengths = [70, 10, 129, 64, 5]
    split = packattn.pack(lengths, 64, overlong="split")
    pieces = sorted(piece for bin_ in split for piece in bin_)
    assert [tuple(piece) for piece in pieces] == [
        (0, 0, 64), (0, 64, 70), (1, 0, 10), (2, 0, 64), (2, 64, 128), (2, 128, 129), (3, 0, 64), (4, 0, 5),
    ]  # fmt: skip
    assert split.num_split == 2
    assert "2 examples split" in repr(split)
    dropped = packattn.pack(lengths, 64, overlong="drop")
    assert dropped.dropped.tolist() == [0, 2]
    assert dropped.dropped_tokens == 199
    assert sorted(piece.example for bin_ in dropped for piece in bin_) == [1, 3, 4]
    assert "2 examples dropped (199 tokens)" in repr(dropped)
    with pytest.raises(ValueError, match=r"example 0 has 70 tokens where a bin takes at most 64, and 1 more"):
        packattn.pack(lengths, 64)
    with pytest.raises(ValueError, match="a bin takes at most 8"):
        packattn.pack([9], 64, max_square=64)
    with pytest.raises(ValueError, match="all 1 examples are longer"):
        packattn.pack([65], 64, overlong="drop")


def test_a_saved_plan_is_the_same_plan_and_belongs_to_its_data(tmp_path):
    lengths = draw(6, Limits(64))
    plan = packattn.pack([*lengths, 100], 64, overlong="split")
    plan.save(tmp_path / "plan.pt")
    loaded = PackingPlan.load(tmp_path / "plan.pt")
    assert contents(loaded) == contents(plan)
    assert loaded.made_by == plan.made_by
    assert repr(loaded) == repr(plan)
    loaded.check(lengths_tensor([*lengths, 100]))
    with pytest.raises(ValueError, match="the plan was made for other data"):
        loaded.check(lengths_tensor([*lengths, 99]))
    (tmp_path / "broken.pt").write_bytes((tmp_path / "plan.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a packing plan"):
        PackingPlan.load(tmp_path / "broken.pt")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["broken.pt", "plan.pt"]


@pytest.mark.parametrize(
    ("field", "damage", "message"),
    [
        ("examples", lambda t: t.scatter(0, torch.tensor(2), -1), "of 4 examples one has the number -1"),
        ("examples", lambda t: t.scatter(0, torch.tensor(2), 4), "of 4 examples one has the number 4"),
        ("examples", lambda t: t[0].expand(t.numel()).clone(), "example . is there 0 times"),
        ("lengths", lambda t: t - 1, "piece . has no tokens|example . lacks tokens, or has some twice"),
        ("lengths", lambda t: t + 60, "bin 0 holds more than the capacity of 64 tokens"),
        ("lengths", lambda t: t[1:], "5 pieces have 4 lengths and 5 starts"),
        ("offsets", lambda t: t.flip(0), "its offsets do not rise from 0 to the number of pieces"),
        ("offsets", lambda t: t[:-1], "its offsets do not rise from 0 to the number of pieces"),
        ("starts", lambda t: t * 2, "example 3 lacks tokens, or has some twice"),
        ("starts", lambda t: t + 1, "no piece begins an example"),
        ("starts", lambda t: None, "example 3 is there 2 times"),
        ("starts", lambda t: t.float(), "its tensors are not int64 of one dimension"),
        ("dropped", lambda t: torch.tensor([0]), "example 0 is there 2 times"),
        ("dropped", lambda t: None, "its tensors are not int64 of one dimension"),
        ("capacity", lambda c: "64", "its capacity is no int"),
    ],
)
def test_a_damaged_plan_is_refused(field, damage, message, tmp_path):
    plan = packattn.pack([7, 5, 64, 100], 64, overlong="split")
    plan.check()
    damaged = dataclasses.replace(plan, **{field: damage(getattr(plan, field))})
    damaged.save(tmp_path / "plan.pt")
    with pytest.raises(ValueError, match=f"plan.pt is a damaged packing plan: ({message})"):
        PackingPlan.load(tmp_path / "plan.pt")
    with pytest.raises(ValueError, match=f"the plan is damaged: ({message})"):
        damaged.check(torch.tensor([7, 5, 64, 100]))


def test_a_plan_whose_pieces_are_shorter_than_the_examples_is_refused():
    plan = packattn.pack([7, 5], 64)
    with pytest.raises(ValueError, match="the plan is damaged: its pieces have not the lengths of the examples"):
        dataclasses.replace(plan, lengths=plan.lengths - 1).check(torch.tensor([7, 5]))


@pytest.mark.parametrize(
    "content",
    [b"", b"plan", b"PK\x03\x04 cut off", pickle.dumps({"format": 1}), pickle.dumps(print), 3, [1], {"format": 1}],
)
def test_a_file_that_is_no_plan_is_refused_by_its_name(content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "plan.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "plan.pt")
    with pytest.raises(ValueError, match=r"plan\.pt is not a packing plan of this version"):
        PackingPlan.load(tmp_path / "plan.pt")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    old = packattn.pack([1, 2, 3], 64)
    old.save(tmp_path / "plan.pt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        packattn.pack([4, 5], 64).save(tmp_path / "plan.pt")
    assert contents(PackingPlan.load(tmp_path / "plan.pt")) == contents(old)
    assert len(list(tmp_path.iterdir())) == 1


BAD = [
    (([], 8), {}, ValueError, "at least one length, got none"),
    (([3, -1], 8), {}, ValueError, "example 1 has length -1"),
    (([3, 0], 8), {}, ValueError, r"example 1 is empty.*\(1 of 2 are below 1\)"),
    (([3.0], 8), {}, TypeError, "lengths must be integers, got torch.float32"),
    (([True], 8), {}, TypeError, "lengths must be integers, got torch.bool"),
    (([3, None], 8), {}, TypeError, "lengths must be integers"),
    (("abc", 8), {}, TypeError, "a sequence of integers, got str"),
    (([[1, 2]], 8), {}, ValueError, r"must have shape \(n,\), got \(1, 2\)"),
    (([3], 8.0), {}, TypeError, "capacity must be an int, got 8.0"),
    (([3], 0), {}, ValueError, "capacity must be an int from 1 to 16777216, got 0"),
    (([3], 8), {"method": "best"}, ValueError, "method must be one of mixed, first-fit.*got 'best'"),
    (([3], 8), {"max_per_bin": 0}, ValueError, "max_per_bin must be an int of at least 1"),
    (([3], 8), {"max_square": 0}, ValueError, "max_square must be an int of at least 1"),
    (([3], 8), {"seed": -1}, ValueError, "seed must be an int of at least 0"),
    (([3], 8), {"method": "best-fit", "open_bins": 0}, ValueError, "open_bins must be an int of at least 1"),
    (([9], 8), {"overlong": "cut"}, ValueError, "overlong must be one of error, split, drop, got 'cut'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_law_10_what_cannot_be_packed_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        packattn.pack(*arguments, **options)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ({}, TypeError, "counts must map lengths"),
        ({9: 1}, ValueError, "examples of 9 tokens where a bin takes at most 8"),
        ({3: -1}, ValueError, "the count of length 3 must be an int of at least 0, got -1"),
        ({3: 1.5}, TypeError, "the count of length 3 must be an int"),
        ({0: 1}, ValueError, "a length in counts must be an int of at least 1"),
        ({3: 0}, ValueError, "at least one example, got none"),
    ],
)
def test_law_10_a_histogram_that_cannot_be_packed_is_named(counts, error, message):
    with pytest.raises(error, match=message):
        pack_histogram(counts, 8)


def test_a_bin_is_a_mask():
    plan = packattn.pack(draw(8, Limits(64)), 64)
    mask = PackedMask.causal(lengths=[piece.stop - piece.start for piece in plan[0]])
    assert mask.tokens <= 64
