"""What one forward of a patched model knows: where its sequences lie, and which layers have kept to it.

The masks themselves travel in the arguments of the layers (see `packattn.hf.masks`). What cannot travel there, because
layers do not take it, is found here for the time of the forward: a context variable, so that threads do not meet.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from packattn.hf.layout import Layout
from packattn.hf.plan import Plan


@dataclass(eq=False)
class Running:
    """One forward of a patched model.

    Attributes:
        plan, owner: of the model, and the module whose call this is. before: what it is nested in.
        position_ids: (rows, n). real: (rows, n), nonzero for tokens; None: all are.
        counted: the caller gave neither positions nor sequences: every row is one.
        plain: transformers runs the model by itself, in its own attention: verify, continuous batching.
        packed: False where transformers is left to itself: a forward over a cache.
        layout: where the sequences lie, known on the host; None where nobody needs it or nothing is packed.
        padding_token: what a classifier without a padding token takes for one, and no sequence ends with.
        masks: the k_start of every PackedMask made in this forward.
        entered, ran: the attention layers that were called, and the ids of those that used such a mask.
    """

    plan: Plan | None = None
    owner: nn.Module | None = None
    before: "Running | None" = None
    position_ids: Tensor | None = None
    counted: bool = False
    real: Tensor | None = None
    plain: bool = False
    packed: bool = False
    layout: Layout | None = None
    padding_token: int | None = None
    masks: list[Tensor] = field(default_factory=list)
    entered: dict[int, nn.Module] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)

    @property
    def plainly_unpacked(self) -> bool:
        """Whether every row is one sequence without padding, which no value has to be looked at for."""
        return self.counted and self.real is None

    @property
    def first(self) -> bool:
        """Whether this is the first forward of a patched model, which may wait for the device."""
        return self.plan is not None and self.plan.first_forward


def past_the_hooks(what: str) -> str:
    """The error of a layer or model that runs where nothing tells packed sequences apart."""
    return (
        f"{what} runs past the hooks of packattn.patch, so that packed sequences would not be isolated. Call "
        "packattn.patch(model) on this very model: a trainer loads a second one, a reference model, with the "
        "attn_implementation of the first (TRL's DPOTrainer: packattn.patch(trainer.ref_model)). If it is patched call "
        "model(...) or torch.compile(model), not a compiled model.forward, with a tensor named input_ids or "
        "inputs_embeds."
    )


# None outside of a forward. SUSPENDED: the model runs in transformers' own attention (verify, rows of one sequence).
RUNNING: ContextVar[Running | None] = ContextVar("packattn_running", default=None)
SUSPENDED = Running(plain=True)


# What holds the function that checkpoints a layer: transformers' layers, and torch's wrapper around any module, which
# FSDP and Accelerate put there.
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def keep_running_in_checkpoints(module: nn.Module) -> bool:
    """Recomputation runs outside of the forward: it gets what its forward knew along with its arguments.

    Returns:
        Whether something else than transformers checkpoints layers, which knows no caches.

    Raises:
        NotImplementedError: reentrant checkpoints around layers that share keys and values.
    """
    from_outside = reentrant = shares = False
    for layer in module.modules():
        own = vars(layer)
        shares = shares or bool(own.get("is_kv_shared_layer"))
        for name in _CHECKPOINTS:
            function = own.get(name)
            if function is None:
                continue
            if not (isinstance(function, partial) and function.func is _checkpoint):
                function = partial(_checkpoint, function)
                setattr(layer, name, function)
            outside = name == "checkpoint_fn"
            from_outside = from_outside or outside
            options = getattr(function.args[0], "keywords", {})
            reentrant = reentrant or bool(
                options.get("use_reentrant") and (outside or own.get("gradient_checkpointing"))
            )
    if reentrant and shares:
        raise NotImplementedError(
            f"{type(module).__name__} has layers that share keys and values, to which reentrant checkpoints give no "
            "gradient. Checkpoint with use_reentrant=False (CheckpointImpl.NO_REENTRANT)."
        )
    return from_outside


def _checkpoint(function: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(partial(_under, RUNNING.get(), call), *args, **kwargs)


def _under(running: Running | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = RUNNING.set(running)
    try:
        return call(*args, **kwargs)
    finally:
        RUNNING.reset(token)
