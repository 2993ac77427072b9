"""The attention function that packattn registers with transformers: renames, no arithmetic."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from packattn.attention import packed_attention
from packattn.hf.conditions import Conditions
from packattn.hf.inputs import no_restarts, no_transforms
from packattn.hf.running import RUNNING, past_the_hooks
from packattn.mask import PackedMask

# What models pass to every attention function and what does not change the result here: the mask already holds
# windows and causality, the positions are in q and k, and what is for the loss comes along. Whatever is not listed
# might change it, and raises.
HARMLESS = frozenset(
    {
        "accum_dtype", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "ignore_index",
        "is_causal", "labels", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
        "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
        "position_ids", "return_dict", "return_predicted_tokens", "return_token_accuracy", "seq_idx", "shift_labels",
        "sliding_window", "token_type_ids", "use_cache", "use_token_scaling",
    }
)  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        query: (rows, heads_q, n, head_dim). key: (rows, heads_k, n, head_dim). value: (rows, heads_k, n, head_dim_v).
        attention_mask: the PackedMask of this forward, or a dense bool mask in a forward over a cache.

    Returns:
        (rows, n, heads_q, head_dim_v) and None.

    Raises:
        NotImplementedError: an argument that packattn does not honour.
        RuntimeError: no mask came, so that nothing would isolate the sequences; or more keys than tokens.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which packattn does not honour. "
            "If it came with the call, leave it out; otherwise train this model unpacked, without packattn.patch."
        )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        no_transforms(torch._C._are_functorch_transforms_active())
    running = None if compiling else RUNNING.get()
    packed = running is not None and running.packed
    if isinstance(attention_mask, PackedMask):
        if running is not None and packed:
            if not any(attention_mask.k_start is mask for mask in running.masks):
                raise RuntimeError(f"{type(module).__name__} got a packattn mask of another forward than this one.")
            running.ran.add(id(module))
        query = _tempered(module, query, attention_mask)
        rows, heads, n, _ = query.shape
        if key.shape[2] != n:
            raise RuntimeError(
                f"{type(module).__name__} got {key.shape[2]} keys for {n} tokens: a checkpoint ran it twice in one "
                "forward, over the same cache. Pass use_cache=False in training."
            )
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = packed_attention(
            q, k, v, attention_mask, softmax_scale=scaling, softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout
        )
        return out.view(rows, n, heads, -1), None
    if attention_mask is None or packed:
        raise RuntimeError(
            f"{type(module).__name__} got no packattn mask, so packed sequences would not be isolated: the model does "
            "not build its mask by transformers' mask builders. Remove the patch, and train this model unpacked."
        )
    if running is None and not compiling and torch._C._current_graph_task_id() == -1:
        raise RuntimeError(past_the_hooks(type(module).__name__))
    if compiling:  # where no hook is missed, if the model was called by its forward
        conditions = Conditions()
        no_restarts(conditions, others.get("position_ids"), attention_mask, query[:, 0])
        conditions.enforce()
    return _dense(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux)


def _tempered(module: nn.Module, query: Tensor, mask: PackedMask) -> Tensor:
    """Llama 4 scales queries by their index in the row; in a packed row it has to be the index in the sequence."""
    if not getattr(module, "attn_temperature_tuning", None) or getattr(module, "use_rope", True):
        return query
    index = torch.arange(mask.tokens, device=query.device)

    floor, slope = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]

    def scale(index: Tensor) -> Tensor:
        return torch.log1p(torch.floor((index.float() + 1.0) / floor)) * slope + 1.0

    rows, _, n, _ = query.shape
    ratio = scale(index - mask.k_start) / scale(index % n)
    return (query * ratio.view(rows, 1, n, 1)).to(query.dtype)


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float,
    softcap: float | None, s_aux: Tensor | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """A forward over a cache, which is never packing: transformers' own attention with its own dense mask."""
    if softcap is None and s_aux is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        return out, None
    # SDPA knows neither softcap nor sinks; the model's own eager function does, and takes an additive mask.
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    additive = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    options = {"softcap": softcap} if softcap is not None else {}
    return eager(module, query, key, value, additive, scaling=scaling, dropout=dropout, **options)[0], None
