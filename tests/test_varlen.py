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


def plain(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None, sink=None):
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
        left, right = (-1 if size is None else size for size in window_size)
        seen = torch.ones(len(x), len(keys), dtype=torch.bool)
        if causal or right >= 0:
            seen &= j <= i + (0 if causal else right)
        if left >= 0:
            seen &= j >= i - left
        s = s.masked_fill(~seen, float("-inf"))
        if sink is None:
            p = s.softmax(-1).masked_fill(~seen, 0.0)
        else:
            p = torch.cat([s, sink.double()[:, None, None].expand(-1, len(x), 1)], -1).softmax(-1)[..., :-1]
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
        {"window_size": (None, None), "num_splits": 1, "pack_gqa": None, "sm_margin": 0},
        {"window_size": [None, 2], "num_splits": 0, "pack_gqa": True, "qv": None, "score_mod": None},
        {"causal": True, "window_size": (torch.iinfo(torch.int64).max, 0)},
    ],
    ids=str,
)
def test_it_is_attention_per_sequence(options):
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = inputs()
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), **options)
    named = ("causal", "window_size", "softcap", "alibi_slopes", "softmax_scale")
    expected = plain(q, k, v, **{name: value for name, value in options.items() if name in named})
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


def test_sinks_take_part_and_their_lse_comes_alone():
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = inputs()
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    options = {"causal": True, "learnable_sink": sink, "return_lse": True}
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **options)
    expected = plain(q, k, v, causal=True, sink=sink)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse[:, 54:59], sink.detach()[:, None].expand(-1, 5))  # queries without keys
    grads = torch.autograd.grad(out.square().sum(), (q, sink))
    for grad, truth in zip(grads, torch.autograd.grad(expected.square().sum(), (q, sink)), strict=True):
        torch.testing.assert_close(grad, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (3, 1)}, {"causal": True, "alibi_slopes": torch.rand(6, 4)}],
    ids=["plain", "causal", "window", "alibi"],
)
def test_tokens_that_are_not_used_are_as_if_they_were_not_there(options):
    used_q, used_k = [1, 20, 0, 16, 2, 0], [5, 37, 0, 3, 0, 9]
    q, k, v = inputs()

    def used(x, lengths, counts):
        return torch.cat([part[:count] for part, count in zip(x.split(lengths), counts, strict=True)])

    found = flash_attn_varlen_func(
        q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), seqused_q=torch.tensor(used_q, dtype=torch.int32),
        seqused_k=torch.tensor(used_k), **options,
    )  # fmt: skip
    parts = used(q, LENGTHS_Q, used_q), used(k, LENGTHS_K, used_k), used(v, LENGTHS_K, used_k)
    alone = flash_attn_varlen_func(*parts, cumulative(used_q), cumulative(used_k), **options)
    torch.testing.assert_close(used(found, LENGTHS_Q, used_q), alone, atol=2e-6, rtol=2e-5)
    for part, count in zip(found.split(LENGTHS_Q), used_q, strict=True):
        assert (part[count:] == 0).all()
    grads = torch.autograd.grad(found.square().sum(), (q, k, v), retain_graph=True)
    for grad, truth in zip(grads, torch.autograd.grad(alone.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, truth, atol=1e-5, rtol=1e-4)


def test_packed_keys_and_values_and_queries_are_the_same_attention():
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = inputs()
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 37, 50, 0.0, 0.5, True, window_size=(9, 0))
    kv = torch.stack([k, v], 1)
    options = {"window_size": (9, 0), "num_splits": 1}
    found = packattn.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 37, 50, 0.0, 0.5, True, **options)
    assert torch.equal(found, expected)
    qkv = torch.stack([q[:70, :2], k[:70], v[:70]], 1)
    cu = cumulative([30, 40])
    expected = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, causal=True)
    found, lse = packattn.flash_attn_varlen_qkvpacked_func(qkv, cu, 40, causal=True, return_lse=True)
    assert torch.equal(found, expected)
    assert lse.shape == (2, 70)
    with pytest.raises(ValueError, match=r"kv must be a tensor of shape \(total_k, 2, heads_k, head_dim\), got torch"):
        packattn.flash_attn_varlen_kvpacked_func(q, qkv, cu_q, cu_k)
    with pytest.raises(ValueError, match=r"qkv must be a tensor of shape \(total, 3, heads, head_dim\), got list"):
        packattn.flash_attn_varlen_qkvpacked_func([q, q, q], cu_q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 4, 3, 6]}, "cu_seqlens_q must never fall, and lie from 0 to the number of tokens of q"),
        ({"cu_seqlens_q": [-1, 2, 4, 6]}, "cu_seqlens_q must never fall"),
        ({"cu_seqlens_q": [0, 2, 4, 7]}, "cu_seqlens_q must never fall"),
        ({"cu_seqlens_k": [0, 4, 3, 6]}, "cu_seqlens_k must never fall, and lie from 0 to the number of tokens of k"),
        ({"cu_seqlens_k": [-1, 2, 4, 6]}, "cu_seqlens_k must never fall"),
        ({"cu_seqlens_k": [0, 2, 4, 2**31]}, "cu_seqlens_k must never fall"),
        ({"seqused_q": [3, 2, 2]}, "seqused_q must be from 0 to the length of each sequence in cu_seqlens_q"),
        ({"seqused_k": [0, -1, 2]}, "seqused_k must be from 0 to the length"),
    ],
    ids=str,
)
def test_law_10_lengths_that_do_not_fit_are_named(change, message):
    q = torch.randn(6, 2, 8)
    lengths = {name: torch.tensor([0, 2, 4, 6]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    with pytest.raises(RuntimeError, match=message):
        flash_attn_varlen_func(q, q, q, **lengths | {name: torch.tensor(values) for name, values in change.items()})


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
        used = torch.empty(6, dtype=torch.int32)
        options = {"seqused_q": used, "seqused_k": used, "window_size": (4, None), "learnable_sink": torch.empty(4)}
        out, lse = flash_attn_varlen_func(q, q, q, cu, cu, alibi_slopes=torch.empty(6, 4), return_lse=True, **options)
        assert out.shape == (100, 4, 64)
        assert lse.shape == (4, 100)


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
    with pytest.raises(ValueError, match="window_size must be an int of at least -1, got -2"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, window_size=(-2, 0))
    with pytest.raises(TypeError, match=r"window_size must be an int, got float 2\.5"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, window_size=(2.5, 0))
    for size in (5, None, (1, 2, 3)):
        with pytest.raises(ValueError, match="window_size must hold two numbers"):
            flash_attn_varlen_func(q, k, v, cu_q, cu_k, window_size=size)
    with pytest.raises(ValueError, match="alibi_slopes"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, alibi_slopes=torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"alibi_slopes must be a floating-point tensor .* got list"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, alibi_slopes=[0.5] * 4)
    with pytest.raises(ValueError, match=r"learnable_sink must be a floating-point tensor of shape \(4,\)"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, learnable_sink=torch.zeros(2))
    with pytest.raises(ValueError, match=r"seqused_k must be an integer tensor of shape \(6,\) .*, got list"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, seqused_k=LENGTHS_K)
    with pytest.raises(ValueError, match="not both"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, return_lse=True, return_attn_probs=True)
    with pytest.raises(TypeError, match=r"q must be a floating-point tensor .*, got list"):
        flash_attn_varlen_func([q], k, v, cu_q, cu_k)
    with pytest.raises(TypeError, match="dropout_p must be a number, got NoneType"):  # seqused_q of flash-attn 3
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, 37, 50, None)
    with pytest.raises(TypeError, match="has no argument 'colour'"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, colour=None)
    for name in ("page_table", "qv", "q_descale", "attention_chunk", "score_mod", "mask_mod", "aux_tensors"):
        with pytest.raises(NotImplementedError, match=f"{name} is not supported: "):
            flash_attn_varlen_func(q, k, v, cu_q, cu_k, **{name: 4})
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, **{name: None})
    assert packattn.flash_attn_varlen_func is flash_attn_varlen_func
