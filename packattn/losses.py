"""Losses and pooling over packed rows, with denominators that are exact under accumulation and across ranks.

A packed row has no rows of its own to average over: means are over tokens or over sequences, and over all of them that
an optimiser step sees, not over those of one micro-batch or one rank.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from packattn.boundaries import Boundaries, boundaries

_IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token's label, in float32, at the place of the label; 0 where it is -100.

    Labels are those of a causal model: the logits of a token predict the label of the next. The first label of every
    sequence has to be -100, as PackingCollator makes it.

    Args:
        logits: (rows, n, vocabulary). labels: int64 (rows, n), in place, not shifted.

    Returns:
        float32 (rows, n).
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must have the shape of logits without its last dimension, (rows, n), got {tuple(labels.shape)} "
            f"for logits of shape {tuple(logits.shape)}."
        )
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED).to(logits.device)
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), shifted.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return nn.functional.pad(losses.view_as(shifted)[:, :-1], (1, 0))


def mean_over_tokens(losses: Tensor, labels: Tensor, *, count: Tensor | int | None = None) -> Tensor:
    """Sum of the losses over the number of predicted tokens of the whole optimiser step.

    Args:
        losses: (rows, n), as of `token_losses`. labels: (rows, n), -100 where nothing is predicted.
        count: tokens predicted in the whole step, over all micro-batches and ranks (`count_over_ranks`). None: those
            of this batch, added up over the ranks of torch.distributed.

    Returns:
        A scalar. It is scaled by the number of ranks, since DistributedDataParallel and FSDP divide gradients by it.
    """
    if count is None:
        count = count_over_ranks((labels != _IGNORED).sum())
    return losses.sum() * (_ranks() / count)


def mean_over_sequences(
    losses: Tensor, labels: Tensor, position_ids: Tensor, *, attention_mask: Tensor | None = None,
    count: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Mean over sequences of each sequence's mean over its predicted tokens: long sequences weigh no more than short.

    Sequences without a predicted token do not count. Nothing is read back to the host.

    Args:
        losses, labels: (rows, n). position_ids: (rows, n), restarting. attention_mask: (rows, n), 0 for padding.
        count: sequences of the whole step (see `mean_over_tokens`).
    """
    found = boundaries(position_ids, attention_mask)
    predicted = (labels != _IGNORED).flatten()
    per_sequence = _add_up(predicted.float(), found)
    weights = predicted / per_sequence[found.seq_start.long()].clamp(min=1)
    if count is None:
        count = count_over_ranks((per_sequence > 0).sum())
    return (losses.flatten() * weights).sum() * (_ranks() / count)


def count_over_ranks(count: Tensor) -> Tensor:
    """Add a count up over the ranks of torch.distributed; the count itself without it."""
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
        how: the sequence's first token, its last, or the mean of all. attention_mask: (rows, n), 0 for padding.

    Returns:
        (sequences, channels), padding left out.

    >>> pool(torch.arange(5.0)[None, :, None], torch.tensor([[0, 1, 2, 0, 1]]), "last").tolist()
    [[2.0], [4.0]]
    """
    if how not in ("first", "last", "mean"):
        raise ValueError(f"how must be 'first', 'last' or 'mean', got {how!r}.")
    if hidden_states.ndim != 3 or hidden_states.shape[:2] != position_ids.shape:
        raise ValueError(
            f"hidden_states must have shape (rows, n, channels) with position_ids (rows, n), got "
            f"{tuple(hidden_states.shape)} and {tuple(position_ids.shape)}."
        )
    found = boundaries(position_ids, attention_mask)
    flat = hidden_states.flatten(0, 1)
    index = torch.arange(flat.shape[0], device=flat.device)
    real = found.seq_end > found.seq_start
    if how == "mean":
        sums = torch.zeros_like(flat, dtype=torch.float32).index_add(0, found.seq_start.long(), flat.float())
        flat = (sums / (found.seq_end - found.seq_start).clamp(min=1)[:, None]).to(flat.dtype)
    chosen = found.seq_end - 1 == index if how == "last" else found.seq_start == index
    return flat[chosen & real]


def _add_up(values: Tensor, found: Boundaries) -> Tensor:
    """Sums over sequences, at their first tokens, 0 elsewhere: (tokens,)."""
    return torch.zeros_like(values).index_add(0, found.seq_start.long(), values)


def _ranks() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
