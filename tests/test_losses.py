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


def no_target(over, logits, count=None):
    labels = torch.full(logits.shape[:2], -100)
    losses = packattn.token_losses(logits, labels)
    if over == "tokens":
        return packattn.mean_over_tokens(losses, labels, count=count)
    return packattn.mean_over_sequences(losses, labels, POSITIONS, count=count)


@pytest.mark.parametrize("over", ["tokens", "sequences"])
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), torch.tensor([0])], ids=str)
def test_a_step_without_a_target_has_a_loss_of_zero_and_zero_gradients(over, count):
    logits, _ = case()
    loss = no_target(over, logits, count)
    assert loss.item() == 0
    assert loss.shape == ()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


def test_a_rank_without_a_target_divides_by_the_count_of_the_step():
    logits, labels = case()
    assert no_target("tokens", logits, torch.tensor(8)).item() == 0
    losses = packattn.token_losses(logits, labels)
    loss = packattn.mean_over_tokens(losses, labels, count=torch.tensor(20))
    torch.testing.assert_close(loss, losses.sum() / 20)


def test_a_first_label_that_nothing_predicts_is_refused():
    """It would count as predicted: a mean over three tokens of the losses of two."""
    logits, labels = torch.randn(1, 3, 7), torch.tensor([[5, 6, 4]])
    with pytest.raises(
        RuntimeError, match=r"labels must be -100 at the first token of each row.*labels\[:, 0\] = -100"
    ):
        packattn.token_losses(logits, labels)
    labels[:, 0] = -100
    loss = packattn.mean_over_tokens(packattn.token_losses(logits, labels), labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[0, :2], labels[0, 1:]))


def test_law_4_means_read_nothing_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        labels, positions = torch.empty(2, 9, dtype=torch.long), torch.empty(2, 9, dtype=torch.long)
        losses = packattn.token_losses(torch.empty(2, 9, 5, dtype=torch.bfloat16), labels)
        means = [
            packattn.mean_over_tokens(losses, labels),
            packattn.mean_over_sequences(losses, labels, positions, attention_mask=labels),
            packattn.mean_over_tokens(losses, labels, count=torch.empty(1, dtype=torch.long)),
        ]
    assert all(mean.shape == () and mean.dtype == torch.float32 for mean in means)


def test_losses_where_nothing_is_predicted_do_not_count():
    losses = torch.tensor([[1.0, torch.nan, 3.0, 5.0]], requires_grad=True)
    labels, positions = torch.tensor([[4, -100, 4, 4]]), torch.tensor([[0, 1, 0, 1]])
    assert packattn.mean_over_tokens(losses, labels).item() == 3
    mean = packattn.mean_over_sequences(losses, labels, positions)
    assert mean.item() == 2.5
    assert torch.autograd.grad(mean, losses)[0].tolist() == [[0.5, 0, 0.25, 0.25]]


def test_labels_under_padding_are_those_of_no_sequence():
    losses, labels = torch.tensor([[1.0, 3.0, 10.0, 20.0]]), torch.full((1, 4), 5)
    positions, mask = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    assert packattn.mean_over_sequences(losses, labels, positions, attention_mask=mask).item() == 2


def test_float64_stays_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, positions = torch.tensor([[-100, 1, -100, 3]], dtype=torch.int32), torch.tensor([[0, 1, 0, 1]])

    def loss(logits):
        losses = packattn.token_losses(logits, labels)
        return packattn.mean_over_tokens(losses, labels) + packattn.mean_over_sequences(losses, labels, positions)

    assert loss(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (logits,))
    hidden = logits[..., :3]
    torch.testing.assert_close(
        packattn.pool(hidden, positions, "mean"), hidden.view(2, 2, 3).mean(1), rtol=1e-15, atol=1e-15
    )
    half = torch.full((1, 2000, 1), 0.1, dtype=torch.bfloat16)  # whose sum in bfloat16 would be 32
    assert packattn.pool(half, torch.arange(2000)[None], "mean").item() == half[0, 0, 0]


