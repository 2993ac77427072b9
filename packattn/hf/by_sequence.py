"""The forward of a layer that runs on one row per sequence: what `patch` puts in the place of its own."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.inputs import OF_SEQUENCES
from packattn.hf.layout import Group, by_group
from packattn.hf.masks import Carried, is_carried
from packattn.hf.plan import Plan
from packattn.hf.rope import forget
from packattn.hf.running import RUNNING, SUSPENDED, past_the_hooks


def by_sequence(
    module: nn.Module, forward: Callable[..., Any], plan: Plan, kind: str, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a layer that runs on one row per sequence while a packed batch goes through the model."""
    if plan.removed:
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _disabled(forward, module, plan, kind, args, kwargs)
    return _by_sequence(forward, module, plan, kind, args, kwargs)


def _by_sequence(
    forward: Callable[..., Any], module: nn.Module, plan: Plan, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    running = RUNNING.get()
    if running is None and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(module).__name__} was recomputed in the backward pass without the boundaries of its packed rows. "
            "Checkpoint by model.gradient_checkpointing_enable() or torch's checkpoint_wrapper, which packattn knows."
        )
    if running is None and kind != "one":
        raise RuntimeError(past_the_hooks(type(module).__name__))
    if running is not None and running.plain:
        return forward(*args, **kwargs)
    layout = running.layout if running is not None else None
    if running is not None and running.packed:
        forget(module)
    if layout is None:  # one sequence a row: what was made for attention is padding by its plain name again

        def plain(value: Any) -> Any:
            return running.real if running is not None and (is_carried(value) or isinstance(value, Carried)) else value

        # Mixers of transformers raise on sequences that are given to them without their optional kernels.
        given = {name: plain(value) for name, value in kwargs.items() if name not in OF_SEQUENCES}
        return forward(*map(plain, args), **given)
    if kind != "one":
        _no_sharded_layers(module)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    whole = isinstance(module, PreTrainedModel)
    if whole and "use_cache" in names:
        arguments["use_cache"] = False
    if arguments.get("encoder_hidden_states") is not None:
        raise NotImplementedError(
            "encoder_hidden_states: cross-attention of a packed row is not supported by packattn. Remove the patch."
        )
    unknown = bool(plan.unknown) and module is plan.stack
    if unknown and not plan.by_length(module) and arguments.get("labels") is not None:
        raise NotImplementedError(
            f"labels: {plan.rows[0]}, nor how the loss weighs packed sequences. Leave "
            "labels out and take the loss of the logits by packattn.token_losses, or vouch for the classes by "
            "packattn.patch(model, trusted=[...])."
        )
    labels = arguments.pop("labels", None) if plan.by_length(module) else None
    # The loss of each group is put together by its number of sequences. Lengths were read on the host as well.
    if isinstance(labels, Tensor) and not labels.dtype.is_floating_point and bool((labels == -100).any()):
        raise ValueError(f"labels must hold a class for every packed sequence, got -100 in {labels.tolist()}.")

    def call(group: Group) -> Any:
        token = RUNNING.set(SUSPENDED)
        try:
            # Positional arguments stay so: reentrant checkpointing gives no gradient to others.
            given = {name: group.argument(name, value, whole) for name, value in arguments.items()}
            positional = [given.pop(name) for name in names[: len(args)] if name in given]
            if labels is not None:
                given["labels"] = labels[group.members]
            for inner in module.modules():
                forget(inner)
            return forward(*positional, **given)
        finally:
            RUNNING.reset(token)

    pooled = kind == "one" or plan.by_length(module)
    return by_group(layout, plan.groups(layout, kind), call, pooled, plan.results if unknown and not pooled else None)


_disabled: Callable[..., Any] = torch.compiler.disable(_by_sequence)  # type: ignore[no-untyped-call]


def _no_sharded_layers(module: nn.Module) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    by = []
    if any(type(m).__name__.startswith(("FSDP", "FullySharded")) for m in module.modules()):
        by.append("FSDP")
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        by.append("DeepSpeed ZeRO-3")
    if by and torch.distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"{type(module).__name__} runs one row per sequence, so often on each rank as there are lengths, which "
            f"would hang sharded layers ({by[0]}). packattn supports it with DistributedDataParallel."
        )
