"""The hook on the modules that build masks: boundaries in place of the attention_mask that a caller gave."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from packattn.hf.hooks import NAME, prepare
from packattn.hf.conditions import Conditions
from packattn.hf.inputs import cache_of, same_sequences, tokens_of
from packattn.hf.masks import Carried, carry
from packattn.hf.plan import Plan
from packattn.hf.running import RUNNING, SUSPENDED, Running, keep_running_in_checkpoints
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
        if running is SUSPENDED:
            return None
        if module.config._attn_implementation != NAME:
            raise RuntimeError(
                f"{type(module).__name__} attends by {module.config._attn_implementation!r}, set after packattn.patch: "
                "packed sequences would not be isolated. Call .remove() of the Patch first, or patch again after."
            )
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
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
            running = Running(plan=self.plan)
            if not prepare(running, arguments, tokens):
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
        if (module.training and torch.is_grad_enabled()) or from_outside:
            _leave_out_cache(arguments, self.names)
        if module.training and not compiling:
            _warn_of_noise(self.plan.builders[-1][1])
        if running.real is not None and module is self.plan.builders[-1][1]:
            _fill_padding(module, arguments, running.real)
        if "position_ids" in self.names and arguments.get("position_ids") is None:
            arguments["position_ids"] = running.position_ids  # before a model derives them from the mask
        return (), arguments


def _leave_out_cache(arguments: dict[str, Any], names: list[str]) -> None:
    """No cache by default where gradients are wanted: a layer that a checkpoint runs again would add to it twice."""
    if "use_cache" in names and arguments.get("use_cache") is None and cache_of(arguments) is None:
        arguments["use_cache"] = False


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
