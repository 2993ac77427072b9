"""PackedMask: every constructor against the sentence that defines it, and the transpose."""

import sys

import numpy as np
import pytest
import torch

import packattn
from packattn import Boundaries, PackedMask, UnsupportedMaskError

LENGTHS = [3, 1, 7, 5, 12]
TOKENS = sum(LENGTHS)
SEQUENCE = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
SAME = SEQUENCE[:, None] == SEQUENCE
QUERY, KEY = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
POSITION = torch.cat([torch.arange(n) for n in LENGTHS])
BLOCKS = torch.tensor([-1, 0, 0, 5, 2, 2, -1, -1, 3, 3, 4, 4, 4, -1, 7, 7] + [9] * 12)


def block_of(i, j):
    low, high = (min(i, j), max(i, j))
    return BLOCKS[i] >= 0 and bool((BLOCKS[low : high + 1] == BLOCKS[i]).all())


FOUND, SPAN = Boundaries.from_lengths([2]), torch.tensor([0, 1], dtype=torch.int32)
IN_BLOCK = torch.tensor([[block_of(i, j) for j in range(TOKENS)] for i in range(TOKENS)])
CAUSAL = SAME & (KEY <= QUERY)
EXPECTED = {
    "causal": (lambda b: PackedMask.causal(b), CAUSAL),
    "window 1": (lambda b: PackedMask.causal(b, window=1), QUERY == KEY),
    "window 4": (lambda b: PackedMask.causal(b, window=4), CAUSAL & (QUERY - KEY < 4)),
    "window 99": (lambda b: PackedMask.causal(b, window=99), CAUSAL),
    "blocks": (lambda b: PackedMask.causal(b, blocks=BLOCKS), CAUSAL | (SAME & IN_BLOCK)),
    "bidirectional": (lambda b: PackedMask.bidirectional(b), SAME),
    "distance 2": (lambda b: PackedMask.bidirectional(b, window=2), SAME & ((QUERY - KEY).abs() <= 2)),
    "distance 0": (lambda b: PackedMask.bidirectional(b, window=0), QUERY == KEY),
    "chunks of 4": (lambda b: PackedMask.chunked(b, 4, POSITION), CAUSAL & (POSITION[:, None] // 4 == POSITION // 4)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_constructor_draws_what_it_says(name):
    make, expected = EXPECTED[name]
    mask = make(packattn.boundaries(POSITION))
    assert torch.equal(mask.to_dense(), expected)
    assert mask.shape == (1, 1, TOKENS, TOKENS)
    assert all(span.dtype == torch.int32 and span.is_contiguous() for span in mask[:4])


@pytest.mark.parametrize("name", EXPECTED)
def test_transpose_is_exact(name):
    mask = EXPECTED[name][0](packattn.boundaries(POSITION))
    seen_by = (mask.q_start <= QUERY) & (mask.q_end > QUERY)
    assert torch.equal(seen_by, mask.to_dense())


def test_transpose_is_exact_for_random_spans():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        tokens, tokens_k = (int(torch.randint(1, 30, (), generator=generator)) for _ in range(2))
        ends = torch.randint(0, tokens_k + 1, (2, tokens), generator=generator).sort(-1).values.int()
        mask = PackedMask.from_spans(ends.min(0).values, ends.max(0).values, tokens_k)
        query = torch.arange(tokens)[:, None]
        assert torch.equal((mask.q_start <= query) & (query < mask.q_end), mask.to_dense())


def test_every_source_gives_the_same_mask():
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    filled = torch.cat([cu_seqlens, cu_seqlens.new_full((9,), TOKENS)])
    expected = PackedMask.causal(packattn.boundaries(POSITION))
    for mask in (
        PackedMask.causal(lengths=LENGTHS),
        PackedMask.causal(cu_seqlens=cu_seqlens, tokens=TOKENS),
        PackedMask.causal(cu_seqlens=filled.int(), tokens=TOKENS),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mask[:4], expected[:4], strict=True))
    found = Boundaries.from_lengths(LENGTHS)
    for one, other in zip(found, packattn.boundaries(POSITION), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "make",
    [
        PackedMask.causal,
        lambda found: PackedMask.causal(found, window=2),
        lambda found: PackedMask.causal(found, blocks=torch.tensor([-1, 3, 3, 3, 3, 3, 3, -1, 3, 3])),
        PackedMask.bidirectional,
        lambda found: PackedMask.bidirectional(found, window=1),
        lambda found: PackedMask.chunked(found, 2, torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])),
    ],
    ids=["causal", "window", "blocks", "bidirectional", "both windows", "chunked"],
)
def test_padding_sees_nothing_and_is_seen_by_nothing(make):
    position_ids = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    mask = make(packattn.boundaries(position_ids, attention_mask))
    dense, real = mask.to_dense(), attention_mask.flatten().bool()
    assert not dense[~real].any()
    assert not dense[:, ~real].any()
    assert dense.diagonal()[real].all()
    for ends in (mask.k_start, mask.k_end, mask.q_start, mask.q_end):
        assert (ends.diff() >= 0).all()
    # All of a run alike, so that a tile of it has no key to visit.
    assert mask.k_start[3:7].tolist() == mask.k_end[3:7].tolist() == [3] * 4
    assert mask.q_start[3:7].tolist() == mask.q_end[3:7].tolist() == [7] * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PackedMask.causal(), ValueError, "give exactly one of .* got none"),
        (lambda: PackedMask.causal(lengths=[2], tokens=2), ValueError, "got lengths and tokens"),
        (lambda: PackedMask.causal([2, 3]), TypeError, "lengths and cu_seqlens are given by name"),
        (lambda: PackedMask.causal(lengths=[2, 0]), ValueError, r"lengths\[1\] must be an int of at least 1, got 0"),
        (lambda: PackedMask.causal(lengths=[2.0]), TypeError, r"lengths\[0\] must be an int, got float 2.0"),
        (lambda: PackedMask.causal(lengths=[True]), TypeError, r"lengths\[0\] must be an int, got bool True"),
        (lambda: PackedMask.causal(lengths=3), TypeError, "lengths must be a sequence of ints, got int 3"),
        (lambda: PackedMask.causal(lengths=[2**30, 2**30]), ValueError, "the sum of lengths must be .* got 2147483648"),
        (lambda: PackedMask.causal(lengths=[2], window=0), ValueError, "window must be an int of at least 1, got 0"),
        (lambda: PackedMask.causal(lengths=[2], window=2.5), TypeError, "window must be an int, got float 2.5"),
        (lambda: PackedMask.causal(lengths=[2], window=True), TypeError, "window must be an int, got bool True"),
        (lambda: PackedMask.causal(lengths=[2], window=torch.tensor(2)), TypeError, "window must be an int, got torch"),
        (lambda: PackedMask.causal(lengths=[2], window=np.float32(2)), TypeError, "window must be an int, got float32"),
        (lambda: PackedMask.bidirectional(lengths=[2], window=-1), ValueError, "window must be .* at least 0, got -1"),
        (lambda: PackedMask.bidirectional(lengths=[2], window=1.0), TypeError, "window must be an int, got float 1.0"),
        (
            lambda: PackedMask.chunked(FOUND, 2.5, torch.arange(2)),
            TypeError,
            "chunk_size must be an int, got float 2.5",
        ),
        (lambda: PackedMask.chunked(FOUND, 0, torch.arange(2)), ValueError, "chunk_size must be an int of at least 1"),
        (
            lambda: PackedMask.chunked(FOUND, 2, [0, 1]),
            TypeError,
            "position_ids must be an int32 or int64 tensor, got list",
        ),
        (lambda: PackedMask.chunked(FOUND, 2, torch.zeros(2)), TypeError, "position_ids must be .*, got torch.float32"),
        (lambda: PackedMask.chunked([2], 2, torch.arange(2)), TypeError, "boundaries must be what packattn.boundaries"),
        (lambda: PackedMask.causal(cu_seqlens=torch.tensor([0, 2]), tokens=3), RuntimeError, "must rise from 0 to"),
        (lambda: PackedMask.causal(cu_seqlens=torch.tensor([0.0]), tokens=0), ValueError, "cu_seqlens must be an int"),
        (lambda: PackedMask.causal(cu_seqlens=[0, 2], tokens=2), ValueError, "cu_seqlens must be an int.* got list"),
        (lambda: PackedMask.causal(cu_seqlens=torch.tensor([0, 2]), tokens=2.0), TypeError, "tokens must be an int"),
        (lambda: PackedMask.from_spans([0], [1], 1), ValueError, "k_start must be an int32 tensor .*, got list"),
        (lambda: PackedMask.from_spans(SPAN, SPAN[:1], 3), ValueError, r"k_end must be as k_start, torch.int32 \(2,\)"),
        (lambda: PackedMask.from_spans(SPAN, SPAN, 3.0), TypeError, "tokens_k must be an int, got float 3.0"),
        (lambda: PackedMask.causal(FOUND, blocks=torch.zeros(2)), UnsupportedMaskError, "blocks must be an int"),
        (lambda: PackedMask.causal(FOUND, blocks=[0, 0]), UnsupportedMaskError, "blocks must be .* got list"),
        (
            lambda: PackedMask.causal(FOUND, blocks=SPAN[None]),
            UnsupportedMaskError,
            r"blocks must be .* got .* \(1, 2\)",
        ),
        (
            lambda: PackedMask.chunked(Boundaries.from_lengths([2]), 4, torch.arange(3)),
            ValueError,
            "one position for each of the 2 tokens",
        ),
        (lambda: PackedMask.causal(lengths=[20_000]).to_dense(), ValueError, "to_dense is for streams of at most"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_blocks_that_have_no_negative_value_would_make_all_text_bidirectional(dtype):
    with pytest.raises(UnsupportedMaskError, match=r"torch.where\(mask, 0, -1\).*, got torch"):
        PackedMask.causal(lengths=[4], blocks=torch.tensor([0, 1, 1, 0], dtype=dtype))


def test_numbers_of_numpy_are_numbers():
    for mask, expected in (
        (PackedMask.causal(lengths=np.array([2, 3]), window=np.int64(2)), PackedMask.causal(lengths=[2, 3], window=2)),
        (PackedMask.bidirectional(lengths=[5], window=np.uint8(2)), PackedMask.bidirectional(lengths=[5], window=2)),
        (
            PackedMask.chunked(FOUND, np.int32(1), torch.arange(2)),
            PackedMask.chunked(FOUND, 1, torch.arange(2)),
        ),
        (PackedMask.from_spans(SPAN, SPAN, np.int64(3)), PackedMask.from_spans(SPAN, SPAN, 3)),
        (
            PackedMask.causal(cu_seqlens=torch.tensor([0, 2, 5]), tokens=np.int64(5)),
            PackedMask.causal(lengths=[2, 3]),
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mask[:4], expected[:4], strict=True))


@pytest.mark.parametrize("wide", [2**31 - 1, 2**31, sys.maxsize])
def test_a_window_wider_than_any_stream_is_none(wide):
    found = packattn.boundaries(POSITION)
    for mask, expected in (
        (PackedMask.causal(found, window=wide), PackedMask.causal(found)),
        (PackedMask.bidirectional(found, window=wide), PackedMask.bidirectional(found)),
        (PackedMask.chunked(found, wide, POSITION), PackedMask.causal(found)),
        (PackedMask.chunked(found, wide, POSITION.int()), PackedMask.causal(found)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mask[:4], expected[:4], strict=True))


def test_repr_says_what_the_mask_is():
    assert repr(PackedMask.causal(lengths=[2, 3])) == (
        "PackedMask(queries=5, keys=5, pairs=9 (36.0% of dense), longest span=3, device=cpu)"
    )


def test_plot_draws_every_sequence_in_a_colour_of_its_own():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    ax = PackedMask.causal(lengths=[4, 3, 5]).plot()
    (image,) = ax.get_images()
    drawn = image.get_array()
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}
    plt.close("all")


def test_plot_writes_the_picture_where_it_is_told(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    mask = PackedMask.causal(lengths=[4, 3, 5])
    ax = mask.plot(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert ax.get_xlabel() == "key"
    assert not plt.get_fignums()
    assert mask.plot(str(tmp_path / "mask.svg"), ax=ax) is ax
    assert (tmp_path / "mask.svg").read_text().startswith("<?xml")
    with pytest.raises(TypeError, match=r"path must be the name of a file, got Axes; axes are given by name, ax="):
        mask.plot(ax)
