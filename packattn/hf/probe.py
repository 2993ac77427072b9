"""One small packed forward when a model is patched: what its code does not tell, its behaviour does."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packattn.hf.plan import Plan

_LENGTHS = (3, 5)


def probe(plan: Plan) -> str | None:
    """Run the patched builder on two short sequences, and again with other tokens in the first.

    Returns:
        Why the second sequence is not isolated, or None. A model that cannot be run here (weights elsewhere, inputs
        beside text) is left to the checks of every forward.
    """
    builder = plan.builders[0][1]
    weights = [p for p in builder.parameters() if p.is_floating_point()]
    if not weights or any(type(p) not in (Tensor, nn.Parameter) or p.is_meta or p.numel() == 0 for p in weights):
        return None
    embed = builder.get_input_embeddings()
    if not isinstance(getattr(embed, "weight", None), Tensor):
        return None
    first = _first_position(builder)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(embed.weight.device) + first
    ids = (torch.arange(sum(_LENGTHS), device=positions.device)[None] + 3) % embed.weight.shape[0]
    changed = ids.clone()
    changed[:, : _LENGTHS[0]] = (ids[:, : _LENGTHS[0]] + 7) % embed.weight.shape[0]
    modes = [(module, module.training) for module in builder.modules()]
    devices = sorted({p.device.index for p in weights if p.device.type == "cuda"})
    try:
        builder.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            one, other = (_second(builder, given, positions) for given in (ids, changed))
    except NotImplementedError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return str(error) if "packattn" in str(error) else None
    finally:
        for module, training in modes:
            module.training = training
    if one is None or other is None or one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return None
    # Experts may round differently with other neighbours; a leak is orders larger.
    moved = (one - other).abs().max().item() / max(one.abs().max().item(), 1e-30)
    if moved > 256 * torch.finfo(one.dtype).eps:
        return f"in a forward of two short sequences, the second moved by {moved:.1e} with the tokens of the first"
    return None


def _second(builder: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor | None:
    output = builder(input_ids=ids, position_ids=positions)
    hidden = output.get("last_hidden_state") if hasattr(output, "get") else output[0]
    return hidden[:, _LENGTHS[0] :] if isinstance(hidden, Tensor) and hidden.ndim == 3 else None


def _first_position(model: nn.Module) -> int:
    """Where the positions of a sequence begin: after the padding index in the RoBERTa family."""
    for module in model.modules():
        if hasattr(type(module), "create_position_ids_from_input_ids"):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0
