"""The CPU backend: every instruction set, any number of threads, memory, overhead, and what its binary holds."""

import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import packattn
from packattn import _C, PackedMask
from packattn.attention import PackedAttention
from packattn.schemas import INSTRUCTION_SETS
from packattn.selftest import (
    CASES,
    ISOLATION_CASES,
    Case,
    assert_accurate,
    cancelling_terms,
    run,
    run_on,
    truth_and_naive,
)


def usable(name):
    """Whether this CPU has the instruction set."""
    q = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    mask = PackedMask.causal(lengths=[1])
    try:
        PackedAttention.apply(q, q, q, *mask, None, None, None, None, 1.0, 0.0, 0.0, f"cpu_{name}")
    except RuntimeError as error:
        if "call attention_*_cpu" not in str(error):
            raise
        return False
    return True


USABLE = [name for name in INSTRUCTION_SETS if usable(name)]
SETS = [name for name in USABLE if name not in ("avx512bf16", "avx512pairs")]  # of float32


def on(backend, dropout_p=0.0, seed=None):
    """Attention by one operator, with the arguments of packed_attention_with_lse."""

    def call(q, k, v, mask, *, softmax_scale=None, softcap=0.0, sinks=None, alibi_slopes=None):
        tokens, heads, dim = q.shape
        slopes = None if alibi_slopes is None else alibi_slopes[:, None].expand(heads, tokens)
        anchors = None if alibi_slopes is None else torch.arange(tokens, dtype=torch.int32)
        scale = dim**-0.5 if softmax_scale is None else softmax_scale
        return PackedAttention.apply(
            q, k, v, *mask, sinks, slopes, anchors, seed, scale, softcap, dropout_p, backend
        )  # fmt: skip

    return call


