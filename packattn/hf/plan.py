"""How a model will be isolated, and why it cannot be: read from its structure and config, before anything is changed.

Three ways, the first that is exact for the model:

* spans: the model's own mask builders give PackedMasks, and its attention layers call packed attention;
* by sequence: single layers that mix along the row (state-space models, short convolutions, rotary embeddings that look
  at the longest position) run on one row per sequence, everything else on the packed row;
* rows: the whole stack of layers runs on one row per sequence, equal lengths together, in transformers' own attention.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packattn.hf.inputs import of_adapters
from packattn.hf.layout import Group, Layout
from packattn.hf.rope import can_forget, config_rope_types, looks_at_length

# Layers that mix along the row without attention.
_MIXERS = re.compile(
    r"[Mm]amba|SSM|Ssm|[Rr]wkv|RWKV|[msx]LSTM|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|Recurrent|"
    r"ShortConv|CausalConv|Retention|Hyena|TokenShift|Fourier|N[Gg]ram"
)
# Of those, what looks back only: padding on the right changes nothing.
_CAUSAL = re.compile(
    r"[Mm]amba|Bamba|FalconH1Mixer|[Rr]wkv|[msx]LSTM|Delta|Lightning|Recurrent|ShortConv|Inkling|Cca|CCA"
)
# Of those, what only holds weights or works token by token.
_NO_MIXERS = re.compile(r"Norm|Cache|MLP|Mlp|Rotary|Router|Experts|DecoderLayer|Output")
# Attention to keys that an indexer or a learned mask selects by what the whole row holds.
_SPARSE = {
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "dots3_note", "mistral_large4", "minimax_m3_vl", "doge",
}  # fmt: skip
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "mamba", "mlp", "moe",
    "hybrid", "hybrid_sliding", "recurrent",
}  # fmt: skip
# Flags of configs under which one row of a batch changes what another gives.
_ACROSS_ROWS = {
    "bi_data": "gives other positions to the first half of a batch's rows than to the second",
    "quant_mode": "scales activations by a range that it takes from the whole batch in training",
}
# Models that look along the whole row on top of their layers, or make of it something else than its tokens.
_QUESTIONS = "scores every token of the row by question tokens that it finds anywhere in it"
_IMAGE = "attends to images from all tokens of a row"
_BESIDE = "gives its layers the embeddings of images beside the tokens"
_CODEBOOKS = "takes num_codebooks rows for one"
_OTHER_KEYS = "attends to the keys of another model"
_BY_NAME = {
    "SplinterForQuestionAnswering": _QUESTIONS,
    "SplinterForPreTraining": _QUESTIONS,
    "BigBirdForQuestionAnswering": "takes all up to the first separator of a row for the question",
    "BlipForConditionalGeneration": _IMAGE,
    "BlipForQuestionAnswering": _IMAGE,
    "BlipForImageTextRetrieval": _IMAGE,
    "IdeficsModel": _IMAGE,
    "DiffusionGemmaModel": "writes one canvas for a row",
    "Gemma4AssistantForCausalLM": _OTHER_KEYS,
    "Gemma4UnifiedAssistantForCausalLM": _OTHER_KEYS,
    "Kosmos2Model": _BESIDE,
    "Kosmos2ForConditionalGeneration": _BESIDE,
    "MusicgenDecoder": _CODEBOOKS,
    "MusicgenMelodyDecoder": _CODEBOOKS,
    "ProphetNetDecoder": "makes the hidden states of n-grams beside those of the tokens",
    "PerceiverForMaskedLM": "gives max_position_embeddings logits for every row, whatever its length",
    "DPRReader": "makes one relevance logit of every row",
}
_ONE_LOGIT_A_ROW = re.compile(r"(ForSequenceClassification|DPR(Context|Question)Encoder)$")


@dataclass
class Plan:
    """How one model will be isolated.

    Attributes:
        entries: outermost transformers models: where the caller's position_ids come in.
        builders: (name, module) that turn an attention_mask into masks for their layers.
        attention: (name, module) that call transformers' attention interface, in the builders.
        forwards: the forward of each of them, as its class had it.
        by_sequence: (name, module, groups) of layers that run on one row per sequence; groups is an attribute of
            Layout.
        rows: reasons why the builders run on one row per sequence as a whole; empty: they do not.
        refused: reasons why the model cannot be isolated at all.
        first_position: where the model's own positions begin: 0, or 2 in the RoBERTa family.
        planes: rotary embeddings take several planes of position_ids (M-RoPE).
        text_plane: of four planes of position_ids, the model takes the first as that of the text.
        shifts_labels: the loss of the model has a token predict the label of the next one.
        first_forward: no forward has come to its end since the patch: conditions are read on the host.
        removed: the patch was removed: a forward in which something else keeps a wrapper is the module's own again.
    """

    entries: list[PreTrainedModel] = field(default_factory=list)
    builders: list[tuple[str, PreTrainedModel]] = field(default_factory=list)
    attention: list[tuple[str, nn.Module]] = field(default_factory=list)
    forwards: list[Callable[..., Any]] = field(default_factory=list)
    by_sequence: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    first_position: int = 0
    planes: bool = False
    text_plane: bool = False
    shifts_labels: bool = False
    first_forward: bool = True
    removed: bool = False

    @property
    def needs_layout(self) -> bool:
        """Whether a forward has to read the boundaries back to the host."""
        return bool(self.rows or self.by_sequence) or any(one_logit_a_row(entry) for entry in self.entries)

    @property
    def mixes(self) -> bool:
        """Whether layers run by sequence that would mix along a packed row."""
        return bool(self.rows) or any(kind != "one" for _, _, kind in self.by_sequence)

    def by_length(self, module: nn.Module) -> bool:
        """Whether a model with one result per row runs as a whole on rows of one length each, without any padding.

        With spans alone it runs on rows padded to one length, all of them at once.
        """
        return self.mixes and one_logit_a_row(module) and module in self.entries

    def groups(self, layout: Layout, kind: str) -> list[Group]:
        """The groups of a layout by the name that by_sequence gives."""
        found: list[Group] = getattr(layout, kind)
        return found


def make_plan(model: nn.Module) -> Plan:
    """Look at the model; nothing is changed."""
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    plan = Plan(entries=_outermost(pretrained))
    plan.builders = _builders(model)
    plan.refused = _refusals(model, pretrained, plan)
    if plan.refused:
        return plan
    inside = list(plan.builders[-1][1].named_modules())
    plan.by_sequence, unreachable = _mixers(inside)
    plan.rows = unreachable + _reasons_for_rows(plan)
    wrapped = {id(inner) for _, module, _ in plan.by_sequence for inner in module.modules()}
    plan.attention = [(name, m) for name, m in inside if calls_interface(m) and id(m) not in wrapped]
    plan.forwards = [type(m).forward for _, m in plan.attention]
    for _, module in inside:
        if id(module) not in wrapped and _computes_attention(module, wrapped):
            plan.rows.append(f"{type(module).__name__} computes attention itself")
    plan.rows = list(dict.fromkeys(plan.rows))
    plan.planes = any("mrope_section" in (getattr(b.config, "rope_parameters", None) or {}) for _, b in plan.builders)
    plan.text_plane = any("shape[0] == 4" in _source(builder) for _, builder in plan.builders)
    plan.shifts_labels = any(_shifts_labels(entry) for entry in plan.entries)
    poolers = [(name, m, "one") for name, m in inside if type(m).__name__.endswith("Pooler")]
    if plan.rows:
        plan.by_sequence, plan.attention = [], []
    else:
        plan.by_sequence += poolers
    return plan


def one_logit_a_row(module: nn.Module) -> bool:
    """Whether a model makes one result of every row: then its packed rows are unpacked where they come in."""
    return bool(_ONE_LOGIT_A_ROW.search(type(module).__name__))


def _shifts_labels(module: nn.Module) -> bool:
    """Whether the loss of a model is that of causal language models (of the same names, XLNet's is not)."""
    named = re.search(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", type(module).__name__)
    return bool(named) and "loss_function" in _source(module)


def finds_last_by_padding(module: nn.Module) -> bool:
    """Whether a model with one result of every row takes it from the last token that is not the padding token."""
    return "pad_token_id" in _source(module)


def calls_interface(module: nn.Module) -> bool:
    """Whether a module calls transformers' attention interface."""
    return not isinstance(module, PreTrainedModel) and "ALL_ATTENTION_FUNCTIONS" in _source(module)


def _computes_attention(module: nn.Module, wrapped: set[int]) -> bool:
    """Whether a module is attention by its name, holds no other that is, and does not call the interface."""
    inner = [m for m in module.modules() if m is not module]
    return (
        bool(re.search(r"Attention(?!.*(Output|Pool|Norm))", type(module).__name__))
        and not isinstance(module, (PreTrainedModel, GradientCheckpointingLayer))
        and not calls_interface(module)
        and not any("Attention" in type(m).__name__ or id(m) in wrapped for m in inner)
        and next(module.parameters(), None) is not None
    )


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # a class made in an interactive session
        return ""


def _outermost(pretrained: list[PreTrainedModel]) -> list[PreTrainedModel]:
    inner = {id(m) for outer in pretrained for m in outer.modules() if m is not outer}
    return [module for module in pretrained if id(module) not in inner]


def _builders(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The text models that build masks, from the outside in: the innermost, and those around it that do too."""

    def takes_text(module: nn.Module) -> bool:
        if not isinstance(module, PreTrainedModel):
            return False
        names = inspect.signature(module.forward).parameters
        return "input_ids" in names or ("attention_mask" in names and "inputs_embeds" in names)

    text = [(name, module) for name, module in model.named_modules() if takes_text(module)]
    innermost = [
        (name, module)
        for name, module in text
        if not any(takes_text(inner) for inner in module.modules() if inner is not module)
    ]
    ids = {id(module) for _, module in innermost}
    return [(name, module) for name, module in text if id(module) in ids or _builds_masks(module)]


def _builds_masks(module: nn.Module) -> bool:
    return bool(re.search(r"create_\w*masks?\w*\(", _source(module)))


def _refusals(model: nn.Module, pretrained: list[PreTrainedModel], plan: Plan) -> list[str]:
    reasons = []
    for module in pretrained:
        config, name = module.config, type(module).__name__
        if getattr(config, "is_encoder_decoder", False) and _takes_another_sequence(module):
            reasons.append(f"{name} attends across two sequences (encoder-decoder)")
        if name in _BY_NAME:
            reasons.append(f"{name} {_BY_NAME[name]}")
        reasons += [f"{name} {why} ({flag}=True)" for flag, why in _ACROSS_ROWS.items() if getattr(config, flag, False)]
        if "lsh" in (getattr(config, "attn_layers", None) or ()):
            reasons.append(f"{name} hashes at random, into as many buckets as the first row that it saw asks for (LSH)")
        if "dynamic" in config_rope_types(config) and not any(can_forget(inner) for inner in module.modules()):
            reasons.append(f"{name} has a rotary embedding of type dynamic, which depends on what was run before")
        if _is_foreign(config._attn_implementation):
            reasons.append(
                f"{name} attends by {config._attn_implementation!r}, which another library registered and packattn "
                "would replace; load the model with attn_implementation='sdpa'"
            )
        if name.endswith(("ForMultipleChoice", "DoubleHeadsModel")):
            reasons.append(
                f"{name} makes one result of every row, and compares those of as many rows as it has choices"
            )
    for module in model.modules():
        if why := of_adapters(module):
            reasons.append(why)
        if type(module).__module__.startswith(
            ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")
        ):
            reasons.append("layers of dynamic quantization scale activations by the range of all tokens of a batch")
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            reasons.append("nn.DataParallel on several devices; use DistributedDataParallel")
    holds = {id(b): {id(m) for m in b.modules() if m is not b} for _, b in plan.builders}
    innermost = [(name, b) for name, b in plan.builders if not any(id(o) in holds[id(b)] for _, o in plan.builders)]
    if not innermost:
        reasons.append("no part of it takes text")
    elif len(innermost) > 1:
        listed = ", ".join(name or type(builder).__name__ for name, builder in innermost)
        reasons.append(f"several parts attend ({listed}), and position_ids describe only one of them")
    if len(plan.entries) > 1:
        reasons.append("it holds several transformers models; patch each of them")
    return list(dict.fromkeys(reasons))


def _takes_another_sequence(module: PreTrainedModel) -> bool:
    """Whether a model attends to a second sequence, or makes one: an encoder alone (UMT5EncoderModel) does neither."""
    return not {"decoder_input_ids", "encoder_hidden_states"}.isdisjoint(inspect.signature(module.forward).parameters)


def _is_foreign(implementation: str | None) -> bool:
    """Whether an attention function is neither transformers' nor packattn's."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    while isinstance(function, partial):  # kernels of the hub
        function = function.func
    return function is not None and function.__module__.partition(".")[0] not in ("transformers", "packattn")


def _reasons_for_rows(plan: Plan) -> list[str]:
    reasons = []
    name, inner = plan.builders[-1]
    for _, builder in plan.builders:
        config = builder.config
        if config.model_type in _SPARSE or config.model_type.removesuffix("_text") in _SPARSE:
            reasons.append(f"{config.model_type} attends to keys chosen by their content, which is not a span")
        if any(_counts_in_chunks(inner_module) for inner_module in builder.modules()):
            reasons.append("chunked layers without rotary embeddings scale queries by their index in the row (Llama 4)")
        if getattr(config, "trigram_input", False):
            reasons.append("trigram_input: the embedding of a token holds those of its neighbours in the row")
        unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
        if unknown:
            reasons.append(f"layer types that packattn does not know: {', '.join(unknown)}")
        if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None):
            reasons.append(f"{type(builder).__name__} has cross-attention layers")
    where = name or type(inner).__name__
    attends = any(calls_interface(m) for m in inner.modules())
    if attends and not imports_mask_builders(inner):
        reasons.append(f"{where} does not build its masks by transformers.masking_utils")
    embeddings = sorted({type(m).__name__ for m in inner.modules() if _embeds_by_mask(m)})
    if embeddings:
        reasons.append(f"positions depend on the attention_mask of the row in {', '.join(embeddings)}")
    elif attends and "position_ids" not in inspect.signature(inner.forward).parameters:
        reasons.append(f"{where} takes no position_ids")
    return reasons


def _counts_in_chunks(layer: nn.Module) -> bool:
    """Whether attention is tempered by the index of a token, which a chunk's mask does not tell (Llama 4)."""
    types = getattr(getattr(layer, "config", None), "layer_types", None)
    if not getattr(layer, "attn_temperature_tuning", None) or getattr(layer, "use_rope", True) or not types:
        return False
    return bool(types[layer.layer_idx] == "chunked_attention")


def _mixers(inside: list[tuple[str, nn.Module]]) -> tuple[list[tuple[str, nn.Module, str]], list[str]]:
    """Layers to run by sequence, and reasons why some cannot be."""
    found: list[tuple[str, nn.Module, str]] = []
    reasons: list[str] = []
    covered: set[int] = set()
    for name, module in inside:
        if isinstance(module, (PreTrainedModel, GradientCheckpointingLayer)) or id(module) in covered:
            continue
        kind = type(module).__name__
        if looks_at_length(module):
            found.append((name, module, "equal"))
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] == 1 < module.kernel_size[1]:
            reasons.append(f"{kind} in {name.rpartition('.')[0] or 'it'} mixes along the row")
        elif is_convolution(module):
            reasons.append(f"{kind} in {name.rpartition('.')[0] or 'it'} mixes along the row inside of attention")
        elif calls_interface(module) or _NO_MIXERS.search(kind):
            continue
        elif _MIXERS.search(kind) or any(is_convolution(child) for child in module.children()):
            covered |= {id(inner) for inner in module.modules()}
            found.append((name, module, "similar" if _CAUSAL.search(kind) else "equal"))
    return found, reasons


def is_convolution(module: nn.Module) -> bool:
    """Whether a module of torch itself mixes along the row."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size != (1,)
    return isinstance(module, (nn.LSTM, nn.GRU, nn.RNN))


def imports_mask_builders(builder: PreTrainedModel) -> bool:
    """Whether the file of a model imports transformers' mask builders."""
    names = vars(sys.modules[type(builder).__module__])
    return any(re.fullmatch(r"create_\w*masks?\w*", name) for name in names)


def _embeds_by_mask(module: nn.Module) -> bool:
    if not re.search(r"Embeddings?$", type(module).__name__):
        return False
    names = inspect.signature(module.forward).parameters
    # A table of positions that takes them when it is given them, as `Carry` does.
    return "attention_mask" in names and not (isinstance(module, nn.Embedding) and "position_ids" in names)
