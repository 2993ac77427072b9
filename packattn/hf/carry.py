"""The hook on the modules that build masks: boundaries in place of the attention_mask that a caller gave."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from packattn.hf.cache import cache_of, is_paged
from packattn.hf.conditions import Conditions
from packattn.hf.hooks import NAME, prepare
from packattn.hf.inputs import as_called, same_sequences, tokens_of
from packattn.hf.masks import Carried, carry, is_carried
from packattn.hf.plan import Plan
from packattn.hf.running import RUNNING, Running, keep_running_in_checkpoints
from packattn.mask import PackedMask


@dataclass
class Carry:
    """Forward pre-hook on a builder: boundaries in place of the attention_mask."""

    plan: Plan
    names: list[str]
    four: bool

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        compiling = torch.compiler.is_compiling() and not self.plan.needs_layout
        running = None if compiling else RUNNING.get()
        from_outside = not compiling and torch.is_grad_enabled() and keep_running_in_checkpoints(module)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if (running is not None and running.plain) or is_paged(arguments):
            return None
        if module.config._attn_implementation != NAME:
            raise RuntimeError(
                f"{type(module).__name__} attends by {module.config._attn_implementation!r}, set after packattn.patch: "
                "packed sequences would not be isolated. Call .remove() of the Patch first, or patch again after."
            )
        if arguments.get("output_attentions") or module.config.output_attentions:
            raise NotImplementedError(
                "output_attentions=True: packattn never forms the attention weights. Leave it out, or remove the patch."
            )
        if arguments.get("is_causal") and any(
            not getattr(layer, "is_causal", True) for _, layer in self.plan.attention
        ):
            raise NotImplementedError(
                f"is_causal=True: of {type(module).__name__}, which looks both ways, transformers' implementations of "
                "attention make different things then. Leave it out, or remove the patch."
            )
        tokens = tokens_of(arguments)
        if not isinstance(tokens, Tensor) or holds_masks(arguments.get("attention_mask")):
            return None
        if running is None:  # compiled, or called without the model around it
            _assert_unchanged(self.plan)
            running, given = Running(plan=self.plan), arguments.get("attention_mask")
            if isinstance(given, Tensor) and is_carried(given):  # by a builder around this one
                running.position_ids, running.real = given[:, 0].long(), given[:, 1]
                running.packed = True
            elif not prepare(running, arguments, tokens):
                return None
        if not running.packed or running.position_ids is None:
            return None
        if arguments.get("encoder_hidden_states") is not None:
            raise NotImplementedError(
                "encoder_hidden_states: cross-attention of a packed row is not supported by packattn. Remove the patch."
            )
        conditions = Conditions()
        same_sequences(conditions, arguments.get("position_ids"), running.position_ids, running.real)
        conditions.enforce(running.first)
        carried = carry(running.position_ids, running.real, tokens.shape[0])
        arguments["attention_mask"] = Carried(carried) if self.four else carried
        if hasattr(module, "_maybe_slice_kv_shared_inputs") and module not in self.plan.entries:
            # Gemma 4 would cut its masks to the last tokens; the model around it cuts what comes back.
            arguments["logits_to_keep"] = None
        if (module.training and torch.is_grad_enabled()) or from_outside:
            _leave_out_cache(arguments, self.names)
        if module.training and not compiling:
            _warn_of_noise(self.plan.builders[-1][1])
        counts_by_itself = running.counted and self.plan.first_position and arguments.get("input_ids") is not None
        if running.real is not None and module is self.plan.builders[-1][1] and not counts_by_itself:
            _fill_padding(module, arguments, running.real)
        if "position_ids" in self.names and arguments.get("position_ids") is None and not counts_by_itself:
            arguments["position_ids"] = running.position_ids  # before a model derives them from the mask
        if "token_type_ids" in self.names and arguments.get("token_type_ids") is None:
            _lengthen_token_types(module, arguments, tokens)
        return as_called(self.names, args, arguments)


def _leave_out_cache(arguments: dict[str, Any], names: list[str]) -> None:
    """No cache by default where gradients are wanted: a layer that a checkpoint runs again would add to it twice."""
    if "use_cache" in names and arguments.get("use_cache") is None and cache_of(arguments) is None:
        arguments["use_cache"] = False


def _lengthen_token_types(module: PreTrainedModel, arguments: dict[str, Any], tokens: Tensor) -> None:
    """Token types for a row that is longer than the zeros that a model keeps for its longest sequence (FNet)."""
    kept = getattr(getattr(module, "embeddings", None), "token_type_ids", None)
    if isinstance(kept, Tensor) and kept.shape[-1] < tokens.shape[1]:
        arguments["token_type_ids"] = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def _fill_padding(module: PreTrainedModel, arguments: dict[str, Any], real: Tensor) -> None:
    """Another token, or embeddings of ones, in the place of padding whose embedding is kept at zero.

    Padding sees no other token here, so that its state would stay zero: where a model divides by its norm (Gemma-3n),
    all gradients would be NaN. Nothing sees what stands there.
    """
    padding = getattr(module.get_input_embeddings(), "padding_idx", None)
    if padding is None:
        return
    if isinstance(ids := arguments.get("input_ids"), Tensor):
        arguments["input_ids"] = ids.where(real != 0, padding + 1 if padding == 0 else padding - 1)
    elif isinstance(embeddings := arguments.get("inputs_embeds"), Tensor):
        arguments["inputs_embeds"] = embeddings.where(real[..., None] != 0, 1.0)


def _warn_of_noise(builder: PreTrainedModel) -> None:
    """Say once that NEFTune's noise, which Trainer puts on the embeddings, does not know the sequences of a row."""
    if hasattr(builder.get_input_embeddings(), "neftune_noise_alpha"):
        warnings.warn(
            "NEFTune divides its noise by the square root of the length of the row, so that a packed sequence gets "
            "less of it than alone. Raise neftune_noise_alpha, or leave it out.",
            stacklevel=2,
        )


def _assert_unchanged(plan: Plan) -> None:
    """What `Check` finds in every eager forward, found while a model is traced: once for each graph."""
    for (name, layer), forward in zip(plan.attention, plan.forwards, strict=True):
        if type(layer).forward is not forward:
            raise RuntimeError(
                f"the forward of {name} was replaced after packattn.patch: packed sequences would not be isolated "
                "there. Apply it before, or leave it out."
            )


def holds_masks(attention_mask: Any) -> bool:
    """Whether a model around this one has made its masks already."""
    if isinstance(attention_mask, dict):
        return any(isinstance(mask, PackedMask) for mask in attention_mask.values())
    return isinstance(attention_mask, (PackedMask, Carried))
