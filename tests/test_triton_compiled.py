"""The compiled Triton kernels: run by the PTX emulator through the real launchers, and compiled for every target.

The interpreter cannot compute bfloat16, and does not see layouts, pipelines or races; the emulator runs what the
compiler made for sm_80 (mma.sync) and sm_90 (wgmma). What it runs for sm_90 is slow, but for laws 1, 2 and 5 on the
first case, which share their compiled kernels.
"""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import slow
import torch
import triton
from ptxemu import RaceError
from tiny_models import make, packed_row

import packattn
from benchmarks.compiled import GPUS
from benchmarks.emulated import KERNELS, emulate, launches
from packattn import PackedMask, attention
from packattn.attention import PackedAttention
from packattn.kernels import launch
from packattn.kernels.table import DIMS
from packattn.selftest import Case, assert_accurate, check_accuracy, check_isolation, packed, run, truth_and_naive

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def emulating(arch):
    """Launches are bound and compiled for a target by Triton's JIT, and run in the emulator with all its checks."""
    return launches(arch, partial(emulate, check_races=True, check_conflicts=True))


@pytest.fixture(params=[80, pytest.param(90, marks=pytest.mark.slow)], ids="sm_{}".format)
def emulator(request):
    """Kernels of a target in the emulator."""
    with emulating(request.param):
        yield


not_slow_on_sm_90 = pytest.mark.parametrize("emulator", [80, 90], indirect=True, ids="sm_{}".format)


def assert_compiled_is_accurate(case, dtype):
    """The accuracy law without the terms of (14): mma instructions round a score alike in all three passes here."""
    check_accuracy(case, "triton", dtype, "cpu", scores_round_alike=True)


# Every variant of the kernels at least three times, in company and alone.
CASES = [
    Case("straddling tiles, group of 3", [20, 1, 45, 30], heads_q=3, heads_k=1, head_dim=64),
    Case("group of 7", [20, 30], heads_q=7, heads_k=1, head_dim=32),
    Case("unmasked blocks", [300], heads_q=2, heads_k=2, head_dim=32),
    Case("around a tile", [63, 64, 65, 1], heads_q=1, head_dim=64),
    Case("one-token sequences", [1] * 70, head_dim=64),
    Case("window", [70, 30], heads_q=2, heads_k=2, head_dim=32, window=17),
    Case("window, group of 4", [130, 30], heads_q=4, heads_k=1, head_dim=64, window=50),
    Case("bidirectional", [40, 3, 50], heads_q=4, heads_k=2, head_dim=16, mask="bidirectional"),
    Case("bidirectional window", [100, 3, 50], head_dim=64, mask="bidirectional", window=9),
    Case("chunks", [100, 3, 50], head_dim=64, mask="chunked", window=32),
    Case("image blocks", [60, 50], head_dim=64, mask="images", window=20),
    Case("prefixes", [60, 50], head_dim=64, mask="prefix", window=24),
    Case("head dim 40", [20, 30], head_dim=40),
    Case("head dim 72", [20, 30], head_dim=72),
    Case("head dim 80", [20, 30], head_dim=80),
    Case("head dim 96", [20, 30], head_dim=96),
    Case("head dim 112", [20, 30], head_dim=112),
    Case("head dim 128", [50, 30], head_dim=128, heads_q=1),
    Case("head dim 128, group of 8", [50, 30], head_dim=128, heads_q=8),
    Case("head dim 160", [20, 30], head_dim=160),
    Case("head dim 192, values 128", [20, 30], head_dim=192, head_dim_v=128),
    Case("head dim 256", [20, 30], head_dim=256),
    Case("head dim 512", [20, 13], head_dim=512),
    Case("head dim 576, values 512", [20, 13], head_dim=576, head_dim_v=512),
    Case("value dim differs", [20, 30], head_dim=48, head_dim_v=32),
    Case("softcap", [40, 20], softcap=2.0, head_dim=64),
    Case("softcap, sinks, window", [40, 20], softcap=5.0, sinks=True, window=30),
    Case("softcap, alibi", [40, 20], softcap=5.0, alibi=True, head_dim=64),
    Case("sinks", [40, 20], sinks=True, heads_q=4, head_dim=64),
    Case("padding", [100, 30, 170], mask="padded", window=70),
    Case("empty spans", [], spans=([0, 0, 0, 2, 2, 5, 9], [0, 2, 2, 2, 7, 7, 9], 9)),
    Case("empty spans with sinks", [], spans=([0, 0, 4], [0, 2, 4], 9), sinks=True),
    Case("empty spans, head dim 128", [], spans=([0, 0, 4, 4], [0, 2, 4, 9], 9), head_dim=128, heads_q=1),
    Case("alibi", [40, 20], heads_q=4, heads_k=2, alibi=True, head_dim=64),
    Case("alibi, bidirectional", [40, 20], heads_q=3, alibi=True, mask="bidirectional"),
    Case("strided views", [30, 20], heads_q=4, heads_k=2, strided=True),
    Case("strided views, head dim 64", [30, 20], heads_q=2, heads_k=2, head_dim=64, strided=True),
    Case("strided views, head dim 80", [30, 20], heads_q=3, head_dim=80, strided=True),
]