def test_the_portable_set_is_always_there_and_an_absent_one_says_so():
    assert "portable" in SETS
    for name in set(INSTRUCTION_SETS) - set(SETS):
        with pytest.raises(RuntimeError, match="call attention_"):
            run(on(f"cpu_{name}"), CASES[0], torch.float32, "cpu")
    for name in set(INSTRUCTION_SETS) - set(USABLE):
        with pytest.raises(RuntimeError, match=r"this CPU has no|AVX was not compiled"):
            run(on(f"cpu_{name}"), CASES[0], torch.bfloat16, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_instruction_set_is_accurate(case):
    dtypes = [torch.float32, torch.bfloat16]
    if case.name in ("group of 3", "head dim 40", "softcap, sinks, window", "strided views"):
        dtypes.append(torch.float16)
    for dtype in dtypes:
        truth, naive = truth_and_naive(case, dtype, "cpu")
        terms = cancelling_terms(case, dtype, "cpu", scores_round_alike=True)
        for name in USABLE if dtype == torch.bfloat16 else SETS:
            found = run(on(f"cpu_{name}"), case, dtype, "cpu")
            for key in truth:
                assert_accurate(f"{key} in {dtype} by {name}", found[key], truth[key], naive[key], terms.get(key, 0.0))


@pytest.mark.parametrize("case", ISOLATION_CASES, ids=lambda case: case.name)
def test_every_instruction_set_drops_the_same_scores(case):
    seed = torch.tensor([0x123456789ABCDEF])
    for dtype, names, close in ((torch.float32, SETS, 1e-4), (torch.bfloat16, USABLE, 4e-2)):
        found = [run(on(f"cpu_{name}", 0.3, seed), case, dtype, "cpu") for name in names]
        for other in found[1:]:
            for key, value in found[0].items():
                torch.testing.assert_close(other[key], value, rtol=close, atol=close * value.abs().max().item())


@pytest.mark.parametrize("case", ISOLATION_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", USABLE)
def test_law_2_no_leak_in_any_instruction_set(case, name):
    begin, end = sum(case.lengths[:2]), sum(case.lengths[:3])
    tensors = case.tensors(torch.bfloat16, "cpu")
    changed = [x.clone() for x in tensors]
    for x in (*changed[:3], changed[4]):
        x[begin:end] *= -3.0
    before, after = (run_on(on(f"cpu_{name}"), case, x, "cpu") for x in (tensors, changed))
    for key in before:
        value, other = (x[key].T if key == "lse" else x[key] for x in (before, after))
        assert not torch.equal(value[begin:end], other[begin:end])
        assert torch.equal(value[:begin], other[:begin])
        assert torch.equal(value[end:], other[end:])


@pytest.mark.parametrize("name", SETS)
def test_the_exponential_keeps_its_stated_error(name):
    # Two keys of scores 0 and x <= 0, values 0 and 1: out = exp(x) / (1 + exp(x)), exact but for exp and two roundings.
    x = torch.cat([torch.linspace(-80, 0, 40_001), -torch.logspace(-7, 1, 4_000)])
    n = x.numel()
    k = torch.stack([torch.zeros(n), x], 1).reshape(2 * n, 1, 1)
    v = torch.tensor([0.0, 1.0]).repeat(n).reshape(2 * n, 1, 1)
    start = torch.arange(0, 2 * n, 2, dtype=torch.int32)
    mask = PackedMask.from_spans(start, start + 2, 2 * n)
    out, _ = on(f"cpu_{name}")(torch.ones(n, 1, 1), k, v, mask, softmax_scale=1.0)
    truth = torch.sigmoid(x.double())
    error = ((out.view(-1).double() - truth) / truth).abs()
    unit = torch.finfo(torch.float32).eps
    assert (error <= 4 * unit + 7.5e-8 * x.double().abs()).all(), (error / unit).max()


THREADED = [
    Case("one sequence", [3000], heads_q=1, heads_k=1, head_dim=32),
    Case("one long among short", [7, 40, 2500, 3, 90, 11], heads_q=3, heads_k=1, head_dim=16),
    Case("window", [1500, 800], heads_q=4, heads_k=2, head_dim=16, window=100),
    Case("group larger than a tile", [200, 90], heads_q=130, heads_k=1, head_dim=8),
    Case("softcap, sinks", [1500, 20], heads_q=2, heads_k=1, head_dim=16, softcap=3.0, sinks=True),
]


@pytest.fixture
def threads():
    """The number of torch's threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", THREADED, ids=lambda case: case.name)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_law_5_any_number_of_threads_gives_the_same_bits(case, dropout_p, threads):
    seed = torch.tensor([5])
    problems = [("cpu", torch.float32)]
    if "avx512pairs" in USABLE:
        problems.append(("cpu_avx512pairs", torch.bfloat16))  # where it also matters which rows make a pair
    for name, dtype in problems:
        threads(1)
        expected = run(on(name, dropout_p, seed), case, dtype, "cpu")
        for count in (2, 3, 8):
            threads(count)
            found = run(on(name, dropout_p, seed), case, dtype, "cpu")
            for key, value in expected.items():
                assert torch.equal(found[key], value), f"{key} in {dtype} with {count} threads"


def own_threads():
    """Threads of this process that Python did not start."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


class Attending(torch.utils.data.Dataset):
    """Attention where the examples of a DataLoader are made: out, dq, and the threads that it took."""

    def __init__(self, case):
        self.case = case

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.ones(1, requires_grad=True).backward()  # autograd has a thread of its own
        before = own_threads()
        found = run(packattn.packed_attention_with_lse, self.case, torch.float32, "cpu", seed=index)
        return found["out"], found["dq"], own_threads() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_data_loader_worker_starts_no_threads(threads):
    case = Case("several units", [700, 300, 500], heads_q=4, heads_k=2, head_dim=32)
    threads(4)
    expected = [run(packattn.packed_attention_with_lse, case, torch.float32, "cpu", seed=i) for i in range(4)]
    assert own_threads() >= 3  # here it runs on four
    loader = torch.utils.data.DataLoader(Attending(case), batch_size=None, num_workers=2, timeout=60)
    for found, (out, dq, started) in zip(expected, loader, strict=True):
        assert torch.equal(out, found["out"])
        assert torch.equal(dq, found["dq"])
        assert started == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_backward_pass_in_another_thread_takes_no_more_threads_than_torch_has(threads):
    threads(3)
    case = Case("several units", [700, 300, 500], heads_q=4, heads_k=2, head_dim=32)
    expected = run(packattn.packed_attention_with_lse, case, torch.float32, "cpu")
    found, most = [], []

    def work():
        before = own_threads()
        found.append(run(packattn.packed_attention_with_lse, case, torch.float32, "cpu"))
        most.append(own_threads() - before)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert max(most) <= 2  # beside the one that calls
    for result in found:
        for name, value in expected.items():
            assert torch.equal(result[name], value), name


MEMORY = """
import sys, torch, packattn
from benchmarks.cpu_attention import Problem, Shape, ours, peak_memory
def most(lengths):
    run = ours(Problem(lengths, Shape(4, 2, 32), torch.float32))
    return peak_memory(lambda: torch.autograd.grad(run.call(), run.leaves, run.grads)) / sum(lengths)
most([64])
print(*(most(lengths) for lengths in ([256] * 64, [256] * 128, [4096], [8192])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_law_6_memory_is_linear_in_the_tokens():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=root, check=True)
    many, more, long, longer = map(float, done.stdout.split())
    # A token's out, dq, dk, dv and lse are 1,552 bytes; a thread's sums for the keys of its sequence 256 more.
    assert max(many, more, long, longer) < 2 * (1552 + 256 * torch.get_num_threads()), done.stdout


class Calls(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_law_7_forward_and_backward_are_one_operator_each_however_many_the_sequences():
    # What they cost beside a copy of the rows is measured by `python -m benchmarks.bench_attention --limits`.
    seen = []
    for lengths in ([1], [16], [1] * 600, [100, 1, 499]):
        case = Case("", lengths)
        leaves = [x.requires_grad_() for x in case.tensors(torch.float32, "cpu")[:3]]
        mask = case.packed_mask("cpu")
        with Calls() as calls:
            out = packattn.packed_attention(*leaves, mask)
            torch.autograd.grad(out, leaves, out)
        del calls.count["aten.detach.default"]  # another name for the same memory
        seen.append(calls.count)
    one = {"packattn.attention_forward_cpu.default": 1, "packattn.attention_backward_cpu.default": 1}
    assert seen == [one] * 4


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_registers_are_used_only_behind_the_dispatch():
    # A template that two instruction sets share would be linked once, for the wider of them: the binary must not run
    # such code elsewhere.
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {"zmm": set(), "ymm": set()}
    for name, body in re.findall(r"^[0-9a-f]+ <([^>]+)>:\n((?:.+\n)*)", listing, re.M):
        for register, users in found.items():
            if register in body:
                users.add(name)
    assert all("avx512" in name for name in found["zmm"])
    assert all("avx512" in name or "avx2" in name for name in found["ymm"])
    if "avx512" in SETS:
        assert found["zmm"]
