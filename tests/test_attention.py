"""Numbers: every backend against the float64 oracle, by the one tolerance law of tests/cases.py."""

import pytest
import slow
import torch
from conftest import INTERPRETING

import packattn
from packattn import PackedMask, dropout, reference
from packattn.attention import PackedAttention
from packattn.selftest import CASES, Case, assert_accurate, check_accuracy, packed

# In Triton's interpreter a token, a head and an element of the head dim cost the most.
SLOW = (
    "over a thousand tiny; around a tile of 128; one long among short; one sequence; group of 7; head dim 72;"
    "head dim 96; head dim 112; head dim 128; head dim 160; head dim 256; head dim 512; head dim 576, values 512"
)


@pytest.mark.parametrize("case", slow.cases(CASES, SLOW if INTERPRETING else ""))
def test_case_is_accurate(case, backend, device, dtypes):
    for dtype in dtypes:
        check_accuracy(case, backend, dtype, device)


def test_dropout_bits_are_those_of_the_oracle(backend, device):
    case = Case("dropout", [30, 50], heads_q=4, heads_k=2)
    q, k, v, _, dout, _ = (x.to(torch.float32) for x in case.tensors(torch.float32, device))
    mask, seed = case.packed_mask(device), torch.tensor([0x123456789ABCDEF], device=device)

    def ours(q, k, v):
        return PackedAttention.apply(q, k, v, *mask, None, None, None, seed, 0.25, 0.0, 0.3, backend)[0]

    def oracle(q, k, v):
        options = {"softmax_scale": 0.25, "dropout_p": 0.3, "seed": seed.cpu()}
        return reference.attention(q, k, v, case.packed_mask("cpu"), **options)[0]

    results = {}
    for name, call, inputs, weight in (
        ("ours", ours, (q, k, v), dout),
        ("naive", oracle, (q.cpu(), k.cpu(), v.cpu()), dout.cpu()),
        ("truth", oracle, (q.cpu().double(), k.cpu().double(), v.cpu().double()), dout.cpu().double()),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        results[name] = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    for name, *values in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True):
        assert_accurate(name, values[0], values[2], values[1])


def test_dropout_keeps_the_stated_share_and_the_words_are_philox():
    seed = torch.tensor([0], dtype=torch.int64)
    query, key, head = torch.arange(100)[:, None], torch.arange(200), torch.tensor(0)
    kept = dropout.keep(seed, query, key, head, 0.25)
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    # First word of Philox4x32-10 for key 0 and counter 0, from the authors' known-answer file.
    zero = torch.zeros(1, dtype=torch.int64)
    first = 0x6627E8D5
    assert dropout.keep(seed, zero, zero, zero, first / 2**32).item()
    assert not dropout.keep(seed, zero, zero, zero, (first + 1) / 2**32).item()


def test_no_tokens(backend, device):
    empty = torch.empty(0, 2, 16, device=device, requires_grad=True)
    mask = PackedMask(*(torch.empty(0, dtype=torch.int32, device=device) for _ in range(4)))
    out, lse = packattn.packed_attention_with_lse(empty, empty, empty, mask, backend=backend)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    (grad,) = torch.autograd.grad(out.sum(), empty)
    assert grad.shape == (0, 2, 16)


def test_oracle_and_torch_backend_have_right_gradients():
    case = Case("gradcheck", [3, 4], heads_q=2, head_dim=4, sinks=True)
    q, k, v, sinks, *_ = (x.double().requires_grad_() for x in case.tensors(torch.float64, "cpu"))
    mask = case.packed_mask("cpu")
    for call in (reference.attention, packed("torch")):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, call=call: call(q, k, v, mask, softcap=3.0, sinks=s), (q, k, v, sinks)
        )
