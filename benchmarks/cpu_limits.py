"""What the CPU kernel promises at its limits, measured, and what a library's small products would give."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

import packattn
from benchmarks.cpu_attention import Peak, Problem, Shape, ours, peak_memory
from packattn import PackedMask


def median_seconds(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median time of work()."""
    times = []
    for _ in range(rounds):
        begin = clock()
        work()
        times.append(clock() - begin)
    return statistics.median(times)


def limits(peak: Peak) -> Iterator[str]:
    """Lines of text, one for each promise."""
    for dtype in (torch.float32, torch.bfloat16):
        run = ours(Problem([1024] * 128, Shape(8, 8, 64), dtype))
        most = peak_memory(lambda run=run: torch.autograd.grad(run.call(), run.leaves, run.grads))
        inputs = sum(x.numel() * x.element_size() for x in (*run.leaves, *run.grads))
        yield (
            f"131,072 tokens, 8 heads of 64, sequences of 1,024, {dtype}, forward and backward: "
            f"{most / 2**20:,.0f} MiB beyond the inputs of {inputs / 2**20:,.0f} MiB"
        )
        del run
    q, k, v, _ = (x.detach() for x in Problem([1] * 65_536, Shape(8, 8, 64), torch.float32).tensors())
    mask = PackedMask.causal(lengths=[1] * 65_536)
    out = torch.empty_like(q)
    targets = [torch.empty_like(x) for x in (q, k, v, out)]

    def copy() -> None:
        for target, source in zip(targets, (q, k, v, out), strict=True):
            target.copy_(source)

    times = [
        (median_seconds(copy, 1), median_seconds(lambda: packattn.packed_attention(q, k, v, mask), 1))
        for _ in range(15)
    ]
    copied, attended = (statistics.median(x) for x in zip(*times, strict=True))
    yield (
        f"65,536 sequences of 1 token, 8 heads of 64: {attended * 1e3:.1f} ms, "
        f"{attended / copied:.2f} times a copy of q, "
        f"k, v and out ({copied * 1e3:.1f} ms)"
    )
    q, k, v, _ = (x.detach() for x in Problem([16], Shape(8, 8, 64), torch.float32).tensors())
    mask = PackedMask.causal(lengths=[16])
    operator = torch.ops.packattn.attention_forward_cpu.default
    rest = (None, None, None, None, 0.125, 0.0, 0.0)
    calls = {
        "packed_attention": lambda: packattn.packed_attention(q, k, v, mask),
        "the operator": lambda: operator(q, k, v, *mask, *rest),
        "addition": lambda: torch.add(q, k),
    }
    taken = {}
    for name, call in calls.items():
        median_seconds(call, 200)
        taken[name] = median_seconds(call, 2000)
    for name in ("packed_attention", "the operator"):
        yield (
            f"16 tokens, 8 heads of 64: {name}, {taken[name] * 1e6:.1f} microseconds, "
            f"{taken[name] / taken['addition']:.1f} times torch's sum of q and k"
        )


def products(peak: Peak) -> Iterator[str]:
    """The products of one tile of 64 queries and block of 96 keys by torch's (MKL's) matrix products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, rows, columns, depth in (("scores", 96, 64, 64), ("values", 64, 64, 96), ("keys", 96, 64, 64)):
        count = 256
        a, b = torch.randn(count, rows, depth), torch.randn(count, depth, columns)
        out = torch.empty(count, rows, columns)

        def one_by_one(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            for left, right, to in zip(a, b, out, strict=True):
                torch.mm(left, right, out=to)

        def batched(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.bmm(a, b, out=out)

        flops = 2.0 * count * rows * columns * depth
        shares: dict[str, list[float]] = {"mm": [], "bmm": []}
        for _ in range(15):
            most = peak.measure(1_000_000, time.thread_time)
            shares["mm"].append(flops / median_seconds(one_by_one, 1, time.thread_time) / most)
            shares["bmm"].append(flops / median_seconds(batched, 1, time.thread_time) / most)
        yield f"{name}, {rows} x {columns} x {depth}, one thread: " + ", ".join(
            f"{way} {statistics.median(found):.0%} of the peak" for way, found in shares.items()
        )
    for dim in (64, 128):
        run = ours(Problem([1024] * 4, Shape(4, 4, dim), torch.float32))
        flops = Problem([1024] * 4, Shape(4, 4, dim), torch.float32).flops(True)
        shares = {"all": []}
        for _ in range(15):
            most = peak.measure(1_000_000, time.thread_time)
            taken = median_seconds(
                lambda run=run: torch.autograd.grad(run.call(), run.leaves, run.grads), 1, time.thread_time
            )
            shares["all"].append(flops / taken / most)
        yield f"ours, all of attention, dim {dim}, one thread: {statistics.median(shares['all']):.0%} of the peak"
    torch.set_num_threads(threads)
