"""verify: measure on the user's own model whether packed sequences see each other, and whether packed equals alone."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from packattn.boundaries import boundaries
from packattn.hf.patch import configs_of, is_patched
from packattn.hf.plan import make_plan
from packattn.hf.probe import beside_text, first_position
from packattn.hf.rope import forget
from packattn.hf.running import RUNNING, SUSPENDED

_LENGTHS = (7, 19, 1, 7, 13)  # two of one length: what mixes over a batch of rows shows too
# How models are called in the wild; transformers by itself isolates packed rows in the second way only.
_STYLES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "default call": lambda ids: {},
    "use_cache=False": lambda ids: {"use_cache": False},
    "all-ones attention_mask": lambda ids: {"attention_mask": torch.ones_like(ids)},
}
# Arguments that bring images or sound to a model.
_MEDIA = re.compile(r"pixel_values|image_embeds|video_embeds|input_features|input_values|audio_")
# Names that configs give to the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# Packed may differ from alone by this many times what one rounding of the embeddings makes in the model's output.
_NOISE_FACTOR = 32


@dataclass
class VerifyReport:
    """What `verify` measured.

    Attributes:
        model: class of the model. patched: whether packattn isolates it.
        leak: for each call style, the largest change of an output of one sequence when the tokens of another change,
            relative to the largest output.
        routed: the model routes tokens to experts. The sizes of the experts' matrix products then depend on all tokens
            of the batch, which can move a result by a rounding; only then may a leak be that small instead of zero.
        first_leak: the first layer whose input is the same and whose output is not; None if nothing leaks.
        gradient_leak: the largest gradient of one sequence's outputs at another's embeddings.
        parity: largest differences of packed from alone (each sequence by itself, in transformers' eager attention):
            outputs relative to the largest output, gradients of all parameters relative to their norm.
        noise: the same differences when every embedding is changed by one rounding: what the dtype cannot tell apart.
        beside_text: inputs of images or sound that the model takes, and that the probe does not give it.
    """

    model: str
    patched: bool
    lengths: tuple[int, ...]
    first_leak: str | None = None
    routed: bool = False
    leak: dict[str, float] = field(default_factory=dict)
    gradient_leak: float = 0.0
    parity: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    beside_text: tuple[str, ...] = ()

    @property
    def allowed_leak(self) -> float:
        """Zero, but for a model that routes tokens to experts."""
        return _NOISE_FACTOR * self.noise["outputs"] if self.routed else 0.0

    @property
    def isolated(self) -> bool:
        """No sequence sees another: the gradients across are exactly zero, and so are the leaks (see `routed`)."""
        return max(self.leak.values()) <= self.allowed_leak and self.gradient_leak == 0.0

    @property
    def ok(self) -> bool:
        """Isolated, and packed equals alone to the rounding of the dtype."""
        return self.isolated and all(self.parity[name] <= _NOISE_FACTOR * self.noise[name] for name in self.parity)

    def __str__(self) -> str:
        how = "patched by packattn" if self.patched else "plain transformers"
        rows = [(f"leak, {style}", value, self.allowed_leak, "LEAKS") for style, value in self.leak.items()]
        rows.append(("leak of gradients", self.gradient_leak, 0.0, "LEAKS"))
        for name, value in self.parity.items():
            rows.append((f"packed - alone, {name}", value, _NOISE_FACTOR * self.noise[name], "DIFFERS"))
        lines = [f"{self.model}, {how}, sequences of {', '.join(map(str, self.lengths))} tokens in one row"]
        for name, value, allowed, wrong in rows:
            lines.append(
                f"  {name:<36} {value:>9.2e}   allowed {allowed:>8.1e}   {'ok' if value <= allowed else wrong}"
            )
        lines.append(f"  {'isolated and exact' if self.ok else 'NOT ISOLATED' if not self.isolated else 'NOT EXACT'}")
        if self.first_leak is not None:
            lines.append(f"  the first layer that leaks: {self.first_leak}")
        if self.beside_text:
            lines.append(f"  of text alone: {', '.join(self.beside_text)} were not given")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    batch: Mapping[str, Tensor] | None = None,
    *,
    lengths: Sequence[int] = _LENGTHS,
    start_position: int | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Probe a model, patched or not, with one packed row: of your own batch, or of random tokens.

    Each sequence in turn gets other tokens: the outputs of all others must stay bitwise the same, in every call style;
    the gradient of each sequence's outputs at the embeddings of the others must be exactly zero; and outputs and
    parameter gradients must be those of the sequences run alone, in transformers' own eager attention. The model is run
    in eval mode; its mode, gradients and the random state are as before afterwards.

    Args:
        model: a transformers model that takes inputs_embeds and position_ids, in any attention implementation.
        batch: input_ids and position_ids, (1, n), as PackingCollator makes them; None: random tokens in `lengths`.
        lengths: of the sequences, at least two of them. start_position: first position; None: the model's own, which
            is 0, or 2 in the RoBERTa family.

    Raises:
        TypeError: no transformers model. ValueError: fewer than two sequences, or an empty one; a model that does not
            run on inputs_embeds and position_ids alone.
    """
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not pretrained:
        raise TypeError(f"model must be or hold a transformers PreTrainedModel, got {type(model).__name__}.")
    embed = _embeddings(pretrained[0])
    device, vocabulary = embed.weight.device, embed.weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    if batch is not None:
        ids, position_ids, lengths = _own(batch)
    else:
        if len(lengths) < 2 or min(lengths) < 1:
            raise ValueError(f"lengths must be two or more numbers of at least 1, got {tuple(lengths)}.")
        if start_position is None:
            start_position = first_position(make_plan(model).builders[-1][1])
        ids = torch.randint(vocabulary, (1, sum(lengths)), generator=generator)
        position_ids = torch.cat([torch.arange(n) + start_position for n in lengths])[None]
    ids, position_ids = ids.to(device), position_ids.to(device)
    other_ids = (ids + 1 + torch.randint(vocabulary - 1, ids.shape, generator=generator).to(device)) % vocabulary
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    report = VerifyReport(
        type(pretrained[0]).__name__,
        is_patched(model),
        tuple(lengths),
        routed=any(_routes(config) for config in configs_of(pretrained)),
        beside_text=tuple(name for name in inspect.signature(model.forward).parameters if _MEDIA.match(name)),
    )
    # Embeddings are given in place of ids, so that gradients at them can be asked for.
    x, other_x = embed(ids).detach(), embed(other_ids).detach()
    with _undisturbed(model):
        _assert_probed(model, x, position_ids)
        for style, extra in _STYLES.items():
            report.leak[style] = _leak(model, x, other_x, position_ids, spans, extra(ids))
        for style, extra in _STYLES.items():
            if report.leak[style] > 0 and report.first_leak is None:
                found = (_first_leak(model, x, other_x, position_ids, span, extra(ids)) for span in spans)
                report.first_leak = next((name for name in found if name is not None), None)
        # Caches have no gradients (RWKV's is changed in place), and layers that are checkpointed from outside would add
        # to one twice. With an all-ones attention_mask transformers leaks without a cache too.
        no_cache = {"use_cache": False}
        masked = no_cache | {"attention_mask": torch.ones_like(ids)}
        report.gradient_leak = _gradient_leak(model, x, position_ids, spans, masked)
        packed = _outputs_and_gradients(model, [x], [position_ids], masked)
        rows = [x[:, span] for span in spans], [position_ids[:, span] for span in spans]
        with _eager(pretrained):
            alone = _outputs_and_gradients(model, *rows, no_cache)
            eps = torch.finfo(x.dtype).eps
            signs = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
            rounded = x * (1 + eps * signs)
            moved = _outputs_and_gradients(model, [rounded[:, span] for span in spans], rows[1], no_cache)
        report.parity = _differences(packed, alone)
        # A rounding may by chance cancel in a tiny model; one eps is what nobody can expect to beat.
        report.noise = {name: max(value, eps) for name, value in _differences(moved, alone).items()}
    return report


def _routes(config: PreTrainedConfig) -> bool:
    inner = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]  # DBRX
    return any(getattr(part, name, None) for part in [config, *inner] for name in _EXPERTS)


