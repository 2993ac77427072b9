"""Named attention problems, the accuracy law, and a run of both on the user's own device.

The test suite takes its cases and its only tolerance from here; `python -m packattn selftest` runs them on a GPU that
nobody tried yet.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from packattn import reference
from packattn.attention import Backend, packed_attention_with_lse
from packattn.boundaries import Boundaries, boundaries
from packattn.mask import PackedMask

Attention = Callable[..., tuple[Tensor, Tensor]]


def assert_accurate(name: str, actual: Tensor, truth: Tensor, naive: Tensor, terms: float = 0.0) -> None:
    """The accuracy law, the only tolerance of the test suite.

    truth is float64, naive the plain implementation run in the dtype of the kernel: the kernel's error may be twice
    that of naive, plus one rounding of the largest true value. `terms` is the largest sum of absolute terms that
    cancel in the value (see `cancelling_terms`): their float32 rounding is allowed as well.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    actual64, naive64 = actual.double().cpu(), naive.double().cpu()
    infinite = torch.isinf(truth)
    assert torch.equal(actual64[infinite], truth[infinite]), f"{name}: infinities differ"
    actual64, naive64, truth = (x.masked_fill(infinite, 0.0) for x in (actual64, naive64, truth))
    assert torch.isfinite(actual64).all(), f"{name}: {(~torch.isfinite(actual64)).sum()} values are not finite"
    if truth.numel() == 0:
        return
    # Where the plain implementation overflows, it allows nothing.
    naive64 = torch.where(torch.isfinite(naive64), naive64, truth)
    error, naive_error = (actual64 - truth).abs(), (naive64 - truth).abs()
    rounding = torch.finfo(naive.dtype).eps
    cancelled = torch.finfo(torch.float32).eps * terms
    allowed = 2 * naive_error.max() + rounding * truth.abs().max() + cancelled
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} > {allowed:.3e} at {tuple(int(i) for i in worst)}: "
        f"got {actual64[worst]:.6e}, truth {truth[worst]:.6e}, naive {naive64[worst]:.6e}"
    )
    assert error.mean() <= 2 * naive_error.mean() + rounding * truth.abs().mean() + cancelled, (
        f"{name}: mean error {error.mean():.3e}, naive {naive_error.mean():.3e}"
    )


def _position(found: Boundaries) -> Tensor:
    """The index of each token in its sequence."""
    return torch.arange(found.seq_start.numel(), dtype=torch.int32) - found.seq_start


def _chunked(found: Boundaries, size: int) -> PackedMask:
    return PackedMask.chunked(found, size, _position(found))


def _images(found: Boundaries, size: int) -> PackedMask:
    """Every second `size` tokens of a sequence see each other, as the tokens of an image do."""
    block = _position(found) // size
    return PackedMask.causal(found, blocks=torch.where(block % 2 == 1, block, -1))


def _prefix(found: Boundaries, size: int) -> PackedMask:
    """The first `size` tokens of a sequence see each other."""
    return PackedMask.causal(found, blocks=torch.where(_position(found) < size, 0, -1))


def _padded(found: Boundaries, size: int) -> PackedMask:
    """The last `size` tokens of the first sequence and of the stream are padding."""
    position, last = _position(found), found.seq_end.numel()
    left = found.seq_end - found.seq_start - position  # tokens of the sequence from each on
    real = (left > size) | ((found.seq_start > 0) & (found.seq_end < last))
    return PackedMask.causal(boundaries(position, real))


# What `window` means to each: tokens visible, distance visible, chunk, tokens of an image, of a prefix, of padding.
_MASKS: dict[str, Callable[[Boundaries, Any], PackedMask]] = {
    "causal": lambda found, size: PackedMask.causal(found, window=size),
    "bidirectional": lambda found, size: PackedMask.bidirectional(found, window=size),
    "chunked": _chunked,
    "images": _images,
    "prefix": _prefix,
    "padded": _padded,
}


