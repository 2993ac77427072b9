"""patch: put packed attention into a Hugging Face model through transformers' own interfaces.

An attention function and a mask function are registered under the name "packattn"; the model is told to use them; and
a pre-hook on every module that builds masks carries position ids and padding to the mask function. No state is kept
between the hook and the layers: everything travels in the arguments of the forward.
"""

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from packattn.errors import UnsupportedModelError
from packattn.hf.attention import attention_forward
from packattn.hf.masks import carry, packed_mask
from packattn.hf.refusals import refusals

NAME = "packattn"


class Patch:
    """What `patch` did to a model; a context manager that undoes it."""

    def __init__(self, model: nn.Module, restore: list[Callable[[], None]]) -> None:
        self._model = model
        self._restore = restore

    def remove(self) -> None:
        """Put the model back as it was. Calling it again does nothing."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        if not self._restore:
            return f"Patch({type(self._model).__name__}, removed)"
        lines = [f"Patch({type(self._model).__name__})"]
        for name, builder in mask_builders(self._model):
            lines.append(f"  masks   {name or type(builder).__name__}: spans from position_ids")
        layers: dict[str, int] = {}
        for module in self._model.modules():
            if is_attention(module):
                layers[type(module).__name__] = layers.get(type(module).__name__, 0) + 1
        lines += [f"  {count:>3} x    {name}: packed_attention" for name, count in layers.items()]
        return "\n".join(lines)


def patch(model: nn.Module) -> Patch:
    """Isolate packed sequences in a Hugging Face model: rows whose position_ids restart, in every call.

    The model takes `input_ids` and `position_ids` of shape (rows, n), and an `attention_mask` (rows, n) if there is
    padding. Rows without position_ids are one sequence each. Forwards over a cache that holds tokens (generate) are
    not packed, and run as transformers does them.

    Args:
        model: a transformers PreTrainedModel, or a module that wraps one.

    Returns:
        Patch: `.remove()` undoes it, as does leaving a `with` block.

    Raises:
        UnsupportedModelError: packed sequences cannot be isolated in this model; the message lists every reason, and
            the model is left as it was.
        TypeError: no transformers model.
        ValueError: the model is patched already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module that holds a transformers model, got {type(model).__name__}.")
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not pretrained:
        raise TypeError(f"model must be or hold a transformers PreTrainedModel, got {type(model).__name__}.")
    if any(module.config._attn_implementation == NAME for module in pretrained):
        raise ValueError("model is patched already; call .remove() of the Patch that packattn.patch returned first.")
    builders = mask_builders(model)
    reasons = refusals(model, pretrained, builders)
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise UnsupportedModelError(
            f"packattn cannot isolate packed sequences in {type(model).__name__}:\n{listed}\n"
            "Train it unpacked, one example a row."
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, packed_mask)
    restore: list[Callable[[], None]] = []
    try:
        for config in configs_of(pretrained):
            restore.append(_set_implementation(config))
        for _, builder in builders:
            restore.append(builder.register_forward_pre_hook(_hook_for(builder), with_kwargs=True).remove)
    except BaseException:
        Patch(model, restore).remove()
        raise
    return Patch(model, restore)


def configs_of(pretrained: list[PreTrainedModel]) -> list[PreTrainedConfig]:
    """The configs that say how the models attend, each once."""
    return list({id(module.config): module.config for module in pretrained}.values())


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one that calls the attention interface."""
    return "Attention" in type(module).__name__ and not any("Attention" in type(m).__name__ for m in module.children())


def mask_builders(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The innermost transformers models that take an attention_mask: those that build masks for their layers."""

    def takes_mask(module: nn.Module) -> bool:
        return isinstance(module, PreTrainedModel) and "attention_mask" in inspect.signature(module.forward).parameters

    return [
        (name, module)
        for name, module in model.named_modules()
        if takes_mask(module) and not any(takes_mask(inner) for inner in module.modules() if inner is not module)
    ]


def _set_implementation(config: PreTrainedConfig) -> Callable[[], None]:
    before = config._attn_implementation

    def restore() -> None:
        config._attn_implementation_internal = before

    config._attn_implementation_internal = NAME
    return restore


def _hook_for(builder: PreTrainedModel) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    names = list(inspect.signature(builder.forward).parameters)

    def hook(
        module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module.config._attn_implementation != NAME:
            return None  # verify runs the model in transformers' own attention
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if arguments.get("output_attentions") or module.config.output_attentions:
            raise NotImplementedError(
                "output_attentions=True: packattn never forms the attention weights. Leave it out, or remove the patch."
            )
        attention_mask = arguments.get("attention_mask")
        if holds_tokens(arguments.get("past_key_values")):
            return None
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return None  # the model's own error says that it needs one of them
        position_ids = arguments.get("position_ids")
        _check(tokens, position_ids, attention_mask, arguments)
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        arguments["attention_mask"] = carry(position_ids, attention_mask, tokens.shape[0])
        return (), arguments

    return hook


def holds_tokens(cache: Any) -> bool:
    """Whether a forward continues a cache: decided without reading the device."""
    if cache is None:
        return False
    # A static cache counts its tokens on the device; it is made for generation, never for packed training.
    return bool(getattr(cache, "is_compileable", False)) or cache.get_seq_length() > 0


def _check(tokens: Tensor, position_ids: Any, attention_mask: Any, arguments: dict[str, Any]) -> None:
    rows, n = tokens.shape[:2]
    if rows == 0 or n == 0:
        raise ValueError(f"input_ids must hold at least one row of at least one token, got shape {(rows, n)}.")
    if isinstance(attention_mask, dict):
        raise ValueError(
            "attention_mask is a dict of masks that were made before packattn saw position_ids. Pass a 2-D "
            "attention_mask or none; if the model itself made it, train this model unpacked, without packattn.patch."
        )
    for name, value in (("position_ids", position_ids), ("attention_mask", attention_mask)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an integer tensor of shape (rows, n) = {(rows, n)}, got {got}.")
        if name == "position_ids" and value.ndim == 3:
            raise ValueError(
                f"position_ids of shape {tuple(value.shape)} have several planes (M-RoPE), from which packattn does "
                "not guess boundaries. Train this model unpacked, without packattn.patch."
            )
        if name == "attention_mask" and value.ndim == 4:
            raise ValueError(
                f"attention_mask of shape {tuple(value.shape)} is dense, but a patched model makes its mask from "
                "position_ids. Pass position_ids that restart with every sequence, and no attention_mask or a 2-D one."
            )
        if value.ndim != 2 or value.shape[1] != n or value.shape[0] not in (rows, 1):
            raise ValueError(f"{name} must have shape (rows, n) = {(rows, n)}, as the input, got {tuple(value.shape)}.")
        if value.device != tokens.device:
            raise ValueError(f"{name} must be on the device of the input, {tokens.device}, got {value.device}.")
    explicit = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if arguments.get(name) is not None]
    if explicit and position_ids is None:
        raise ValueError(
            f"{' and '.join(explicit)} came without position_ids, by which packattn finds the sequences. Pass "
            "position_ids that restart with every sequence (PackingCollator makes them)."
        )