def _embeddings(model: PreTrainedModel) -> nn.Embedding:
    try:
        embeddings: Any = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        raise ValueError(f"verify cannot probe {type(model).__name__}, which has no table of token embeddings.")
    table: nn.Embedding = embeddings
    return table


@torch.no_grad()
def _assert_probed(model: nn.Module, x: Tensor, position_ids: Tensor) -> None:
    """Raise where the model's own code needs something else than verify gives it."""
    try:
        _output(model, x, position_ids, {})
    except (TypeError, AttributeError, ValueError, LookupError, RuntimeError) as error:
        if "packattn" in str(error):
            raise
        raise ValueError(
            f"verify gives inputs_embeds and position_ids to a model, on which {type(model).__name__} fails with "
            f"{type(error).__name__}: {error}"
        ) from error


def _output(model: nn.Module, x: Tensor, position_ids: Tensor, extra: dict[str, Any]) -> Tensor:
    """Logits (or the last hidden state), (rows, n, channels)."""
    for module in model.modules():
        forget(module)
    pretrained = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    # A copy: CTRL scales its embeddings in place.
    result = model(inputs_embeds=x.clone(), position_ids=position_ids, **beside_text(pretrained, x), **extra)
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


@torch.no_grad()
def _leak(
    model: nn.Module, x: Tensor, other_x: Tensor, position_ids: Tensor, spans: list[slice], extra: dict[str, Any]
) -> float:
    before, worst = _output(model, x, position_ids, extra), 0.0
    for span in spans:
        changed = x.clone()
        changed[:, span] = other_x[:, span]
        moved = (_output(model, changed, position_ids, extra) - before).abs().amax((0, 2))
        moved[span] = 0
        worst = max(worst, moved.max().item())
    return worst / before.abs().max().item()


