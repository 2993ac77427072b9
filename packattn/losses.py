"""Losses and pooling over packed rows, with denominators that are exact under accumulation and across ranks.

A packed row has no rows of its own to average over: means are over tokens or over sequences, and over all of them that
an optimiser step sees, not over those of one micro-batch or one rank.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from packattn.arguments import INTEGERS, described, whole
from packattn.boundaries import Boundaries, boundaries

_IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token's label, in float32, at the place of the label; 0 where it is -100.

    Labels are those of a causal model: the logits of a token predict the label of the next. The first label of every
    sequence has to be -100, as PackingCollator makes it; of a row, whose first label no logits predict, this is
    asserted.

    Args:
        logits: (rows, n, vocabulary), floating. labels: int32 or int64 (rows, n), in place, not shifted.

    Returns:
        (rows, n), float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
        RuntimeError: the first label of a row is not -100, by an assertion on its device.
    """
    _check_floating("logits", logits)
    _check_labels(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must have the shape of logits without its last dimension, (rows, n), got {tuple(labels.shape)} "
            f"for logits of shape {tuple(logits.shape)}."
        )
    torch._assert_async(
        (labels[:, :1] == _IGNORED).all(),
        "labels must be -100 at the first token of each row, which nothing predicts: labels[:, 0] = -100.",
    )
    shifted = nn.functional.pad(labels[:, 1:].long(), (0, 1), value=_IGNORED).to(logits.device)
    losses = nn.functional.cross_entropy(
        logits.to(_wide(logits)).flatten(0, 1), shifted.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return nn.functional.pad(losses.view_as(shifted)[:, :-1], (1, 0))


def mean_over_tokens(losses: Tensor, labels: Tensor, *, count: Tensor | int | None = None) -> Tensor:
    """Sum of the losses of predicted tokens over their number in the whole optimiser step; 0 where there are none.

    Args:
        losses: (rows, n), as of `token_losses`. labels: (rows, n), -100 where nothing is predicted.
        count: tokens predicted in the whole step, over all micro-batches and ranks (`count_over_ranks`). None: those
            of this batch, added up over the ranks of torch.distributed.

    Returns:
        A scalar. It is scaled by the number of ranks, since DistributedDataParallel and FSDP divide gradients by it.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
    """
    _check_losses(losses, labels)
    predicted = labels.to(losses.device) != _IGNORED
    if count is None:
        count = count_over_ranks(predicted.sum())
    return _over(torch.where(predicted, losses, 0), count)


def mean_over_sequences(
    losses: Tensor, labels: Tensor, position_ids: Tensor, *, attention_mask: Tensor | None = None,
    count: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Mean over sequences of each sequence's mean over its predicted tokens: long sequences weigh no more than short.

    Sequences without a predicted token do not count, and neither do labels of padding; where no sequence counts, the
    mean is 0. Nothing is read back to the host.

    Args:
        losses, labels: (rows, n). position_ids: (rows, n), restarting. attention_mask: (rows, n), 0 for padding.
        count: sequences of the whole step (see `mean_over_tokens`).

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
    """
    _check_losses(losses, labels)
    found = _boundaries_of("losses", losses, position_ids, attention_mask)
    predicted = (labels.to(losses.device) != _IGNORED).flatten() & (found.seq_end > found.seq_start)
    per_sequence = _add_up(predicted.to(_wide(losses)), found)
    if count is None:
        count = count_over_ranks((per_sequence > 0).sum())
    means = torch.where(predicted, losses.flatten(), 0) / per_sequence[found.seq_start.long()].clamp(min=1)
    return _over(means, count)


def count_over_ranks(count: Tensor) -> Tensor:
    """Add a count up over the ranks of torch.distributed; the count itself without it.

    Raises:
        TypeError: count is not a tensor.
    """
    if not isinstance(count, Tensor):
        raise TypeError(f"count must be a tensor, on the device that the ranks add up on, got {described(count)}.")
    if _ranks() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return count


def pool(
    hidden_states: Tensor,
    position_ids: Tensor,
    how: Literal["first", "last", "mean"],
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """One vector per packed sequence, in the order of the stream: for classification and embeddings.

    Waits for the device, since the number of sequences is a shape.

    Args:
        hidden_states: (rows, n, channels). position_ids: (rows, n), restarting.
        how: the sequence's first token, its last, or the mean of all.
        attention_mask: (rows, n), 0 for padding. Rows that end in a sequence of one token need it: so does the padding
            of `PackingCollator(pad_to=...)` look, whose batches have the mask.

    Returns:
        (sequences, channels) in the dtype of hidden_states, padding left out.

    Raises:
        TypeError, ValueError: an argument that does not fit, named; a row ends in a sequence of one token, and there is
            no attention_mask.

    >>> pool(torch.arange(5.0)[None, :, None], torch.tensor([[0, 1, 2, 0, 1]]), "last").tolist()
    [[2.0], [4.0]]
    """
    if how not in ("first", "last", "mean"):
        raise ValueError(f"how must be 'first', 'last' or 'mean', got {how!r}.")
    _check_floating("hidden_states", hidden_states)
    if hidden_states.ndim != 3:
        raise ValueError(f"hidden_states must have shape (rows, n, channels), got {tuple(hidden_states.shape)}.")
    found = _boundaries_of("hidden_states", hidden_states, position_ids, attention_mask)
    if attention_mask is None and position_ids.shape[1] > 1:
        last = found.seq_start.view(position_ids.shape)[:, -1]
        alone = last == found.seq_end.view(position_ids.shape)[:, -1] - 1
        if bool(alone.any()):
            raise ValueError(
                "attention_mask must be given, since a row ends in a sequence of one token: an example, or padding. Of "
                "PackingCollator(pad_to=...) give batch['attention_mask']; where nothing is padded, "
                "torch.ones_like(position_ids)."
            )
    flat = hidden_states.flatten(0, 1)
    index = torch.arange(flat.shape[0], device=flat.device)
    real = found.seq_end > found.seq_start
    if how == "mean":
        sums = _add_up(flat.to(_wide(flat)), found)
        flat = (sums / (found.seq_end - found.seq_start).clamp(min=1)[:, None]).to(flat.dtype)
    chosen = found.seq_end - 1 == index if how == "last" else found.seq_start == index
    return flat[chosen & real]


def _add_up(values: Tensor, found: Boundaries) -> Tensor:
    """Sums over sequences, at their first tokens, 0 elsewhere: (tokens,)."""
    return torch.zeros_like(values).index_add(0, found.seq_start.long(), values)


def _over(losses: Tensor, count: Tensor | int) -> Tensor:
    """The sum of the losses over the count of the whole step, 0 for a step without a target."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.dtype.is_complex or count.dtype == torch.bool:
            raise ValueError(f"count must be one number, got {described(count)}.")
        count = count.reshape(())
        count = torch.where(count == 0, 1, count)
    else:
        count = whole("count", count, 0) or 1
    return losses.sum(dtype=_wide(losses)) * (_ranks() / count)


def _wide(x: Tensor) -> torch.dtype:
    """What sums of x are taken in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {described(x)}.")


def _check_labels(labels: object) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be an int32 or int64 tensor, got {described(labels)}.")


def _check_losses(losses: object, labels: object) -> None:
    """Refuse losses and labels that are not of the same tokens."""
    _check_floating("losses", losses)
    _check_labels(labels)
    assert isinstance(losses, Tensor)
    assert isinstance(labels, Tensor)
    if losses.shape != labels.shape:
        raise ValueError(
            f"losses must have the shape of labels, {tuple(labels.shape)}, one for each token, got "
            f"{tuple(losses.shape)}."
        )


def _boundaries_of(name: str, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Boundaries:
    """The boundaries of x, (rows, n) or (rows, n, channels), on its device."""
    found = boundaries(position_ids, attention_mask)
    if position_ids.ndim != 2 or position_ids.shape != x.shape[:2] or position_ids.device != x.device:
        raise ValueError(
            f"position_ids must have the rows and tokens of {name}, {tuple(x.shape[:2])}, on {x.device}, got "
            f"{described(position_ids)}."
        )
    return found


def _ranks() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
