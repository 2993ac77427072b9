"""The laws of docs/design.md, each on every backend it concerns."""

import functools
import math
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import packattn
from packattn import PackedMask, blocked
from packattn.attention import PackedAttention
from packattn.selftest import (
    ISOLATION_CASES,
    Case,
    assert_accurate,
    cancelling_terms,
    check_accuracy,
    check_determinism,
    check_isolation,
    packed,
    run,
    run_on,
    truth_and_naive,
)

by_kind = pytest.mark.parametrize("case", ISOLATION_CASES, ids=lambda case: case.name)


def alone(backend, case, tensors, device):
    """Each sequence by itself through the same backend, the results put back end to end."""
    parts, begin = [], 0
    for length in case.lengths:
        q, k, v, sinks, dout, dlse = tensors
        rows = slice(begin, begin + length)
        one = Case(case.name, [length], mask=case.mask, window=case.window)
        pieces = [q[rows], k[rows], v[rows], sinks, dout[rows], dlse[:, rows]]
        parts.append(run_on(packed(backend), one, pieces, device))
        begin += length
    return {name: torch.cat([p[name] for p in parts], 1 if name == "lse" else 0) for name in parts[0]}


@by_kind
def test_law_1_packed_equals_alone(case, backend, device, dtypes):
    for dtype in dtypes:
        check_accuracy(case, backend, dtype, device)
        truth, naive = truth_and_naive(case, dtype, device)
        terms = cancelling_terms(case, dtype, device, scores_round_alike=backend != "triton")
        found = alone(backend, case, case.tensors(dtype, device), device)
        for name in truth:
            assert_accurate(f"{name} in {dtype}", found[name], truth[name], naive[name], terms.get(name, 0.0))


@by_kind
def test_law_2_no_leak(case, backend, device, dtypes):
    for dtype in dtypes:
        check_isolation(case, backend, dtype, device)