def _own(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids, positions and lengths of the packed row of a batch."""
    ids, position_ids = batch.get("input_ids"), batch.get("position_ids")
    if ids is None or position_ids is None or ids.shape != position_ids.shape or ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError("batch must hold input_ids and position_ids of one packed row, both of shape (1, n).")
    lengths = boundaries(position_ids).exact_cu_seqlens().diff().tolist()
    if len(lengths) < 2:
        raise ValueError("batch must hold a packed row of at least two sequences, got one.")
    return ids, position_ids, lengths


@torch.no_grad()
def _first_leak(
    model: nn.Module, x: Tensor, other_x: Tensor, position_ids: Tensor, span: slice, extra: dict[str, Any]
) -> str | None:
    """The first module, in the order in which they end, that adds a difference outside of the changed sequence."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    n = x.shape[1]

    def per_token(values: Any) -> list[Tensor]:
        values = values if isinstance(values, (tuple, list)) else [values]
        return [v.clone() for v in values if isinstance(v, Tensor) and v.ndim >= 3 and v.shape[1] == n]

    def differ(ones: list[Tensor], others: list[Tensor]) -> bool:
        moved = [(a != b).flatten(2).any(2).any(0) for a, b in zip(ones, others, strict=False)]
        return any(bool(m[: span.start].any() or m[span.stop :].any()) for m in moved)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        now = per_token([*args, *kwargs.values()]), per_token(output)
        if not changing:
            seen.append(now)
        elif index[0] < len(seen):
            before = seen[index[0]]
            index[0] += 1
            if not found and now[0] and differ(before[1], now[1]) and not differ(before[0], now[0]):
                found.append(f"{names[module]} ({type(module).__name__})")

    changing, index = False, [0]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        _output(model, x, position_ids, extra)
        changing, changed = True, x.clone()
        changed[:, span] = other_x[:, span]
        _output(model, changed, position_ids, extra)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _gradient_leak(
    model: nn.Module, x: Tensor, position_ids: Tensor, spans: list[slice], extra: dict[str, Any]
) -> float:
    x = x.requires_grad_()
    output, worst = _output(model, x, position_ids, extra), 0.0
    for span in spans:
        (gradient,) = torch.autograd.grad(output[:, span].float().square().sum(), x, retain_graph=True)
        gradient[:, span] = 0
        worst = max(worst, gradient.abs().max().item())
    x.requires_grad_(False)
    return worst


def _outputs_and_gradients(
    model: nn.Module, xs: list[Tensor], positions: list[Tensor], extra: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """Outputs of all rows end to end, and the gradients of their mean square."""
    outputs = torch.cat([_output(model, x, p, extra) for x, p in zip(xs, positions, strict=True)], 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients: list[Tensor] = []
    if parameters:
        found = torch.autograd.grad(outputs.float().square().mean(), parameters, allow_unused=True)
        gradients = [g for g in found if g is not None]
    return {"outputs": [outputs.detach()], "parameter gradients": gradients}


def _differences(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> dict[str, float]:
    outputs = one["outputs"][0].float(), other["outputs"][0].float()
    result = {"outputs": ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()).item()}
    pairs = list(zip(one["parameter gradients"], other["parameter gradients"], strict=True))
    if pairs:
        squares = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
        norm = sum(b.double().square().sum().item() for _, b in pairs)
        result["parameter gradients"] = (squares / norm) ** 0.5
    return result


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients; the modes and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _eager(pretrained: list[PreTrainedModel]) -> Iterator[None]:
    """transformers' own eager attention; packattn's hooks stand aside while it is set."""
    token = RUNNING.set(SUSPENDED)
    before = [(config, config._attn_implementation) for config in configs_of(pretrained)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        RUNNING.reset(token)
        for config, implementation in before:
            config._attn_implementation_internal = implementation
