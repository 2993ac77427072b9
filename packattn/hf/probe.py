"""One small packed forward when a model is patched: what its code does not tell, its behaviour does."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.plan import Plan
from packattn.hf.running import RUNNING, SUSPENDED

_LENGTHS = (3, 5)
_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)  # NotImplementedError is one
_FROM_TWO = {"mra", "nystromformer", "yoso"}  # by a constant in their code


@dataclass(frozen=True)
class Problem:
    """Why a packed forward did not isolate its second sequence.

    Attributes:
        reason: in words. failed: the model's own code raised an error, as it may without packing too.
    """

    reason: str
    failed: bool = False


def _ids(builder: PreTrainedModel) -> Tensor:
    weight: Tensor = builder.get_input_embeddings().weight
    return (torch.arange(sum(_LENGTHS), device=weight.device)[None] + 3) % weight.shape[0]


def runs(builder: PreTrainedModel) -> bool:
    """Whether an unpatched model runs on what the probe gives it."""
    ids = _ids(builder)
    try:
        with _undisturbed(builder):
            builder(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    except _ERRORS:
        return False
    return True


def runnable(builder: PreTrainedModel) -> bool:
    """Whether the weights of a model are here and whole, so that a small forward can be run."""
    weights = [p for p in builder.parameters() if p.is_floating_point()]
    whole = all(type(p) in (Tensor, nn.Parameter) and not p.is_meta and p.numel() for p in weights)
    try:
        embeddings = builder.get_input_embeddings()
    except NotImplementedError:  # hashed characters, for one
        return False
    return bool(weights) and whole and isinstance(getattr(embeddings, "weight", None), Tensor)


def probe(plan: Plan) -> Problem | None:
    """Run the patched builder on two short sequences, and again with other tokens in the first.

    Returns:
        Why the second sequence is not isolated, or None. A model that cannot be run here (weights elsewhere, inputs
        beside text) is left to the checks of every forward.
    """
    builder = plan.builders[0][1]
    if not runnable(builder):
        return None
    ids = _ids(builder)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(ids.device) + plan.first_position
    changed = ids.clone()
    changed[:, : _LENGTHS[0]] = (ids[:, : _LENGTHS[0]] + 7) % builder.get_input_embeddings().weight.shape[0]
    extra = beside_text(builder, ids)
    try:
        with _undisturbed(builder):
            one, other = (_second(builder, given, positions, extra) for given in (ids, changed))
    except NotImplementedError as error:
        return Problem(str(error))
    except _ERRORS as error:
        if "packattn" in str(error):
            return Problem(str(error))
        return Problem(f"its code fails on packattn's masks: {type(error).__name__}: {error}", failed=True)
    if one is None or other is None or one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return None
    # Experts may round differently with other neighbours; a leak is orders larger.
    moved = (one - other).abs().max().item() / max(one.abs().max().item(), 1e-30)
    if moved > 256 * torch.finfo(one.dtype).eps:
        return Problem(
            f"in a forward of two short sequences, the second moved by {moved:.1e} with the tokens of the first"
        )
    return None


def beside_text(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What a model needs beside tokens (rows, n, ...): PaliGemma has no mask without token_type_ids (rows, n)."""
    both_ways = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
    typed = both_ways and "token_type_ids" in inspect.signature(model.forward).parameters
    return {"token_type_ids": torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)} if typed else {}


def first_position(builder: PreTrainedModel) -> int:
    """Where a model's own positions begin: 0, or after the padding index in the RoBERTa family.

    Found by which positions give what the model gives without any; where it cannot be run here, by the padding index
    of its table of positions.
    """
    if "position_ids" not in inspect.signature(builder.forward).parameters:
        return 0
    if not runnable(builder):
        return _first_by_structure(builder)
    ids = _ids(builder)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    padding = getattr(builder.config, "pad_token_id", None)
    firsts = dict.fromkeys([0, 2, (padding if isinstance(padding, int) else 0) + 1])
    token = RUNNING.set(SUSPENDED)
    try:
        with _undisturbed(builder):
            own = _hidden(builder(input_ids=ids))
            for first in firsts:
                given = _hidden(builder(input_ids=ids, position_ids=positions + first))
                if own is not None and given is not None and torch.allclose(given, own, rtol=1e-3, atol=1e-4):
                    return first
    except _ERRORS:
        return 0
    finally:
        RUNNING.reset(token)
    return 0


def _first_by_structure(builder: PreTrainedModel) -> int:
    if builder.config.model_type in _FROM_TWO:
        return 2
    tables = (getattr(module, "position_embeddings", None) for module in builder.modules())
    padding = (getattr(table, "padding_idx", None) for table in tables)
    return next((index + 1 for index in padding if index is not None), 0)


@contextmanager
def _undisturbed(builder: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradients, the random state as before afterwards."""
    modes = [(module, module.training) for module in builder.modules()]
    devices = sorted({p.device.index for p in builder.parameters() if p.device.type == "cuda"})
    try:
        builder.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _second(builder: PreTrainedModel, ids: Tensor, positions: Tensor, extra: dict[str, Tensor]) -> Tensor | None:
    hidden = _hidden(builder(input_ids=ids, position_ids=positions, **extra))
    return None if hidden is None else hidden[:, _LENGTHS[0] :]


def _hidden(output: Any) -> Tensor | None:
    hidden = output.get("last_hidden_state") if hasattr(output, "get") else output[0]
    return hidden if isinstance(hidden, Tensor) and hidden.ndim == 3 else None
