"""A small packed forward when a model is patched, beside its sequences alone: what its parts do not tell, it shows."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.plan import Plan
from packattn.hf.running import RUNNING, SUSPENDED

_LENGTHS = (3, 5, 5)  # two of one length: what mixes over a batch of rows shows too
_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)  # NotImplementedError is one
_FROM_TWO = {"mra", "nystromformer", "yoso"}  # by a constant in their code
_ELSEWHERE = "its weights are not here, or not whole (meta, offloaded, sharded)"


def _ids(builder: PreTrainedModel, device: torch.device | None = None) -> Tensor:
    weight: Tensor = builder.get_input_embeddings().weight
    return (torch.arange(sum(_LENGTHS), device=device or weight.device)[None] * 5 + 3) % weight.shape[0]


def runnable(builder: PreTrainedModel) -> bool:
    """Whether the weights of a model are here and whole, so that a small forward can be run."""
    weights = [p for p in builder.parameters() if p.is_floating_point()]
    whole = all(type(p) in (Tensor, nn.Parameter) and not p.is_meta and p.numel() for p in weights)
    return bool(weights) and whole and _embeds(builder)


def _embeds(builder: PreTrainedModel) -> bool:
    try:
        return isinstance(getattr(builder.get_input_embeddings(), "weight", None), Tensor)
    except NotImplementedError:  # hashed characters, for one
        return False


class Probe:
    """Three short sequences: first alone, by the model as transformers runs it, then packed, by the patched model.

    Args:
        plan: of the model. device: of its inputs; None: that of its embeddings.

    Attributes:
        missing: why nothing can be run; empty: the model ran on the sequences alone.
    """

    def __init__(self, plan: Plan, device: torch.device | None = None) -> None:
        entry, builder = plan.entries[0], plan.builders[0][1]
        takes_ids = "input_ids" in inspect.signature(entry.forward).parameters
        self.plan, self.model = plan, entry if takes_ids else builder
        self.alone: list[dict[str, Tensor]] = []
        self.missing = "" if _embeds(builder) and (device is not None or runnable(entry)) else _ELSEWHERE
        if self.missing:
            return
        self.ids = _ids(builder, device)
        token = RUNNING.set(SUSPENDED)
        try:
            with _undisturbed(entry), _without_packattn(entry):
                for ids in torch.split(self.ids, [*_LENGTHS], 1):
                    self.alone.append(_tensors(self.model(input_ids=ids, **beside_text(builder, ids))))
        except _ERRORS as error:
            self.missing = f"it does not run on tokens alone: {type(error).__name__}: {error}"
        finally:
            RUNNING.reset(token)

    def problem(self) -> str:
        """Why packed sequences are not isolated, or not what they are alone; empty: they are, or nothing can be run."""
        if self.missing:
            return ""
        builder, first = self.plan.builders[0][1], _LENGTHS[0]
        positions = torch.cat([torch.arange(n) for n in _LENGTHS]).to(self.ids.device) + self.plan.first_position
        ids = self.ids.repeat(2, 1)
        ids[1, :first] = (ids[1, :first] + 7) % builder.get_input_embeddings().weight.shape[0]
        given = {"input_ids": ids, "position_ids": positions.repeat(2, 1)} | beside_text(builder, ids)
        try:
            with _undisturbed(self.plan.entries[0]):
                packed = _tensors(self.model(**given))
        except NotImplementedError as error:
            return str(error)
        except _ERRORS as error:
            known = "packattn" in str(error)
            return str(error) if known else f"its code fails on packattn's masks: {type(error).__name__}: {error}"
        found = (self._compare(name, packed.get(name)) for name in self.alone[0])
        return next((problem for problem in found if problem), "")

    def _compare(self, name: str, packed: Tensor | None) -> str:
        alone = [output[name] for output in self.alone if name in output]
        by_token = all(x.ndim > 1 and x.shape[:2] == (1, n) for x, n in zip(alone, _LENGTHS, strict=False))
        if len(alone) < len(_LENGTHS) or packed is None or bool(packed.isnan().all()):
            return ""
        if by_token and packed.shape[:2] == (2, sum(_LENGTHS)):
            rows = [torch.split(row, [*_LENGTHS]) for row in packed]
            alone = [x[0] for x in alone]
        elif not by_token and all(x.shape == alone[0].shape and x.shape[:1] == (1,) for x in alone):
            if packed.shape[0] != 2 * len(_LENGTHS):
                return f"it gives {packed.shape[0]} {name} for {2 * len(_LENGTHS)} packed sequences"
            rows = [torch.split(row, 1) for row in packed.chunk(2)]
        else:
            return ""
        scale = max(*(x.abs().max().item() for x in alone), 1e-30)
        eps = torch.finfo(packed.dtype).eps
        if not all(bool(torch.isfinite(x).all()) for x in (packed, *alone)):
            return ""
        # Experts may round differently with other neighbours; a leak is orders larger.
        moved = max((a - b).abs().max().item() for a, b in zip(rows[0][1:], rows[1][1:], strict=True)) / scale
        if moved > 256 * eps:
            return f"in a forward of short sequences, {name} of one moved by {moved:.1e} with the tokens of another"
        # The median, since a rounding may send single tokens to other experts.
        away = [(a - b).abs().reshape(len(a), -1).amax(1).median().item() for a, b in zip(rows[0], alone, strict=True)]
        if max(away) / scale > eps**0.5:
            return f"in a forward of short sequences, packed {name} differ by {max(away) / scale:.1e} from those alone"
        return ""


def _tensors(result: Any) -> dict[str, Tensor]:
    """The floating-point tensors that a model returns, by name or place."""
    result = result if isinstance(result, (Mapping, tuple, list)) else [result]
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): value for name, value in items if isinstance(value, Tensor) and value.is_floating_point()}


@contextmanager
def _without_packattn(model: nn.Module) -> Iterator[None]:
    """transformers' eager attention where packattn's was set, by a patch or when the model was loaded."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    ours = [config for config in configs if config._attn_implementation == "packattn"]
    try:
        for config in ours:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config in ours:
            config._attn_implementation_internal = "packattn"


def probe_late(plan: Plan, tokens: Tensor) -> None:
    """Probe a model in its first forward, if it could not be when it was patched, and its weights are here now.

    Raises:
        RuntimeError: packed sequences are not what they are alone.
    """
    if plan.not_probed != _ELSEWHERE:
        return
    plan.not_probed = f"{_ELSEWHERE}, nor were they in the first forward"
    offloaded = any(hasattr(module, "_hf_hook") for module in plan.entries[0].modules())
    if not offloaded and not runnable(plan.entries[0]):
        return
    probe = Probe(plan, tokens.device)
    plan.not_probed = probe.missing
    problem = probe.problem()
    plan.first_forward = True  # those of the probe are not the user's
    if problem:
        raise RuntimeError(
            f"{problem}. The weights were not here when packattn.patch planned how to isolate packed sequences. Call "
            ".remove() of the Patch, and packattn.patch again now that they are; or train this model unpacked."
        )


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
    if not runnable(builder) or "position_ids" not in inspect.signature(builder.forward).parameters:
        return first_by_structure(builder)
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


def first_by_structure(builder: PreTrainedModel) -> int:
    """Where a model's own positions begin, by its table of positions."""
    if "position_ids" not in inspect.signature(builder.forward).parameters:
        return 0
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


def _hidden(output: Any) -> Tensor | None:
    hidden = output.get("last_hidden_state") if hasattr(output, "get") else output[0]
    return hidden if isinstance(hidden, Tensor) and hidden.ndim == 3 else None