@pytest.mark.parametrize("how", ["first", "last", "mean"])
@pytest.mark.parametrize("padding", [{"pad_to": 8}, {"pad_to": 6}, {"pad_to_multiple_of": 4}], ids=str)
def test_pool_takes_no_dead_token_for_a_sequence(how, padding):
    batch = packattn.PackingCollator(**padding)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    hidden = torch.randn(1, batch["input_ids"].shape[1], 3)
    found = packattn.pool(hidden, batch["position_ids"], how, attention_mask=batch["attention_mask"])
    pick = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[how]
    torch.testing.assert_close(found, torch.stack([pick(hidden[0, :3]), pick(hidden[0, 3:5])]))
    with pytest.raises(ValueError, match=r"attention_mask must be given.*batch\['attention_mask'\]"):
        packattn.pool(hidden, batch["position_ids"], how)


def test_pool_of_sequences_of_one_token():
    hidden = torch.randn(1, 4, 3)
    assert torch.equal(packattn.pool(hidden, torch.tensor([[0, 0, 0, 1]]), "last"), hidden[0, [0, 1, 3]])
    last = torch.tensor([[0, 1, 2, 0]])
    assert torch.equal(packattn.pool(hidden, last, "last", attention_mask=torch.ones_like(last)), hidden[0, 2:])
    assert torch.equal(packattn.pool(hidden.view(4, 1, 3), torch.zeros(4, 1).long(), "last"), hidden[0])


LOSSES, LABELS = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: packattn.pool(torch.zeros(1, 3, 2), LABELS, "max"), ValueError, "how must be .*, got 'max'"),
        (lambda: packattn.pool(torch.zeros(3, 2), LABELS, "last"), ValueError, "hidden_states must have shape"),
        (lambda: packattn.pool([[[0.0]]], LABELS, "last"), TypeError, "hidden_states must be .* got list"),
        (lambda: packattn.pool(torch.zeros(1, 4, 2), LABELS, "last"), ValueError, "position_ids must have the rows"),
        (
            lambda: packattn.pool(torch.zeros(1, 3, 2), [[0, 1, 2]], "last"),
            TypeError,
            "position_ids must be .* got list",
        ),
        (
            lambda: packattn.token_losses(torch.zeros(1, 3, 2), LABELS[:, :2]),
            ValueError,
            "labels must have the shape of",
        ),
        (lambda: packattn.token_losses(torch.zeros(1, 3, 2), LOSSES), TypeError, "labels must be an int32 or int64"),
        (lambda: packattn.token_losses(torch.zeros(1, 3, 2), [[0, 1, 1]]), TypeError, "labels must be .* got list"),
        (
            lambda: packattn.token_losses([[[0.0]]], LABELS),
            TypeError,
            "logits must be a floating-point tensor, got list",
        ),
        (lambda: packattn.mean_over_tokens(LOSSES, LABELS[0]), ValueError, "losses must have the shape of labels"),
        (lambda: packattn.mean_over_tokens(LOSSES.view(3), LABELS), ValueError, "losses must have the shape of labels"),
        (lambda: packattn.mean_over_tokens([0.0], LABELS), TypeError, "losses must be .* got list"),
        (
            lambda: packattn.mean_over_tokens(LOSSES, LABELS, count=2.5),
            TypeError,
            "count must be an int, got float 2.5",
        ),
        (lambda: packattn.mean_over_tokens(LOSSES, LABELS, count=True), TypeError, "count must be an int, got bool"),
        (
            lambda: packattn.mean_over_tokens(LOSSES, LABELS, count=-1),
            ValueError,
            "count must be .* at least 0, got -1",
        ),
        (lambda: packattn.mean_over_tokens(LOSSES, LABELS, count=LABELS), ValueError, "count must be one number, got"),
        (lambda: packattn.mean_over_sequences(LOSSES, LABELS[:, 1:], LABELS), ValueError, "losses must have the shape"),
        (lambda: packattn.mean_over_sequences(LOSSES, LABELS, LABELS[:, 1:]), ValueError, "position_ids must have"),
        (lambda: packattn.count_over_ranks(3), TypeError, "count must be a tensor"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
