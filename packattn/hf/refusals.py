"""Why a model cannot be isolated: looked for in its structure and config, before anything is changed."""

import inspect
import re
import sys

from torch import nn
from transformers import PreTrainedModel

# Layers that mix along the row without attention.
_MIXERS = re.compile(
    r"[Mm]amba|SSM|Ssm|[Rr]wkv|RWKV|[msx]LSTM|DeltaNet|LinearAttention|LightningAttention|Recurrent|ShortConv|"
    r"Conv1d|^LSTM$|^GRU$|^RNN$|Retention|Hyena|TokenShift|Fourier|N[Gg]ram"
)
# Attention to keys that an indexer or a learned mask selects by what the whole row holds.
_SPARSE = {
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "dots3_note", "mistral_large4", "minimax_m3_vl", "molmo2", "doge",
}  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_ROW_ROPE = {"dynamic", "longrope"}


def refusals(
    model: nn.Module, pretrained: list[PreTrainedModel], builders: list[tuple[str, PreTrainedModel]]
) -> list[str]:
    """Every reason why packed sequences cannot be isolated in the model; none if they can."""
    reasons: list[str] = []
    for module in pretrained:
        reasons += _of_config(module)
    for module in pretrained:
        inside = {id(inner) for inner in module.modules() if inner is not module}
        if _forward_builds_masks(module) and any(id(builder) in inside for _, builder in builders):
            reasons.append(f"{type(module).__name__} builds the masks of the model inside it, out of packattn's reach")
    if len(builders) > 1:
        listed = ", ".join(name or type(builder).__name__ for name, builder in builders)
        reasons.append(f"several parts build masks ({listed}), and position_ids describe only one of them")
    for name, builder in builders:
        where = name or type(builder).__name__
        if "position_ids" not in inspect.signature(builder.forward).parameters:
            reasons.append(f"{where} takes no position_ids, so that a packed row cannot be marked")
        if not _imports_mask_builders(builder):
            reasons.append(f"{where} does not build its masks by transformers.masking_utils")
        if re.search(r"attention_mask\.(view|reshape)\(", inspect.getsource(type(builder))):
            reasons.append(f"{where} reshapes the attention_mask before it builds its masks")
    mixers = sorted({type(m).__name__ for m in model.modules() if _mixes_along_the_row(m)})
    if mixers:
        reasons.append(f"layers that mix along the row without attention: {', '.join(mixers)}")
    by_mask = sorted({type(m).__name__ for m in model.modules() if _embeds_by_mask(m)})
    if by_mask:
        reasons.append(f"embeddings or positions depend on the attention_mask of the row in {', '.join(by_mask)}")
    return list(dict.fromkeys(reasons))


def _of_config(module: PreTrainedModel) -> list[str]:
    config, reasons = module.config, []
    name = type(module).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        reasons.append(f"{name} attends across two sequences (encoder-decoder or cross-attention)")
    if getattr(config, "cross_attention_layers", None):
        reasons.append(f"{name} has cross-attention layers, whose keys are no part of the packed row")
    if getattr(config, "trigram_input", False):
        reasons.append("trigram_input: the embedding of a token holds those of its neighbours in the row")
    if not module._can_set_attn_implementation() or not module._supports_attention_backend:
        reasons.append(f"{name} computes attention itself instead of calling transformers' attention interface")
    if config.model_type in _SPARSE:
        reasons.append(f"{config.model_type} attends to keys chosen by their content, which is not a span")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        reasons.append(f"layer types other than full, sliding and chunked attention: {', '.join(unknown)}")
    ropes = _rope_types(getattr(config, "rope_parameters", None)) & _ROW_ROPE
    if ropes:
        reasons.append(f"rotary embedding of type {', '.join(sorted(ropes))} looks at the longest position of the row")
    if getattr(config, "attn_temperature_tuning", None):
        reasons.append("attn_temperature_tuning scales queries by their index in the row")
    return reasons


def _rope_types(parameters: object) -> set[str]:
    """The rope types of a config, which holds one dict, or one for every layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters["rope_type"])}.union(*nested) if "rope_type" in parameters else set().union(*nested)


def _imports_mask_builders(builder: PreTrainedModel) -> bool:
    names = vars(sys.modules[type(builder).__module__])
    return any(re.fullmatch(r"create_\w*masks?\w*", name) for name in names)


def _forward_builds_masks(module: PreTrainedModel) -> bool:
    return bool(re.search(r"= create_\w*masks?\w*\(", inspect.getsource(type(module).forward)))


def _mixes_along_the_row(module: nn.Module) -> bool:
    return not isinstance(module, PreTrainedModel) and bool(_MIXERS.search(type(module).__name__))


def _embeds_by_mask(module: nn.Module) -> bool:
    return (
        bool(re.search(r"Embeddings?$", type(module).__name__))
        and "attention_mask" in inspect.signature(module.forward).parameters
    )
