"""Ways to run attention over packed sequences on a CPU, ours among them, and what a machine can do at most."""

import ctypes
import gc
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import packattn
from packattn import PackedMask

PADDED_BATCH = 8


class Shape(NamedTuple):
    """Heads of a model."""

    heads_q: int
    heads_k: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads_q} heads on {self.heads_k}, dim {self.head_dim}"


class Problem(NamedTuple):
    """Causal attention of sequences packed into one row."""

    lengths: list[int]
    shape: Shape
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def flops(self, backward: bool) -> float:
        """Of the pairs that the mask shows: 2 products forward, 5 backward."""
        pairs = sum(n * (n + 1) // 2 for n in self.lengths) * self.shape.heads_q
        return pairs * 2 * self.shape.head_dim * (7 if backward else 2)

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.shape.heads_q, self.shape.heads_k, self.shape.heads_k, self.shape.heads_q)
        made = [torch.randn(self.tokens, n, self.shape.head_dim, generator=generator).to(self.dtype) for n in heads]
        return [*(x.requires_grad_() for x in made[:3]), made[3]]


class Run(NamedTuple):
    """One way set up: call() gives outputs, whose gradients are `grads`, with respect to `leaves`."""

    call: Callable[[], list[Tensor]]
    leaves: list[Tensor]
    grads: list[Tensor]
    backward: bool = True


def ours(problem: Problem) -> Run:
    """packattn."""
    q, k, v, dout = problem.tensors()
    mask = PackedMask.causal(lengths=problem.lengths)
    return Run(lambda: [packattn.packed_attention(q, k, v, mask)], [q, k, v], [dout])


def _batched(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def per_sequence(problem: Problem) -> Run:
    """scaled_dot_product_attention for each of q.split(lengths), which is its fastest way: slices in the loop cost a
    backward pass quadratic in the number of sequences."""
    q, k, v, dout = problem.tensors()
    group = problem.shape.heads_q != problem.shape.heads_k

    def call() -> list[Tensor]:
        parts = zip(*(x.split(problem.lengths) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(*map(_batched, part), is_causal=True, enable_gqa=group)[0].transpose(0, 1)
            for part in parts
        ]
        return [torch.cat(outs)]

    return Run(call, [q, k, v], [dout])


def padded(problem: Problem) -> Run:
    """scaled_dot_product_attention on batches of 8 sequences, padded beforehand."""
    *inputs, dout = (x.detach() for x in problem.tensors())
    group = problem.shape.heads_q != problem.shape.heads_k

    def pad(x: Tensor) -> list[Tensor]:
        parts = x.split(problem.lengths)
        batches = [parts[i : i + PADDED_BATCH] for i in range(0, len(parts), PADDED_BATCH)]
        stacked = [torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True) for batch in batches]
        return [batch.transpose(1, 2).contiguous() for batch in stacked]

    q, k, v = ([x.requires_grad_() for x in pad(x)] for x in inputs)

    def call() -> list[Tensor]:
        parts = zip(q, k, v, strict=True)
        return [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=group) for part in parts]

    return Run(call, [*q, *k, *v], pad(dout))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def dense(problem: Problem) -> Run:
    """scaled_dot_product_attention with a dense block-diagonal mask and repeated key heads, as transformers does."""
    q, k, v, dout = problem.tensors()
    mask = PackedMask.causal(lengths=problem.lengths).to_dense()[None, None]

    def call() -> list[Tensor]:
        full = (_batched(_repeated(x, problem.shape.heads_q)) for x in (q, k, v))
        return [F.scaled_dot_product_attention(*full, attn_mask=mask)[0].transpose(0, 1)]

    return Run(call, [q, k, v], [dout])


def nested(problem: Problem) -> Run:
    """scaled_dot_product_attention on jagged nested tensors."""
    q, k, v, dout = problem.tensors()
    offsets = torch.tensor([0, *torch.tensor(problem.lengths).cumsum(0).tolist()])
    longest = max(problem.lengths)

    def call() -> list[Tensor]:
        jagged = (
            torch.nested.nested_tensor_from_jagged(
                _repeated(x, problem.shape.heads_q), offsets, min_seqlen=1, max_seqlen=longest
            ).transpose(1, 2)
            for x in (q, k, v)
        )
        return [F.scaled_dot_product_attention(*jagged, is_causal=True).transpose(1, 2).values()]

    return Run(call, [q, k, v], [dout])


def flex(problem: Problem) -> Run:
    """FlexAttention, compiled; it has no backward pass on a CPU. The block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, dout = (x.detach() for x in problem.tensors())
    group = problem.shape.heads_q != problem.shape.heads_k
    document = torch.repeat_interleave(torch.arange(len(problem.lengths)), torch.tensor(problem.lengths))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    mask = create_block_mask(visible, None, None, problem.tokens, problem.tokens, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> list[Tensor]:
        full = (_batched(x).contiguous() for x in (q, k, v))
        return [compiled(*full, block_mask=mask, enable_gqa=group)[0].transpose(0, 1)]

    return Run(call, [q, k, v], [dout], backward=False)


WAYS: dict[str, Callable[[Problem], Run]] = {
    "packattn": ours,
    "SDPA per sequence": per_sequence,
    "SDPA padded": padded,
    "SDPA dense mask": dense,
    "SDPA nested": nested,
    "FlexAttention": flex,
}


class Peak:
    """The float32 multiply-adds of all threads of torch, by a loop compiled here (cpu_peak.cpp)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "peak.so"
        source = Path(__file__).parent / "cpu_peak.cpp"
        subprocess.run(["c++", "-O3", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        self._loop = ctypes.CDLL(str(library)).fma_loop
        self._loop.restype, self._loop.argtypes = ctypes.c_double, [ctypes.c_long]

    def measure(self, rounds: int = 10_000_000, clock: Callable[[], float] = time.perf_counter) -> float:
        """FLOP/s now, other programs on the machine included; for one thread, by time.thread_time, without them."""
        time.sleep(0.02)  # torch's threads wait for more work in a loop of their own before they let go of their cores
        done: list[float] = []

        def loop() -> None:
            done.append(self._loop(rounds))

        others = [threading.Thread(target=loop) for _ in range(torch.get_num_threads() - 1)]
        begin = clock()
        for thread in others:
            thread.start()
        loop()
        for thread in others:
            thread.join()
        return sum(done) / (clock() - begin)


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: now, and at most since `forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """Freed memory goes back to Linux, which counts the most memory anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that work() takes at most beyond what is there."""
    forget_peak()
    before, _ = resident()
    kept = work()
    _, most = resident()
    del kept
    return most - before
