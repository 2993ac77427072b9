"""The boundary rule: the C++ operator, its torch twin, and a plain loop agree; transformers draws the same lines."""

import pytest
import torch
from boundary_cases import obvious, random_rows
from transformers.masking_utils import find_packed_sequence_indices

import packattn
from packattn.boundaries import boundaries_torch

IMPLEMENTATIONS = [boundaries_torch, torch.ops.packattn.boundaries]


def assert_agree(position_ids, attention_mask=None):
    expected = obvious(position_ids, attention_mask)
    for implementation in IMPLEMENTATIONS:
        for name, one, other in zip(
            packattn.Boundaries._fields, implementation(position_ids, attention_mask), expected, strict=True
        ):
            assert one.dtype == torch.int32
            assert torch.equal(one, other), f"{implementation}: {name}: {one.tolist()}, wanted {other.tolist()}"


@pytest.mark.parametrize(
    ("positions", "cu_seqlens"),
    [
        ([0, 1, 2, 0, 1, 0, 1, 2], [0, 3, 5, 8]),
        ([0, 0, 1, 2], [0, 1, 4]),
        ([0, 1, 2, 0, 1, 0, 0, 0], [0, 3, 5, 6, 7, 8]),
        ([0, 1, 2, 0, 1, 2, 3, 4], [0, 3, 8]),
        ([2, 3, 4, 2, 3, 2], [0, 3, 5, 6]),
        ([3, 4, 5, 3, 4], [0, 3, 5]),
        ([5, 6, 7, 0, 1, 2], [0, 3, 6]),
        ([4, 5, 6, 2, 3], [0, 3, 5]),
        ([7, 8, 9, 10], [0, 4]),
        ([0, 1, 5, 6, 0, 1], [0, 2, 4, 6]),
        ([0, 1, 2, 10, 11], [0, 3, 5]),
        ([0, 1, 1, 1, 2, 3], [0, 2, 3, 6]),
        ([9], [0, 1]),
    ],
)
def test_named_rows(positions, cu_seqlens):
    position_ids = torch.tensor([positions])
    assert_agree(position_ids)
    assert packattn.boundaries(position_ids).exact_cu_seqlens().tolist() == cu_seqlens
    filled = packattn.cu_seqlens_from_position_ids(position_ids)
    assert filled.tolist() == cu_seqlens + [len(positions)] * (len(positions) + 1 - len(cu_seqlens))


@pytest.mark.parametrize("seed", range(300))
def test_random_rows(seed):
    assert_agree(*random_rows(seed))


def test_any_strides():
    position_ids, attention_mask = random_rows(4, rows=3, n=40)
    for view in (
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x + 7], -1)[..., 0],
        lambda x: torch.cat([x, x], 1)[:, :40],
        lambda x: x[:1].expand(3, -1),
    ):
        assert_agree(view(position_ids), view(attention_mask))


def test_positions_wrap_in_their_dtype():
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        assert_agree(torch.tensor([[info.max - 1, info.max, info.min, info.min + 1, 0]], dtype=dtype))


def test_no_tokens():
    for shape in ((0, 5), (2, 0)):
        for implementation in IMPLEMENTATIONS:
            found = implementation(torch.empty(shape, dtype=torch.int64), None)
            assert [x.tolist() for x in found] == [[], [], [0], [0, 0, 0, 0]]


def test_a_million_tokens():
    position_ids, attention_mask = random_rows(10, rows=2, n=500_000)[0], torch.ones(2, 500_000, dtype=torch.bool)
    attention_mask[:, 450_000:] = False
    for one, other in zip(*(f(position_ids, attention_mask) for f in IMPLEMENTATIONS), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_transformers_draws_the_same_lines(seed):
    position_ids = random_rows(seed)[0]
    found = packattn.boundaries(position_ids)
    theirs = find_packed_sequence_indices(position_ids)
    theirs = torch.zeros_like(position_ids) if theirs is None else theirs
    change = torch.ones_like(theirs, dtype=torch.bool)
    change[:, 1:] = theirs[:, 1:] != theirs[:, :-1]
    ours = found.seq_start == torch.arange(position_ids.numel())
    assert torch.equal(change.flatten(), ours)


def test_one_row_of_positions_serves_every_row_of_the_mask():
    attention_mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    found = packattn.boundaries(torch.arange(3)[None], attention_mask)
    assert found.exact_cu_seqlens().tolist() == [0, 3, 5]
    assert found.max_seqlen.item() == 3


@pytest.mark.parametrize(
    ("position_ids", "attention_mask", "error", "message"),
    [
        (torch.zeros(1, 3), None, TypeError, "position_ids must be an int32 or int64 tensor, got torch.float32"),
        ([0, 1], None, TypeError, "position_ids must be an int32 or int64 tensor, got list"),
        (torch.arange(8).view(2, 2, 2), None, ValueError, r"position_ids must have shape \(rows, n\).*M-RoPE"),
        (torch.arange(3)[None], torch.ones(1, 4).bool(), ValueError, r"attention_mask must have the shape of"),
        (torch.arange(3)[None], torch.ones(1, 3), TypeError, r"attention_mask must be a bool.*attention_mask.bool"),
        (torch.arange(3)[None], torch.ones(1, 3, device="meta").bool(), ValueError, "on the device of position_ids"),
        (torch.arange(3)[None], torch.tensor([[1, 0, 1]]), RuntimeError, "attention_mask has a hole"),
    ],
)
def test_bad_arguments_are_named(position_ids, attention_mask, error, message):
    with pytest.raises(error, match=message):
        packattn.boundaries(position_ids, attention_mask)
