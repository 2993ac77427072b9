"""How a model will be isolated, and why it cannot be: read from its parts and config, before anything is changed.

Three ways, the first that is exact for the model:

* spans: the model's own mask builders give PackedMasks, and its attention layers call packed attention;
* by sequence: single layers that mix along the row (state-space models, short convolutions, rotary embeddings that look
  at the longest position) run on one row per sequence, everything else on the packed row;
* rows: the whole stack of layers runs on one row per sequence, in transformers' own attention: equal lengths together,
  or, where a part is not known, one sequence at a time.

The world is closed: the first two are for models all parts of which are known (`packattn.hf.known`).
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packattn.hf.inputs import of_adapters
from packattn.hf.known import Part, changed, describe, looks_up, part_of, source_of
from packattn.hf.layout import Group, Layout
from packattn.hf.rope import can_forget, config_rope_types, looks_at_length

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


def _nothing() -> None:
    """What a plan checks of a model before it is applied."""


@dataclass
class Plan:
    """How one model will be isolated.

    Attributes:
        entries: outermost transformers models: where the caller's position_ids come in.
        builders: (name, module) that turn an attention_mask into masks for their layers.
        heads: those of the entries that make one result of every row.
        attention: (name, module) that call transformers' attention interface, in the builders.
        forwards: the forward of each of them, as its class had it.
        by_sequence: (name, module, groups) of layers that run on one row per sequence; groups is an attribute of
            Layout.
        rows: reasons why a stack of layers runs on one row per sequence as a whole; empty: it does not.
        stack: the module that does: the outermost builder, or the entry where its head is not known to be of tokens.
        unknown: the classes that packattn does not know, with where they are from: the stack then runs one sequence at
            a time.
        changed: classes of a transformers newer than the table that are not as it holds them.
        refused: reasons why the model cannot be isolated at all.
        first_position: where the model's own positions begin: 0, or 2 in the RoBERTa family.
        planes: rotary embeddings take several planes of position_ids (M-RoPE).
        text_plane: of four planes of position_ids, the model takes the first as that of the text.
        shifts_labels: the loss of the model has a token predict the label of the next one.
        not_probed: why no small forward was run when the model was patched; empty: one was.
        unchanged: raises where the model is not made of the parts that were planned.
        results: by the name of an output of an unknown stack, whether it holds one value per token.
        first_forward: no forward has come to its end since the patch: conditions are read on the host.
        removed: the patch was removed: a forward in which something else keeps a wrapper is the module's own again.
    """

    entries: list[PreTrainedModel] = field(default_factory=list)
    builders: list[tuple[str, PreTrainedModel]] = field(default_factory=list)
    heads: list[PreTrainedModel] = field(default_factory=list)
    attention: list[tuple[str, nn.Module]] = field(default_factory=list)
    forwards: list[Callable[..., Any]] = field(default_factory=list)
    by_sequence: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    stack: nn.Module | None = None
    unknown: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    first_position: int = 0
    planes: bool = False
    text_plane: bool = False
    shifts_labels: bool = False
    not_probed: str = ""
    unchanged: Callable[[], None] = _nothing
    results: dict[str, bool] = field(default_factory=dict)
    first_forward: bool = True
    removed: bool = False

    @property
    def needs_layout(self) -> bool:
        """Whether a forward has to read the boundaries back to the host."""
        return bool(self.rows or self.by_sequence or self.heads)

    @property
    def mixes(self) -> bool:
        """Whether layers run by sequence that would mix along a packed row."""
        return bool(self.rows) or any(kind != "one" for _, _, kind in self.by_sequence)

    @property
    def together(self) -> str:
        """Which sequences the stack runs together, as an attribute of Layout."""
        return "alone" if self.unknown else "equal"

    def by_length(self, module: nn.Module) -> bool:
        """Whether a model with one result per row runs as a whole on rows of one length each, without any padding.

        With spans alone it runs on rows padded to one length, all of them at once.
        """
        return self.mixes and module in self.heads

    def by_rows(self, reasons: list[str]) -> None:
        """Run the stack on one row per sequence, for these reasons."""
        self.rows, self.by_sequence, self.attention, self.forwards = reasons, [], [], []

    def groups(self, layout: Layout, kind: str) -> list[Group]:
        """The groups of a layout by the name that by_sequence gives."""
        found: list[Group] = getattr(layout, kind)
        return found


def make_plan(model: nn.Module, trusted: Collection[type] = ()) -> Plan:
    """Look at the model; nothing is changed.

    Args:
        trusted: classes that the user vouches for (see `packattn.patch`).
    """
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    plan = Plan(entries=_outermost(pretrained))
    plan.builders = _builders(model)
    plan.refused = _refusals(model, pretrained, plan)
    if plan.refused:
        return plan
    plan.stack = plan.builders[0][1]
    parts = list(parts_of(model, {*plan.builders[-1][1].modules()}, trusted))
    plan.text_plane = any("shape[0] == 4" in source_of(builder) for _, builder in plan.builders)
    plan.shifts_labels = any(_shifts_labels(m, part) for m, part, _ in parts)
    plan.heads = [entry for entry in plan.entries if (part := part_of(entry, trusted)) and part.kind == "sequence"]
    plan.changed = sorted({type(m).__name__ for m, _, _ in parts if changed(m)})
    _place(parts, plan)
    plan.planes = any("mrope_section" in (getattr(b.config, "rope_parameters", None) or {}) for _, b in plan.builders)
    if reasons := plan.rows + _reasons_for_rows(plan):
        plan.by_rows(list(dict.fromkeys(reasons)))
    return plan


def parts_of(
    module: nn.Module, text: Collection[nn.Module], trusted: Collection[type] = (), mixer: bool = False
) -> Iterator[tuple[nn.Module, Part | None, bool]]:
    """Every module of a model, what is known of it, and whether a layer that runs by sequence holds it.

    What never runs on the tokens of a row is not looked into.

    Args:
        text: the modules of the innermost builder, a set.
    """
    part = part_of(module, trusted)
    yield module, part, mixer
    if part is None or part.kind != "beside" or (module in text and not isinstance(module, PreTrainedModel)):
        mixer = mixer or (part is not None and part.kind in ("similar", "equal"))
        for child in module.children():
            yield from parts_of(child, text, trusted, mixer)


def _place(parts: list[tuple[nn.Module, Part | None, bool]], plan: Plan) -> None:
    """What runs where, by what is known of the parts of a model."""
    names = {id(m): name for name, m in plan.builders[-1][1].named_modules()}
    stack = {id(m) for m in plan.builders[0][1].modules()}
    entry = {id(m) for entry in plan.entries for m in entry.modules()}
    seen: set[int] = set()
    only_rows: dict[str, nn.Module] = {}
    for module, part, mixer in parts:
        if id(module) in seen:
            continue
        seen.add(id(module))
        kind, name = part.kind if part else "", names.get(id(module))
        if part is None and id(module) not in entry:
            plan.refused.append(
                f"packattn does not know {describe(module)}, which stands around the model and may make one result of "
                "a packed row: call packattn.patch on the model inside, or vouch for the class: "
                f"packattn.patch(model, trusted=[{type(module).__name__}])"
            )
        elif part is None:
            plan.unknown.append(describe(module))
        elif looks_at_length(module) and not mixer:
            plan.by_sequence.append((name or "", module, "equal"))
            continue
        elif mixer or kind in ("tokens", "shifts", "sequence"):
            continue
        elif kind == "beside" and (name is None or isinstance(module, PreTrainedModel)):
            continue  # a tower
        elif kind == "beside":
            only_rows[f"{type(module).__name__} never ran on text where it was proven"] = module
        elif kind == "rows" or name is None:
            only_rows[f"{type(module).__name__} {part.why}".strip()] = module
        elif kind == "attends":
            plan.attention.append((name, module))
            plan.forwards.append(type(module).forward)
            continue
        else:
            plan.by_sequence.append((name, module, kind))
            continue
        if id(module) not in stack:
            plan.stack = plan.entries[0]
    plan.refused, plan.unknown = (list(dict.fromkeys(reasons)) for reasons in (plan.refused, plan.unknown))
    if plan.unknown:
        more = f" and {len(plan.unknown) - 8} more" if len(plan.unknown) > 8 else ""
        plan.rows.append(f"packattn does not know {', '.join(plan.unknown[:8])}{more}")
    why = [reason for reason in only_rows if " " in reason]
    plan.rows += why or ([f"{', '.join(only_rows)}: proven on rows of one sequence only"] if only_rows else [])


def _shifts_labels(module: nn.Module, part: Part | None) -> bool:
    """Whether the loss of a model is that of causal language models."""
    if part is not None and part.kind == "shifts":
        return True
    if not isinstance(module, PreTrainedModel) or not looks_up(module, "loss_function"):
        return False
    return getattr(module.loss_function, "__name__", "") == "ForCausalLMLoss"


def finds_last_by_padding(module: nn.Module) -> bool:
    """Whether a model with one result of every row takes it from the last token that is not the padding token."""
    return "pad_token_id" in source_of(module)


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
    return bool(re.search(r"create_\w*masks?\w*\(", source_of(module)))


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
    """What the configs say, and no class."""
    reasons = []
    for _, builder in plan.builders:
        if any(_counts_in_chunks(module) for module in builder.modules()):
            reasons.append("chunked layers without rotary embeddings scale queries by their index in the row (Llama 4)")
        if getattr(builder.config, "trigram_input", False):
            reasons.append("trigram_input: the embedding of a token holds those of its neighbours in the row")
        if getattr(builder.config, "add_cross_attention", False) or getattr(
            builder.config, "cross_attention_layers", None
        ):
            reasons.append(f"{type(builder).__name__} has cross-attention layers")
    return reasons


def _counts_in_chunks(layer: nn.Module) -> bool:
    """Whether attention is tempered by the index of a token, which a chunk's mask does not tell (Llama 4)."""
    types = getattr(getattr(layer, "config", None), "layer_types", None)
    if not getattr(layer, "attn_temperature_tuning", None) or getattr(layer, "use_rope", True) or not types:
        return False
    return bool(types[layer.layer_idx] == "chunked_attention")
