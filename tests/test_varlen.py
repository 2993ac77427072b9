"""flash_attn_varlen_func against a plain loop over the sequences, with flash-attn's conventions."""

import itertools

import pytest
import torch

import packattn
from packattn import flash_attn_varlen_func

LENGTHS_Q = [1, 37, 0, 16, 5, 33]
LENGTHS_K = [9, 37, 4, 7, 0, 50]


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(heads_q=4, heads_k=2, dim=16, dim_v=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(LENGTHS_Q), heads_q, dim), (sum(LENGTHS_K), heads_k, dim), (sum(LENGTHS_K), heads_k, dim_v))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def plain(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None):
    """One sequence after the other, in float64, masks and biases as flash-attn's documentation draws them."""
    outs = []
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    sequences = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True)
    for index, (x, keys, values) in enumerate(sequences):
        x, keys, values = x.double(), keys.double(), values.double()
        s = torch.einsum("ihd,jhd->hij", x, keys.repeat_interleave(group, 1)) * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        i = torch.arange(len(x))[:, None] + len(keys) - len(x)
        j = torch.arange(len(keys))[None]
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[index]
            s = s - slopes.double()[:, None, None] * (i - j).abs()
        left, right = window_size
        seen = torch.ones(len(x), len(keys), dtype=torch.bool)
        if causal or right >= 0:
            seen &= j <= i + (0 if causal else right)
        if left >= 0:
            seen &= j >= i - left
        p = s.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
        outs.append(torch.einsum("hij,jhd->ihd", p, values.repeat_interleave(group, 1)))
    return torch.cat(outs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (5, 3)},
        {"window_size": (5, -1)},
        {"window_size": (-1, 0)},
        {"window_size": (0, 0)},
        {"causal": True, "window_size": (7, 2)},
        {"softcap": 3.0, "softmax_scale": 0.5},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        {"causal": True, "alibi_slopes": torch.rand(6, 4, generator=torch.Generator().manual_seed(1))},
        {"causal": True, "deterministic": True},
    ],
    ids=str,
)
def test_it_is_attention_per_sequence(options):
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = inputs()
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), **options)
    options.pop("deterministic", None)
    expected = plain(q, k, v, **options)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for grad, truth in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, truth, atol=1e-5, rtol=1e-4)


def test_the_log_sum_exp_comes_with_the_probabilities_asked_for():
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = inputs()
    out, lse, probabilities = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_attn_probs=True)
    assert probabilities is None
    assert lse.shape == (4, sum(LENGTHS_Q))
    assert torch.isneginf(lse[:, 54:59]).all()  # queries of the sequence without keys
    assert (out[54:59] == 0).all()
    first = torch.einsum("hd,jhd->hj", q[0], k[:9].repeat_interleave(2, 1)) / 4
    torch.testing.assert_close(lse[:, 0], first.logsumexp(-1))


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (2, 1)}, {}], ids=str)
def test_queries_of_no_sequence_get_zero_and_keys_of_none_are_not_seen(options):
    q, k, v = inputs()
    out = flash_attn_varlen_func(q, k, v, cumulative([3, 4]) + 2, cumulative([5, 6]) + 3, **options)
    assert (out[:2] == 0).all()
    assert (out[9:] == 0).all()
    assert out[2:9].abs().min() > 0
    alone = flash_attn_varlen_func(q[2:9], k[3:14], v[3:14], cumulative([3, 4]), cumulative([5, 6]), **options)
    torch.testing.assert_close(out[2:9], alone)


def test_lengths_are_not_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(100, 4, 64, dtype=torch.bfloat16)
        cu = torch.empty(7, dtype=torch.int32)
        assert flash_attn_varlen_func(q, q, q, cu, cu, causal=True).shape == (100, 4, 64)


def test_what_is_not_honoured_raises():
    q, k, v = inputs()
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, block_table=cu_q)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must have shape \(7,\)"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k[:-1])
    with pytest.raises(ValueError, match="cu_seqlens_q must be an integer tensor"):
        flash_attn_varlen_func(q, k, v, cu_q.float(), cu_k)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be an integer tensor .*, got list"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k.tolist())
    with pytest.raises(ValueError, match="window_size"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, window_size=(-2, 0))
    with pytest.raises(ValueError, match="alibi_slopes"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, alibi_slopes=torch.ones(5, 4))
    assert packattn.flash_attn_varlen_func is flash_attn_varlen_func