# Each case below that is not slow compiles what no other does, or nothing at all.
SLOW = (
    "group of 7; around a tile; window, group of 4; head dim 40; head dim 72; head dim 96; head dim 112; head dim 128;"
    "head dim 160; head dim 192, values 128; head dim 256; head dim 512; value dim differs; softcap;"
    "softcap, sinks, window; empty spans, head dim 128; alibi; strided views, head dim 64"
)


SLOW_ON_SM_90 = ";".join(case.name for case in CASES[1:])


def on(arch, cases):
    """Parameters `emulator` and `case` of a target."""
    return [pytest.param(arch, *case.values, id=f"sm_{arch}-{case.id}", marks=case.marks) for case in cases]


@pytest.mark.parametrize(
    ("emulator", "case"),
    on(80, slow.cases(CASES, SLOW)) + on(90, slow.cases(CASES, SLOW_ON_SM_90)),
    indirect=["emulator"],
)
def test_compiled_bfloat16_is_accurate(emulator, case):
    assert_compiled_is_accurate(case, torch.bfloat16)


@pytest.mark.parametrize("case", slow.cases([CASES[0], CASES[6], CASES[17]], "window, group of 4; head dim 128"))
@pytest.mark.parametrize("arch", [86, pytest.param(89, marks=pytest.mark.slow)])
def test_compiled_kernels_of_other_targets_are_accurate(case, arch):
    with emulating(arch):
        assert_compiled_is_accurate(case, torch.bfloat16)


@pytest.mark.parametrize("case", slow.cases([CASES[0], CASES[6], CASES[28]], "window, group of 4; sinks"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiled_float16_and_float32_are_accurate(dtype, case, emulator):
    assert_compiled_is_accurate(case, dtype)


@pytest.mark.parametrize("lengths", [[20, 1, 45, 30], [1] * 40], ids=["sequences", "one-token-sequences"])
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 1e3)], ids=str
)
def test_large_scores_are_accurate(dtype, magnitude, lengths, emulator):
    case = Case("", lengths, heads_q=3, heads_k=1, head_dim=64, magnitude=magnitude, magnitude_v=1.0)
    assert_compiled_is_accurate(case, dtype)


DROPPED = [
    Case("no groups", [20, 30], heads_q=2, heads_k=2),
    Case("a group of 2", [20, 30], heads_q=2),
    Case("a window", [70], window=20),
]


@pytest.mark.parametrize("case", slow.cases(DROPPED, "no groups"))
def test_compiled_dropout_draws_the_bits_of_every_backend(case, emulator):
    q, k, v, *_ = case.tensors(torch.float32, "cpu")
    seed = torch.tensor([0x123456789ABCDEF])
    out = {}
    for backend in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, _ = PackedAttention.apply(*leaves, *case.packed_mask("cpu"), None, None, None, seed, 0.25, 0.0, 0.3, backend)
        out[backend] = [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]
    for one, other in zip(out["triton"], out["torch"], strict=True):
        torch.testing.assert_close(one, other)


