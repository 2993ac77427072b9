"""What is checked of a forward on packed rows: the layers that ran, and what comes back of a row as a whole."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from packattn.hf.inputs import one_sequence_a_row, sign
from packattn.hf.masks import Carried, is_carried
from packattn.hf.plan import Plan
from packattn.hf.running import RUNNING


class Mark:
    """Forward pre-hook on an attention layer: it runs in this forward."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            running = RUNNING.get()
            if running is not None:
                running.entered[id(module)] = module


@dataclass
class Check:
    """Forward hook on a builder: every attention layer that ran must have used a mask of this forward."""

    plan: Plan

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        carried = kwargs.get("attention_mask")
        carried = carried.tensor if isinstance(carried, Carried) else carried
        running = None if torch.compiler.is_compiling() else RUNNING.get()
        if isinstance(carried, Tensor) and is_carried(carried):
            output = _as_given(output, carried[:, 1].long() if running is None else running.real)
            if running is None or not running.plainly_unpacked:
                for part in output.values() if isinstance(output, ModelOutput) else output:
                    if isinstance(part, Cache):
                        sign(part, *carried.unbind(1))
                if not any(kind == "one" for _, _, kind in self.plan.by_sequence):
                    output = _no_result_of_a_packed_row(carried, output)
        if running is None or not running.packed:
            return output
        idle = {id(layer): name for name, layer in self.plan.attention if id(layer) not in running.entered}
        if gone := idle.keys() - (map(id, module.modules()) if idle else ()):
            raise RuntimeError(
                f"{', '.join(name for key, name in idle.items() if key in gone)} were taken out of the model after "
                "packattn.patch, which knows nothing of what stands there now. Call .remove() of the Patch first, and "
                "patch again after."
            )
        missed = [layer for key, layer in running.entered.items() if key not in running.ran]
        if missed:
            names = [name for name, layer in module.named_modules() if any(layer is other for other in missed)]
            raise RuntimeError(
                f"packattn did not run in {', '.join(names)} ({type(missed[0]).__name__}): the packed sequences were "
                "not isolated there. Something replaced the attention after packattn.patch: apply it before, or leave "
                "it out."
            )
        return output


@dataclass
class CheckResult:
    """Forward hook on a model around the builders: what it pools of a packed row itself is NaN (AltCLIP)."""

    plan: Plan
    names: list[str]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        running = None if torch.compiler.is_compiling() else RUNNING.get()
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        position_ids, real = arguments.get("position_ids"), arguments.get("attention_mask")
        if running is not None:
            position_ids, real = running.position_ids, running.real
        pooled = output.get("pooler_output") if isinstance(output, ModelOutput) else None
        if (
            type(output) is tuple
            and len(output) > 1
            and isinstance(output[0], Tensor)
            and isinstance(output[1], Tensor)
        ):
            pooled = output[1] if output[1].shape == output[0][:, 0].shape else None
        if pooled is None or not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
            return output
        if any(kind == "one" for _, _, kind in self.plan.by_sequence):
            return output
        pooled = torch.where(one_sequence_a_row(position_ids, real)[:, None], pooled, float("nan"))
        if type(output) is tuple:
            return (output[0], pooled, *output[2:])
        output.pooler_output = pooled
        return output


def _as_given(output: Any, attention_mask: Tensor | None) -> Any:
    """An output in which a model gives out its attention_mask (Qwen2-Audio), as the caller gave it: (rows, n)."""
    if isinstance(output, ModelOutput) and is_carried(output.get("attention_mask")):
        output.attention_mask = attention_mask
    elif type(output) is tuple:
        return tuple(attention_mask if is_carried(part) else part for part in output)
    return output


def _no_result_of_a_packed_row(carried: Tensor, output: Any) -> Any:
    """NaN in the place of what a model without a module for it pools (ALBERT, CLIP), where the row is packed.

    Poolers that are modules of their own give one result of each sequence.

    Args:
        carried: what `carry` made. output: of a builder, whose results of one value per token have three dimensions.
    """
    single = one_sequence_a_row(*carried.unbind(1))[:, None]
    if isinstance(output, ModelOutput) and output.get("pooler_output") is not None:
        output.pooler_output = torch.where(single, output.pooler_output, float("nan"))
    elif type(output) is tuple:
        parts = (
            x if not isinstance(x, Tensor) or x.ndim != 2 else torch.where(single, x, float("nan")) for x in output
        )
        return tuple(parts)
    return output
