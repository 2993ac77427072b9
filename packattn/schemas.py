"""The operators of `torch.ops.packattn`: the one home of their schemas.

This file imports nothing, so that setup.py can turn it into the C++ header that `packattn._C` registers, and
`packattn.ops` can register the same strings where the extension is not built.
"""

_SPANS = "Tensor k_start, Tensor k_end, Tensor q_start, Tensor q_end, Tensor? order"
_OPTIONS = (
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? anchors, Tensor? seed,"
    " float softmax_scale, float softcap, float dropout_p"
)
# norm is what the backward pass needs beside lse: of triton (2, heads_q, tokens) float32, the maximum in base 2 (+inf
# where a query sees nothing) and one over the sum of (13) in docs/kernel.md; of the others, which take lse, empty.
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_SPANS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor norm)"
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor norm,"
    f" {_SPANS}, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)

BACKENDS = ("triton", "cpu", "torch")
# The cpu backend takes the best of these that the CPU has; each is an operator of its own, which raises on others.
# avx512bf16 and avx512pairs are for bfloat16; the latter does in AVX-512 what the former does, for tests.
INSTRUCTION_SETS = ("avx512bf16", "avx512pairs", "avx512", "avx2", "portable")
_OPERATORS = (*BACKENDS, *(f"cpu_{name}" for name in INSTRUCTION_SETS))

SCHEMAS = {
    "boundaries": (
        "(Tensor position_ids, Tensor? attention_mask)"
        " -> (Tensor seq_start, Tensor seq_end, Tensor cu_seqlens, Tensor summary)"
    ),
    "pack_first_fit": "(Tensor lengths, int capacity, int max_per_bin, int max_square) -> Tensor",
    "pack_best_fit": "(Tensor lengths, int capacity, int max_per_bin, int max_square, int open_bins) -> Tensor",
    **{f"attention_forward_{backend}": _FORWARD for backend in _OPERATORS},
    **{f"attention_backward_{backend}": _BACKWARD for backend in _OPERATORS},
}