@not_slow_on_sm_90
def test_law_2_compiled_kernels_do_not_leak(emulator):
    check_isolation(CASES[0], "triton", torch.bfloat16, "cpu")


@not_slow_on_sm_90
def test_law_5_compiled_kernels_are_deterministic(emulator):
    first, second = (run(packed("triton"), CASES[0], torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


BREAKS = {
    "no proxy fence": (r"fence\.proxy\.async\S*;", "", "without a fence.proxy.async"),
    "a wait too weak": (r"(wgmma\.wait_group\.sync\.aligned\s+)0;", r"\g<1>1;", "used before its wait"),
}


@pytest.mark.parametrize("change", BREAKS)
@pytest.mark.parametrize("kernel", ["_fwd_kernel", *(pytest.param(k, marks=pytest.mark.slow) for k in KERNELS[2:])])
def test_kernels_of_sm_90_that_are_broken_are_reported(kernel, change):
    pattern, replacement, what = BREAKS[change]

    def broken(compiled, *launch):
        ptx = compiled.asm["ptx"]
        if compiled.metadata.name == kernel:
            ptx, count = re.subn(pattern, replacement, ptx)
            assert count
        copy = SimpleNamespace(metadata=compiled.metadata, asm={"ptx": ptx})
        emulate(copy, *launch, check_races=True, allow_missing=())

    with launches(90, broken), pytest.raises(RaceError, match=what):
        run(packed("triton"), CASES[0], torch.bfloat16, "cpu")


def test_law_7_the_grid_depends_on_the_number_of_tokens_only(monkeypatch):
    launches = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.name, grid, kwargs.get("BLOCK_M")))

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Recorded(name))
    seen = []
    for lengths in ([512], [1] * 512, [100, 12, 400]):
        launches.clear()
        run(packed("triton"), Case("", lengths), torch.float32, "cpu")
        seen.append(list(launches))
    assert len(seen[0]) == 4
    assert seen[0] == seen[1] == seen[2]


def test_a_cpu_tensor_is_refused_outside_the_interpreter():
    with pytest.raises(NotImplementedError, match="tensors are on the CPU, where Triton runs only in its interpreter"):
        run(packed("triton"), CASES[0], torch.float32, "cpu")


def test_every_reason_is_given():
    with pytest.raises(NotImplementedError, match=r"on the CPU, .*; head dim 640 > 576. Use backend=\"torch\""):
        run(packed("triton"), Case("", [4], head_dim=640), torch.float32, "cpu")


def inputs(tokens, aligned, heads_q=3, heads_k=1, dim=64, dtype=torch.bfloat16):
    """q, k, v; unaligned: their memory begins at an odd element, and rows are an odd number of elements apart."""
    tensors = []
    for heads in (heads_q, heads_k, heads_k):
        if aligned:
            x = torch.zeros(tokens, heads, dim, dtype=dtype)
        else:
            wide = heads * dim + 1
            x = torch.zeros(tokens * wide + 1, dtype=dtype)[1:].view(tokens, wide)[:, :-1].unflatten(1, (heads, dim))
        tensors.append(x.requires_grad_())
    return tensors


# Not slow: a target of each family of the launch table but sm80, whose launches run in the emulator.
FAMILIES = [(target, True, 16_384) for target in (86, 90, 100, "gfx942")]
LAUNCHES = [(target, aligned, tokens) for target in GPUS for aligned in (True, False) for tokens in (1, 16_384, 16_385)]
LAUNCHES = [pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAMILIES)) for case in LAUNCHES]


@pytest.mark.parametrize(("target", "aligned", "tokens"), LAUNCHES)
def test_every_launch_compiles_for_every_target(target, aligned, tokens, monkeypatch):
    monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
    found = []
    with launches(target, lambda compiled, *_: found.append(compiled)):
        q, k, v = inputs(tokens, aligned)
        mask = packattn.schedule(PackedMask.causal(lengths=[tokens]), heads_q=3, heads_k=1, head_dim=64, dtype=q.dtype)
        sinks = torch.zeros(3, requires_grad=True)
        out = packattn.packed_attention(q, k, v, mask, sinks=sinks, backend="triton")
        torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert len(found) == 4
    for kernel in found:
        assert kernel.metadata.target.arch == target
        assert kernel.metadata.shared <= GPUS[target].block_shared, kernel.metadata.name


