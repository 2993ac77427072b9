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
        if isinstance(carried, Tensor) and is_carried(carried):
            for part in output.values() if isinstance(output, ModelOutput) else output:
                if isinstance(part, Cache):
                    sign(part, *carried.unbind(1))
            if not any(kind == "one" for _, _, kind in self.plan.by_sequence):
                output = _no_result_of_a_packed_row(carried, output)
        running = None if torch.compiler.is_compiling() else RUNNING.get()
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
