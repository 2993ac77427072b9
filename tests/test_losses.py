"""Losses and pooling over packed rows against the sequences one by one."""

import pytest
import torch
from torch import nn

import packattn

LENGTHS = [5, 1, 8, 3]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SPANS = [slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]


def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, sum(LENGTHS), 11, generator=generator, requires_grad=True)
    labels = torch.randint(11, (1, sum(LENGTHS)), generator=generator)
    labels[POSITIONS == 0] = -100
    labels[0, 7:9] = -100  # part of a prompt
    return logits, labels


def alone(logits, labels, span):
    return nn.functional.cross_entropy(logits[0, span][:-1], labels[0, span][1:], reduction="none", ignore_index=-100)


def test_token_losses_are_those_of_the_sequences_alone():
    logits, labels = case()
    losses = packattn.token_losses(logits, labels)
    for span in SPANS:
        assert losses[0, span.start] == 0
        torch.testing.assert_close(losses[0, span][1:], alone(logits, labels, span))


def test_means_over_tokens_and_over_sequences():
    logits, labels = case()
    losses = packattn.token_losses(logits, labels)
    each = [(alone(logits, labels, span), int((labels[0, span] != -100).sum())) for span in SPANS]
    total = sum(n for _, n in each)
    torch.testing.assert_close(packattn.mean_over_tokens(losses, labels), sum(one.sum() for one, _ in each) / total)
    means = [one.sum() / n for one, n in each if n]  # the sequence of one token predicts nothing
    torch.testing.assert_close(packattn.mean_over_sequences(losses, labels, POSITIONS), sum(means) / len(means))


@pytest.mark.parametrize("over", ["tokens", "sequences"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(over):
    logits, labels = case()

    def loss(span, count):
        losses = packattn.token_losses(logits[:, span], labels[:, span])
        if over == "tokens":
            return packattn.mean_over_tokens(losses, labels[:, span], count=count)
        return packattn.mean_over_sequences(losses, labels[:, span], POSITIONS[:, span], count=count)

    (whole,) = torch.autograd.grad(loss(slice(None), None), logits)
    count = int((labels != -100).sum()) if over == "tokens" else 3
    parts = slice(0, SPANS[1].stop), slice(SPANS[1].stop, None)
    (accumulated,) = torch.autograd.grad(sum(loss(part, count) for part in parts), logits)
    torch.testing.assert_close(accumulated, whole)


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pool_gives_one_vector_per_sequence(how):
    hidden = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    mask = torch.ones_like(positions)
    mask[0, 6:] = 0
    pieces = [hidden[0, :4], hidden[0, 4:6], hidden[1, :2], hidden[1, 2:]]
    pick = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[how]
    found = packattn.pool(hidden, positions, how, attention_mask=mask)
    torch.testing.assert_close(found, torch.stack([pick(piece) for piece in pieces]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="how must be 'first', 'last' or 'mean', got 'max'"):
        packattn.pool(torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.long), "max")
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        packattn.pool(torch.zeros(3, 2), torch.zeros(1, 3, dtype=torch.long), "last")
    with pytest.raises(ValueError, match="labels must have the shape of logits"):
        packattn.token_losses(torch.zeros(1, 3, 2), torch.zeros(1, 4, dtype=torch.long))