def test_every_launch_asks_for_fused_multiply_add(monkeypatch):
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    fused = []
    with launches(80, lambda compiled, *_: fused.append(compiled.metadata.enable_fp_fusion)):
        run(packed("triton"), CASES[0], torch.bfloat16, "cpu")
    assert fused == [True] * 4


@pytest.mark.parametrize("heads_q", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_another_number_of_tokens_compiles_no_kernel_anew(heads_q, monkeypatch):
    monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
    found = []
    with launches(80, lambda compiled, *_: found.append((compiled.metadata.name, compiled.hash))):
        for tokens in (40_000, 40_001, 40_111, 40_222, 40_333):
            q, k, v = inputs(tokens, True, heads_q=heads_q, dim=16)
            mask = packattn.schedule(
                PackedMask.causal(lengths=[tokens]), heads_q=heads_q, heads_k=1, head_dim=16, dtype=q.dtype
            )
            out = packattn.packed_attention(q, k, v, mask, backend="triton")
            torch.autograd.grad(out.sum(), (q, k, v))
    assert len(found) == 5 * 4
    assert len(set(found)) == 4


def test_unaligned_views_are_accurate_in_the_emulator(emulator):
    case = Case("unaligned", [30, 20], heads_q=3, heads_k=1, head_dim=64)
    tensors = case.tensors(torch.bfloat16, "cpu")
    views = [x.detach().copy_(y) for x, y in zip(inputs(50, False), tensors, strict=False)]
    truth, naive = truth_and_naive(case, torch.bfloat16, "cpu")
    out, _ = PackedAttention.forward(Context(), *views, *case.packed_mask("cpu"), None, None, None, None, 0.125, 0.0,
                                     0.0, "triton")  # fmt: skip
    assert_accurate("out", out, truth["out"], naive["out"])


class Context:
    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


def test_the_order_of_the_tiles_is_by_work_and_changes_no_bit(emulator, monkeypatch):
    monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
    lengths = [10, 200, 3, 60]
    mask = PackedMask.causal(lengths=lengths)
    ordered = packattn.schedule(mask, heads_q=2, heads_k=1, head_dim=16, dtype=torch.bfloat16)
    order = ordered.order.tiles
    plan = launch.plan(2, 1, 16, 16, torch.bfloat16, torch.device("cpu"))
    spans = (mask[:2], mask[:2], mask[2:4])
    for tiles, (rows, each), (start, end) in zip(order.split(plan.tiles(273, 273)), plan.rows, spans, strict=True):
        assert sorted(tiles.tolist()) == list(range(-(-273 * each // rows)))
        work = [int(end[min((t * rows + rows - 1) // each, 272)] - start[t * rows // each]) for t in tiles.tolist()]
        assert work == sorted(work, reverse=True)
    short = ordered._replace(order=ordered.order._replace(tiles=order[1:]))
    assert_no_bit_changes(Case("", lengths), mask, ordered, short)


def test_an_order_of_another_shape_is_left_alone(emulator, monkeypatch):
    # One with as many tiles in all, as (2, 4, 2) and (2, 2, 4): each pass would take tiles of another.
    monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
    mask = PackedMask.causal(lengths=[100, 28])

    def tiles(heads, dim):
        return launch.plan(heads, 1, dim, dim, torch.bfloat16, torch.device("cpu")).tiles(128, 128)

    own = tiles(2, 32)
    shapes = [(n, dim) for dim in DIMS for n in range(1, 9) if tiles(n, dim) != own and sum(tiles(n, dim)) == sum(own)]
    heads, dim = shapes[0]
    other = packattn.schedule(mask, heads_q=heads, heads_k=1, head_dim=dim, dtype=torch.bfloat16)
    assert len(other.order.tiles) == sum(own)
    assert_no_bit_changes(Case("", [100, 28], heads_q=2, heads_k=1, head_dim=32), mask, other)


def assert_no_bit_changes(case, *masks):
    q, k, v, *_ = case.tensors(torch.bfloat16, "cpu")
    results = []
    for mask in masks:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = packattn.packed_attention(*leaves, mask, backend="triton")
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lengths", [[3775, 89, 1262, 444, 2140, 482], [400, 90] * 8, [64] * 9, [1]])
def test_multiprocessors_get_equal_shares_of_the_programs_that_start_at_once(monkeypatch, lengths):
    plan = launch.plan(8, 2, 128, 128, torch.bfloat16, torch.device("cpu"))
    mask, tokens = PackedMask.causal(lengths=lengths), sum(lengths)
    programs = 2 * plan.split(tokens)  # of a tile
    busiest = []
    for count in (1, 128):  # multiprocessors
        monkeypatch.setattr(launch, "multiprocessors", lambda device, count=count: count)
        order = launch.launch_order(*mask[:4], 8, 2, 128, 128, torch.bfloat16)
        tiles = order.split(plan.tiles(tokens, tokens))[2]
        assert sorted(tiles.tolist()) == list(range(len(tiles)))
        first = tiles * plan.dkdv.block_n
        work = mask.q_end[(first + plan.dkdv.block_n - 1).clamp(max=tokens - 1)] - mask.q_start[first]
        assert count > 1 or work.tolist() == sorted(work.tolist(), reverse=True)
        started = work.repeat_interleave(programs)[: 128 * 8 // plan.dkdv.num_warps]
        busiest.append(int(torch.zeros(128).index_add(0, torch.arange(len(started)) % 128, started.float()).max()))
    assert busiest[1] <= busiest[0]
    if lengths[0] == 3775:
        assert busiest[1] < 1.02 * started.sum() / 128 < 1.35 * started.sum() / 128 < busiest[0]


def test_tiles_are_not_dealt_where_few_of_them_start_at_once(monkeypatch):
    mask = PackedMask.causal(lengths=[400, 90] * 8)  # 123 tiles of dK/dV
    orders = []
    for count in (1, 15, 16):  # four tiles each start at once, on 8 multiprocessors: 2 heads, split in 4
        monkeypatch.setattr(launch, "multiprocessors", lambda device, count=count: 8 * count)
        orders.append(launch.launch_order(*mask[:4], 8, 2, 128, 128, torch.bfloat16))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_traces_the_order_into_its_one_graph(monkeypatch, dynamic):
    monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def order(position_ids):
        mask = PackedMask.causal(packattn.boundaries(position_ids))
        return packattn.schedule(mask, heads_q=6, heads_k=2, head_dim=64, dtype=torch.bfloat16).order.tiles

    compiled = torch.compile(order, fullgraph=True, backend=count, dynamic=dynamic)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 12)
    for lengths in ([300, 50, 70], [420], [30] * 14):
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        assert torch.equal(compiled(position_ids), order(position_ids))
    assert len(graphs) == 1


def test_a_compiled_model_orders_its_tiles(monkeypatch):
    graphs = []

    class Traced(Exception):
        pass

    def keep(graph, inputs):
        def run(*_):
            raise Traced

        graphs.append(graph)
        return run

    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama", [7, 33])
    del batch["labels"]  # which have a graph of their own, before that of the model
    with packattn.patch(model), torch.no_grad():
        monkeypatch.setattr(attention, "default_backend", lambda device, dtype: "triton")
        with pytest.raises(Traced):
            torch.compile(model, fullgraph=True, backend=keep)(**batch, use_cache=False)
    (graph,) = graphs
    assert sum(node.target is torch.sort for node in graph.graph.nodes) == 3  # forward, dQ and dK/dV


def test_a_small_problem_is_split_over_the_heads_of_a_group(emulator, monkeypatch):
    case = Case("group of 6", [40, 30], heads_q=6, heads_k=1, head_dim=32)
    splits = []
    for enough in (1, 4, 256):
        monkeypatch.setattr(launch, "_ENOUGH_PROGRAMS", enough)
        splits.append(launch.plan(6, 1, 32, 32, torch.bfloat16, torch.device("cpu")).split(70))
        assert_compiled_is_accurate(case, torch.bfloat16)
    assert splits[0] == 1
    assert splits[0] < splits[1] <= splits[2] == 6