def test_law_3_a_mask_that_is_not_one_span_is_refused():
    position_ids, attention_mask = torch.arange(6)[None], torch.tensor([[1, 1, 0, 1, 1, 1]])
    with pytest.raises(RuntimeError, match="attention_mask has a hole"):
        packattn.boundaries(position_ids, attention_mask)
    falling = torch.tensor([0, 2, 1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="never decrease"):
        PackedMask.from_spans(falling, falling + 1, 4)


class Context:
    """Stands in for autograd's, whose engine does not start for a device that the machine lacks."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


@pytest.mark.parametrize(("where", "named"), [("cuda", "triton"), ("cpu", "cpu"), ("cuda", "torch"), ("cpu", "torch")])
def test_law_4_nothing_reads_a_value_on_the_host(where, named):
    if where == "cuda" and torch.version.cuda is None:
        pytest.skip("a torch without CUDA has no fake GPU either")
    # A fake tensor has no values: reading one raises, and a tensor forgotten on another device raises too.
    with FakeTensorMode():
        q = torch.empty(300, 4, 64, device=where, dtype=torch.bfloat16)
        k = torch.empty(300, 2, 64, device=where, dtype=torch.bfloat16)
        v = torch.empty(300, 2, 32, device=where, dtype=torch.bfloat16)
        sinks = torch.empty(4, device=where)
        position_ids = torch.empty(2, 150, device=where, dtype=torch.int64)
        found = packattn.boundaries(position_ids, position_ids >= 0)
        for mask in (
            PackedMask.causal(found, window=7, blocks=position_ids.view(-1)),
            PackedMask.bidirectional(found, window=7),
            PackedMask.chunked(found, 8, position_ids),
            PackedMask.from_spans(found.seq_start, found.seq_end, 300),
            PackedMask.causal(cu_seqlens=found.cu_seqlens, tokens=300),
        ):
            out = packattn.packed_attention(q, k, v, mask, sinks=sinks, dropout_p=0.1, backend=named)
            assert (out.shape, out.device.type) == ((300, 4, 32), where)
            context = Context()
            out, lse = PackedAttention.forward(context, q, k, v, *mask, sinks, None, None, None, 0.1, 0.0, 0.0, named)
            with torch.no_grad():  # as the engine calls it
                grads = PackedAttention.backward(context, out.transpose(0, 1).contiguous().transpose(0, 1), lse)
            for x, grad in zip((q, k, v, sinks), (*grads[:3], grads[8]), strict=True):
                assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)


def test_law_4_one_graph_serves_every_packing(backend, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def path(position_ids, q, k, v):
        mask = PackedMask.causal(packattn.boundaries(position_ids))
        return packattn.packed_attention(q, k, v, mask, backend=backend)

    compiled = torch.compile(path, fullgraph=True, backend=count, dynamic=False)
    q, k, v, *_ = Case("", [48], heads_q=2).tensors(torch.float32, device)
    for lengths in ([48], [20, 28], [1] * 48):
        position_ids = torch.cat([torch.arange(n) for n in lengths]).to(device)
        assert torch.equal(compiled(position_ids, q, k, v), path(position_ids, q, k, v))
    assert len(graphs) == 1


def test_law_4_gradients_through_the_compiler(backend, device):
    torch._dynamo.reset()
    case = Case("", [30, 18], heads_q=2, softcap=3.0, sinks=True)
    compiled = torch.compile(packed(backend), fullgraph=True, backend="aot_eager")
    eager, traced = (run(call, case, torch.float32, device) for call in (packed(backend), compiled))
    for name, value in eager.items():
        assert torch.equal(value, traced[name]), name


def test_operators_keep_their_contract(backend, device):
    case = Case("", [7, 9], heads_q=2, sinks=True)
    q, k, v, sinks, dout, dlse = case.tensors(torch.float32, device)
    mask = case.packed_mask(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    forward = getattr(torch.ops.packattn, f"attention_forward_{backend}").default
    backward = getattr(torch.ops.packattn, f"attention_backward_{backend}").default
    inputs = (q, k, v, *mask, sinks, None, None, None, 0.25, 0.0, 0.0)
    torch.library.opcheck(forward, inputs, test_utils=tests)
    out, lse, norm = forward(*inputs)
    torch.library.opcheck(backward, (dout, dlse, q, k, v, out, lse, norm, *inputs[3:]), test_utils=tests)
    position_ids = torch.tensor([[0, 1, 0, 1, 2]], device=device)
    torch.library.opcheck(torch.ops.packattn.boundaries.default, (position_ids, position_ids >= 0), test_utils=tests)


@by_kind
def test_law_5_two_runs_are_bitwise_equal(case, backend, device, dtypes):
    for dtype in dtypes:
        check_determinism(case, backend, dtype, device)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_law_6_the_path_without_a_compiler_is_linear_in_the_tokens():
    largest = {}
    for tokens in (1024, 2048):
        q, k, v, _, dout, dlse = Case("", [tokens], heads_q=2).tensors(torch.float32, "cpu")
        mask = PackedMask.causal(lengths=[tokens])
        with LargestTensor() as seen:
            out, lse, norm = blocked.forward(q, k, v, *mask, None, None, None, None, 0.25, 0.0, 0.0)
            blocked.backward(dout, dlse, q, k, v, out, lse, norm, *mask, None, None, None, None, 0.25, 0.0, 0.0)
        largest[tokens] = seen.numel
    assert largest[2048] <= 2 * largest[1024]
    assert largest[2048] < 2048 * 2048


def test_law_7_offsets_pass_two_to_the_31_elements(backend, device, tmp_path):
    if device != "cpu":
        pytest.skip("the view would need gigabytes of a GPU")
    # The heads of q are 2^30 elements apart, in a file of which only the pages that are touched exist.
    step, case = 2**30, Case("", [20, 13], heads_q=3)
    tensors = case.tensors(torch.float16, device)
    wide = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * step + 33 * 16, dtype=torch.float16)
    far = wide.as_strided((33, 3, 16), (16, step, 1))
    for head in range(3):
        far[:, head] = tensors[0][:, head]
    expected, found = (
        run(packed(backend), case, torch.float16, device),
        run_on(packed(backend), case, [far, *tensors[1:]], device),
    )
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_law_7_what_32_bit_offsets_do_not_reach_is_refused(monkeypatch):
    from packattn.kernels import launch

    monkeypatch.setattr(launch, "isinstance", lambda *_: False, raising=False)  # as in the interpreter
    near, far = (torch.empty(1, dtype=torch.float16).as_strided((1, 2, 16), (step, 0, 0)) for step in (16, 2**24))
    launch._check(near, near, near)
    with pytest.raises(NotImplementedError, match="token stride of 16777216 elements"):
        launch._check(near, far, near)
    many, few = (torch.empty(1, dtype=torch.float16).expand(2**24, heads, 16) for heads in (128, 1))
    launch._check(many[:, :64], few, few)
    with pytest.raises(NotImplementedError, match="2147483648 pairs of a token and a head"):
        launch._check(many, few, few)


def test_law_7_a_gradient_that_32_bit_offsets_do_not_reach_is_copied(monkeypatch):
    from packattn.kernels import launch

    strides = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: strides.append(kwargs.get("stride_dot", args[6] if args else None))

    for name in ("_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"):
        monkeypatch.setattr(launch, name, Recorded())
    monkeypatch.setattr(launch, "isinstance", lambda *_: False, raising=False)  # as in the interpreter
    x, rows = torch.zeros(2, 2, 16), torch.zeros(2, 2)
    far = torch.empty(2**24 + 32).as_strided((2, 2, 16), (2**24, 16, 1))
    spans = PackedMask.causal(lengths=[2])[:4]
    launch.backward(far, None, x, x, x, x, rows, rows.expand(2, 2, 2), *spans, None, *(None,) * 4, 1.0, 0.0, 0.0)
    assert strides == [32] * 3


def test_law_8_a_named_backend_never_falls_back(monkeypatch):
    q = torch.zeros(4, 2, 16, dtype=torch.float64)
    mask = PackedMask.causal(lengths=[4])
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f'backend "{backend}" cannot run this: .*float64'):
            packattn.packed_attention(q, q, q, mask, backend=backend)
    monkeypatch.setattr(packattn.ops, "HAS_C", False)
    with pytest.raises(NotImplementedError, match=r"packattn\._C is not built: install a C"):
        packattn.packed_attention(q.float(), q.float(), q.float(), mask, backend="cpu")
    assert packattn.attention.default_backend(torch.device("cpu"), torch.float32) == "torch"


def good():
    q = torch.zeros(6, 4, 16)
    return {"q": q, "k": q[:, :2], "v": q[:, :2], "mask": PackedMask.causal(lengths=[4, 2])}


BAD = [
    ({"q": [1.0]}, TypeError, "q must be a floating-point tensor of shape .tokens, heads_q, head_dim., got list"),
    ({"q": torch.zeros(6, 4, 16, dtype=torch.int64)}, TypeError, "q must be a floating-point tensor"),
    ({"q": torch.zeros(1, 6, 4, 16)}, ValueError, r"q must have shape .* got \(1, 6, 4, 16\)"),
    ({"k": torch.zeros(6, 2, 16).half()}, TypeError, "k must have the dtype of q, torch.float32, got torch.float16"),
    ({"k": torch.zeros(6, 3, 16)}, ValueError, r"heads_k dividing heads_q=4, got \(6, 3, 16\)"),
    ({"k": torch.zeros(6, 2, 8)}, ValueError, r"k must have shape \(tokens_k, heads_k, head_dim=16\)"),
    ({"v": torch.zeros(5, 2, 16)}, ValueError, r"v must have shape \(6, 2, head_dim_v\)"),
    ({"v": torch.zeros(6, 2, 16, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
    ({"mask": torch.ones(6, 6)}, TypeError, "mask must be a packattn.PackedMask, got torch.float32 .*; make one with"),
    ({"mask": PackedMask.causal(lengths=[4])}, ValueError, "mask must be of 6 queries and 6 keys"),
    ({"q": torch.zeros(6, 0, 16)}, ValueError, r"heads and head_dim must be at least 1, got q \(6, 0, 16\)"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be from 8.67361738e-19 to 1.152921505e.18, got 0.0"),
    ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be from .*, got inf"),
    ({"softmax_scale": torch.tensor(0.1)}, TypeError, "softmax_scale must be a number, got torch.float32"),
    ({"softcap": -1.0}, ValueError, "softcap must be from .*, or 0 for none, got -1.0"),
    ({"softcap": math.nan}, ValueError, "softcap must be from .*, or 0 for none, got nan"),
    ({"softcap": 1e39}, ValueError, "softcap must be from .*, or 0 for none, got 1e.39"),  # beyond float32
    ({"softcap": 10**400}, ValueError, "softcap must be from .*, or 0 for none, got inf"),
    ({"softcap": 1e-46}, ValueError, "softcap must be from .*, or 0 for none, got 1e-46"),
    ({"softcap": True}, TypeError, "softcap must be a number, got bool True"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got str 30"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be from 0 to 0.9999999998, got 1.0"),
    ({"dropout_p": 1 - 2**-34}, ValueError, "dropout_p must be from 0 to .*, got 0.9999999999"),  # drops no word at all
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
    ({"mask": PackedMask(*[[0] * 6] * 4)}, ValueError, "mask.k_start must be an int32 tensor of .*, got list"),
    ({"mask": PackedMask(*[torch.arange(6)] * 4)}, ValueError, "mask.k_start must be an int32 .* got torch.int64"),
    ({"sinks": [0.0] * 4}, ValueError, "sinks must be a floating-point tensor of .*, got list"),
    ({"sinks": torch.zeros(2)}, ValueError, r"sinks must be a floating-point tensor of shape \(4,\) on cpu"),
    (
        {"alibi_slopes": [0.5] * 4},
        ValueError,
        r"alibi_slopes must be a floating-point tensor of shape \(4,\) or \(4, 6\) on cpu, got list",
    ),
    ({"alibi_slopes": torch.ones(4), "alibi_anchors": [0] * 6}, ValueError, "alibi_anchors must be int32 .*, got list"),
    ({"backend": "cuda"}, ValueError, "backend must be None or one of triton, cpu, torch, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_law_10_bad_arguments_are_named_before_any_work(change, error, message, monkeypatch):
    monkeypatch.setattr(PackedAttention, "apply", lambda *_: pytest.fail("work began"))
    arguments = good() | change
    with pytest.raises(error, match=message):
        packattn.packed_attention(**arguments)


def test_numbers_are_those_of_numpy_too_and_as_large_as_stated(backend, device):
    q, k, v, *_ = Case("", [20, 10], heads_q=2).tensors(torch.float32, device)
    mask = Case("", [20, 10]).packed_mask(device)
    attend = functools.partial(packattn.packed_attention, q, k, v, mask, backend=backend)
    options = {"softmax_scale": np.float32(0.5), "softcap": np.int64(3), "dropout_p": np.float64(0)}
    assert torch.equal(attend(**options), attend(softmax_scale=0.5, softcap=3.0))
    torch.testing.assert_close(attend(softcap=2.0**60), attend(), rtol=1e-5, atol=1e-6)
    for tiny in ({"softmax_scale": 2.0**-60}, {"softcap": 2.0**-60}, {"softcap": 2.0**-60, "softmax_scale": 2.0**60}):
        torch.testing.assert_close(attend(**tiny)[7], v[:8].mean(0).repeat_interleave(2 // v.shape[1], 0))
    assert (attend(dropout_p=1 - 2.0**-32) == 0).all()  # all but one in 2**32
    assert torch.equal(attend(dropout_p=2.0**-34), attend())  # none


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads_q": 2.0}, TypeError, "heads_q must be an int, got float 2.0"),
        ({"heads_k": 0}, ValueError, "heads_k must be an int of at least 1, got 0"),
        ({"heads_k": 3}, ValueError, "heads_k must divide heads_q=4, got 3"),
        ({"head_dim": True}, TypeError, "head_dim must be an int, got bool True"),
        ({"head_dim_v": "64"}, TypeError, "head_dim_v must be an int, got str 64"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype, that of q, got str bfloat16"),
    ],
)
def test_law_10_an_order_is_asked_for_in_whole_numbers(change, error, message):
    mask, asked = PackedMask.causal(lengths=[4]), {"heads_q": 4, "heads_k": 2, "head_dim": 64, "dtype": torch.float16}
    assert packattn.schedule(mask, **asked | {"heads_q": np.int64(4)}) is mask
    with pytest.raises(error, match=message):
        packattn.schedule(mask, **asked | change)
    with pytest.raises(TypeError, match=r"mask must be a packattn\.PackedMask, got list"):
        packattn.schedule([0, 4], **asked)


def test_gradients_may_be_asked_for_in_another_thread(backend, device):
    case = ISOLATION_CASES[0]
    expected = run(packed(backend), case, torch.float32, device)
    found = {}
    thread = threading.Thread(target=lambda: found.update(run(packed(backend), case, torch.float32, device)))
    thread.start()
    thread.join()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_autocast_casts_as_torch_does(backend, device):
    # The interpreter has no right bfloat16.
    dtype = torch.float16 if backend == "triton" and device == "cpu" else torch.bfloat16
    q, k, v, *_ = Case("", [20, 10], heads_q=2).tensors(torch.float32, device)
    mask = PackedMask.causal(lengths=[20, 10])
    mask = PackedMask(*(x.to(device) for x in mask[:4]))
    with torch.autocast(device, dtype=dtype):
        out = packattn.packed_attention(q, k, v.to(dtype), mask, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, packattn.packed_attention(*(x.to(dtype) for x in (q, k, v)), mask, backend=backend))


def test_a_sink_of_minus_infinity_is_none(backend, device):
    options = {"spans": ([0, 0, 4], [0, 2, 4], 9), "heads_q": 2, "heads_k": 1}  # queries without keys too
    case = Case("", [], sinks=True, **options)
    q, k, v, sinks, *gradients = case.tensors(torch.float32, device)
    without = run_on(packed(backend), Case("", [], **options), [q, k, v, sinks, *gradients], device)
    off = torch.full_like(sinks, -math.inf)
    found = run_on(packed(backend), case, [q, k, v, off, *gradients], device)
    assert found.pop("dsinks").tolist() == [0.0, 0.0]
    for name, values in without.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6)
    off[1] = sinks[1]  # heads of one tile
    mixed = run_on(packed(backend), case, [q, k, v, off, *gradients], device)
    assert mixed.pop("dsinks")[0] == 0
    torch.testing.assert_close(mixed["out"][:, 0], without["out"][:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed["lse"][0], without["lse"][0], rtol=1e-6, atol=1e-6)
    broken = run_on(packed(backend), case, [q, k, v, torch.full_like(sinks, math.nan), *gradients], device)
    assert all(broken[name].isnan().all() for name in ("out", "lse", "dsinks"))