@dataclass
class Case:
    """One named attention problem; every row of the table is there for a reason."""

    name: str
    lengths: list[int]
    heads_q: int = 2
    heads_k: int = 1
    head_dim: int = 16
    head_dim_v: int | None = None
    mask: str = "causal"
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    scale: float | None = None
    magnitude: float = 1.0
    magnitude_v: float | None = None
    strided: bool = False
    spans: tuple[list[int], list[int], int] | None = field(default=None, repr=False)

    def packed_mask(self, device: str) -> PackedMask:
        if self.spans is not None:
            k_start, k_end = (torch.tensor(s, dtype=torch.int32, device=device) for s in self.spans[:2])
            return PackedMask.from_spans(k_start, k_end, self.spans[2])
        mask = _MASKS[self.mask](Boundaries.from_lengths(self.lengths), self.window)
        return PackedMask._make((*(x.to(device) for x in mask[:4]), None))

    def tensors(self, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
        """q, k, v, sinks, dout, dlse, made in float32, rounded to dtype once."""
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(self.lengths) if self.spans is None else len(self.spans[0])
        tokens_k = tokens if self.spans is None else self.spans[2]
        dim_v = self.head_dim_v or self.head_dim

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q = random(tokens, self.heads_q, self.head_dim) * self.magnitude
        k = random(tokens_k, self.heads_k, self.head_dim)
        v = random(tokens_k, self.heads_k, dim_v) * (self.magnitude_v or self.magnitude)
        dout, dlse = random(tokens, self.heads_q, dim_v), random(self.heads_q, tokens)
        sinks = random(self.heads_q)
        q, k, v, dout = (x.to(dtype).to(device) for x in (q, k, v, dout))
        if self.strided:  # as Hugging Face hands them over: (heads, tokens, dim) in memory, and a slice of a wider row
            q = q.transpose(0, 1).contiguous().transpose(0, 1)
            k = torch.cat([k, k], -1)[..., : self.head_dim]
            dout = dout.transpose(0, 1).contiguous().transpose(0, 1)
        return [q, k, v, sinks.to(device), dout, dlse.to(device)]

    def options(self, sinks: Tensor) -> dict[str, Any]:
        """The keyword arguments of the problem."""
        slopes = 2.0 ** -torch.arange(1, self.heads_q + 1, device=sinks.device)
        return {
            "softmax_scale": self.scale,
            "softcap": self.softcap,
            "sinks": sinks if self.sinks else None,
            "alibi_slopes": slopes if self.alibi else None,
        }


CASES = [
    Case("one token", [1]),
    Case("one-token sequences", [1] * 40),
    Case("around a tile of 64", [63, 64, 65, 1]),
    Case("around a tile of 128", [127, 128, 129]),
    Case("many tiny", [1, 2, 3] * 40),
    Case("over a thousand tiny", [1, 1, 2] * 400, heads_q=1),
    Case("one long among short", [3, 5, 200, 2, 7]),
    Case("one sequence", [300]),
    Case("group of 3", [50, 30, 20], heads_q=6, heads_k=2),
    Case("group of 7", [40, 30], heads_q=7, heads_k=1),
    Case("no groups", [50, 30, 20], heads_q=3, heads_k=3),
    Case("head dim 40", [50, 30], head_dim=40),
    Case("head dim 64", [90, 70], head_dim=64),
    Case("head dim 80", [50, 30], head_dim=80),
    Case("head dim 96", [50, 30], head_dim=96),
    Case("head dim 128", [90, 70], head_dim=128),
    Case("head dim 72", [50, 30], head_dim=72),
    Case("head dim 112", [50, 30], head_dim=112),
    Case("head dim 160", [50, 30], head_dim=160),
    Case("head dim 192, values 128", [50, 30], head_dim=192, head_dim_v=128),
    Case("head dim 256", [50, 30], head_dim=256),
    Case("head dim 512", [20, 30], head_dim=512),
    Case("head dim 576, values 512", [20, 30], head_dim=576, head_dim_v=512),
    Case("value dim differs", [50, 30], head_dim=48, head_dim_v=32),
    Case("window of 1", [50, 30], window=1),
    Case("window", [100, 30, 70], window=17),
    Case("window longer than all", [50, 30], window=500),
    Case("bidirectional", [50, 1, 90, 30], mask="bidirectional"),
    Case("bidirectional window", [100, 30, 70], mask="bidirectional", window=9),
    Case("chunks", [100, 3, 70], mask="chunked", window=32),
    Case("image blocks", [100, 30, 70], mask="images", window=20),
    Case("prefixes", [100, 30, 7], mask="prefix", window=24),
    Case("padding", [100, 30, 170], mask="padded", window=70),
    Case("softcap", [50, 70], softcap=2.0),
    Case("sinks", [50, 70], sinks=True, heads_q=4),
    Case("softcap, sinks, window", [100, 70], softcap=5.0, sinks=True, window=30),
    Case("alibi", [50, 70], heads_q=4, alibi=True),
    Case("alibi, softcap, window", [50, 70], heads_q=4, heads_k=2, alibi=True, softcap=5.0, window=30),
    Case("scale", [50, 70], scale=0.7),
    Case("large values", [50, 70], magnitude=100.0),
    Case("values at 1e4", [50, 70], magnitude_v=1e4),
    Case("scores of some 1e3", [50, 70], heads_q=4, heads_k=2, magnitude=1e3, magnitude_v=1.0),
    Case("one-token sequences, scores of some 1e3", [1] * 40, magnitude=1e3, magnitude_v=1.0),
    Case("strided views", [50, 70], heads_q=4, heads_k=2, strided=True),
    Case("empty spans", [], spans=([0, 0, 0, 2, 2, 5, 9], [0, 2, 2, 2, 7, 7, 9], 9)),
    Case("empty spans after whole blocks", [], spans=([0] * 48 + [64] * 16, [64] * 64, 64)),
    Case("empty spans with sinks", [], spans=([0, 0, 4], [0, 2, 4], 9), sinks=True),
]


def run(call: Attention, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Results and gradients of `call(q, k, v, mask, **case.options(sinks)) -> (out, lse)` in `dtype`."""
    return run_on(call, case, case.tensors(dtype, device, seed), device)


def run_on(call: Attention, case: Case, tensors: list[Tensor], device: str) -> dict[str, Tensor]:
    """As `run`, on the tensors q, k, v, sinks, dout, dlse."""
    q, k, v, sinks = (x.detach().requires_grad_() for x in tensors[:4])
    dout, dlse = tensors[4:]
    out, lse = call(q, k, v, case.packed_mask(device), **case.options(sinks))
    inputs = [q, k, v, sinks] if case.sinks else [q, k, v]
    # A query without keys has lse = -inf, whose gradient is not used by anything.
    weight = dlse.to(lse.dtype).masked_fill(torch.isneginf(lse.detach()), 0.0)
    used = torch.where(torch.isneginf(lse.detach()), torch.zeros_like(lse), lse)
    grads = torch.autograd.grad((out * dout).sum() + (used * weight).sum(), inputs)
    named = dict(zip(("dq", "dk", "dv", "dsinks"), grads, strict=False))
    return {"out": out.detach(), "lse": lse.detach(), **named}


def truth_and_naive(
    case: Case, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 oracle on the values that `dtype` holds, and the same code run in `dtype`."""
    tensors = case.tensors(dtype, device, seed)
    truth = run_on(reference.attention, case, [x.double().cpu() for x in tensors], "cpu")
    return truth, run_on(reference.attention, case, tensors, device)


def cancelling_terms(
    case: Case, dtype: torch.dtype, device: str, *, scores_round_alike: bool, seed: int = 0
) -> dict[str, float]:
    """The largest sum of absolute terms behind lse, dq, dk, dv and dsinks.

    A flash backward pass takes p * (dp - delta) with delta = out . dout, where the plain one takes a difference that is
    exact for a row of one key. Both are right; the float32 rounding of the terms is what such a pass can promise.

    It also computes the scores a second time. Unless they round as in the forward pass (`scores_round_alike`), p is off
    by the factor exp(rounding of s), which adds the terms of (14) in docs/kernel.md.
    """
    q, k, v, sinks, dout, dlse = (x.double().cpu() for x in case.tensors(dtype, device, seed))
    options = case.options(sinks)
    out, lse = reference.attention(q, k, v, case.packed_mask("cpu"), **options)
    eye = torch.eye(k.shape[0], dtype=q.dtype)[:, None].expand(-1, k.shape[1], -1)
    p = reference.attention(q, k, eye, case.packed_mask("cpu"), **options)[0]  # (tokens, heads_q, tokens_k)
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if case.scale is None else case.scale
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))

    def over_dims(name: str, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.einsum(f"ihd,jhd->{name}", rows, columns)

    products = over_dims("ihj", q.abs(), keys.abs()) * scale
    rounding = torch.zeros_like(products)
    if not scores_round_alike:
        slope = 1 - (over_dims("ihj", q, keys) * scale / case.softcap).tanh().square() if case.softcap else 1.0
        rounding = slope * products
    delta = ((out * dout).sum(-1) - dlse.T)[..., None]
    delta_terms = ((out * dout).abs().sum(-1) + dlse.T.abs())[..., None]
    dp, dp_terms = over_dims("ihj", dout, values), over_dims("ihj", dout.abs(), values.abs())
    ds = p * (dp_terms + delta_terms + rounding * (dp - delta).abs()) * scale
    share = torch.exp(sinks - lse.T) if case.sinks else torch.zeros_like(lse.T)
    return {
        "lse": products.max().item(),
        "dq": torch.einsum("ihj,jhd->ihd", ds, keys.abs()).max().item(),
        "dk": torch.einsum("ihj,ihd->jhd", ds, q.abs()).max().item() * group,
        "dv": torch.einsum("ihj,ihd->jhd", p * (1 + rounding), dout.abs()).max().item() * group,
        "dsinks": (share * delta_terms[..., 0]).sum(0).max().item(),
    }


def packed(backend: Backend) -> Attention:
    """packed_attention_with_lse on one backend."""
    return partial(packed_attention_with_lse, backend=backend)


def check_accuracy(
    case: Case, backend: Backend, dtype: torch.dtype, device: str, scores_round_alike: bool | None = None
) -> None:
    """Raise AssertionError unless every result and gradient of the case keeps the accuracy law.

    `scores_round_alike` says that the backward pass recomputes the bits of the forward pass's scores; if it is None, so
    it is for every backend but "triton", whose passes lay other tiles over the scores.
    """
    alike = backend != "triton" if scores_round_alike is None else scores_round_alike
    truth, naive = truth_and_naive(case, dtype, device)
    terms = cancelling_terms(case, dtype, device, scores_round_alike=alike)
    actual = run(packed(backend), case, dtype, device)
    for name in truth:
        assert_accurate(f"{name} in {dtype}", actual[name], truth[name], naive[name], terms.get(name, 0.0))


def check_isolation(case: Case, backend: Backend, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless changing the third sequence leaves all others bitwise as they were."""
    begin, end = sum(case.lengths[:2]), sum(case.lengths[:3])
    tensors = case.tensors(dtype, device)
    changed = [x.clone() for x in tensors]
    for x in changed[:3]:
        x[begin:end] *= -3.0
    changed[4][begin:end] += 1.0
    before, after = (run_on(packed(backend), case, x, device) for x in (tensors, changed))
    for name in before:
        value, other = (x[name].T if name == "lse" else x[name] for x in (before, after))
        assert not torch.equal(value[begin:end], other[begin:end]), f"{name} of the changed sequence stayed the same"
        for kept in (slice(0, begin), slice(end, None)):
            assert torch.equal(value[kept], other[kept]), f"{name} in {dtype} of another sequence changed"


def check_determinism(case: Case, backend: Backend, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless two runs are bitwise equal."""
    first, second = (run(packed(backend), case, dtype, device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} in {dtype} differs between two runs"


def check_boundaries(device: str) -> None:
    """Raise AssertionError unless the device finds the same sequences as the CPU, over many thread blocks."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.where(torch.rand(3, 20_000, generator=generator) < 0.01, 7, 1)
    position_ids = steps.cumsum(1)
    padding = torch.ones_like(position_ids)
    padding[1, 15_000:] = 0
    padding[2, :3_000] = 0
    for mask in (None, padding):
        here = boundaries(position_ids, mask)
        there = boundaries(position_ids.to(device), None if mask is None else mask.to(device))
        for name, one, other in zip(here._fields, here, there, strict=True):
            assert torch.equal(one, other.cpu()), f"boundaries: {name} differs between cpu and {device}"


ISOLATION_CASES = [
    Case("causal", [5, 1, 40, 23, 64, 2], heads_q=4, heads_k=2),
    Case("window", [5, 1, 40, 23, 64, 2], heads_q=2, heads_k=2, window=11),
    Case("bidirectional", [5, 1, 40, 23, 64, 2], heads_q=3, heads_k=1, mask="bidirectional"),
]


def run_all(backend: Backend, device: str) -> Iterator[tuple[str, str | None]]:
    """Run every check on a backend; yields the name of each with None, or with what went wrong."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    checks: list[tuple[str, Callable[[], None]]] = [("boundaries", lambda: check_boundaries(device))]
    for case, dtype in product(CASES, dtypes):
        checks.append((f"{case.name} in {dtype}", partial(check_accuracy, case, backend, dtype, device)))
    for case, dtype in product(ISOLATION_CASES, dtypes):
        checks.append((f"no leak, {case.name} in {dtype}", partial(check_isolation, case, backend, dtype, device)))
        checks.append(
            (f"deterministic, {case.name} in {dtype}", partial(check_determinism, case, backend, dtype, device))
        )
    for name, check in checks:
        try:
            check()
        except Exception as error:  # whatever a kernel does on a new GPU belongs in the report
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, None
