"""What decides whether the main job passes, and how it batches."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.demo.acts import acts, padded_factor, small_llama
from benchmarks.demo.approaches import APPROACHES, NAIVE, OFFLINE, ONLINE, PADDING, UNPATCHED, first_fit, minibatches
from benchmarks.demo.checks import Checks
from benchmarks.demo.training import train
from packattn.hf.verify import VerifyReport

EXAMPLES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def checks(**change):
    leaks = {PADDING.name: 0.0, NAIVE.name: 9.0, OFFLINE.name: 0.0, ONLINE.name: 0.0, UNPATCHED.name: 8.0}
    good = VerifyReport("Model", True, (3, 2), leak={"default call": 0.0}, noise={"outputs": 1e-6})
    given = {"leaks": leaks, "loss_packed": 2.0, "loss_alone": 2.0, "verify": good} | change
    return Checks(**given)


def test_all_is_well():
    assert checks().failures() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_packed": 2.001}, "the packed loss 2.0010000 is not the loss alone 2.0000000"),
        ({"loss_packed": float("nan")}, "the packed loss nan"),
        ({"leaks": {a.name: 1.0 for a in (*APPROACHES, UNPATCHED)}}, "online packing .* leaks 1.00e"),
        ({"leaks": {a.name: 0.0 for a in (*APPROACHES, UNPATCHED)}}, "the leak probe found nothing"),
        (
            {"verify": VerifyReport("Model", True, (3, 2), leak={"default call": 1.0}, noise={"outputs": 1e-6})},
            "packattn.verify is not satisfied",
        ),
    ],
)
def test_what_does_not_hold_fails_the_demo(change, message):
    failures = " ".join(checks(**change).failures())
    assert re.search(message, failures), failures


def test_batches_hold_every_example_once():
    lengths = [len(ids) for ids in EXAMPLES]
    assert minibatches(lengths, 2) == [[0, 1], [2]]
    assert first_fit(lengths, 6) == [[0, 1], [2]]
    assert padded_factor(EXAMPLES, 3) == pytest.approx(12 / 9)
    padded = PADDING.collate(EXAMPLES)
    assert padded["labels"].tolist() == [[1, 2, 3, -100], [4, 5, -100, -100], [6, 7, 8, 9]]
    assert "position_ids" not in NAIVE.collate(EXAMPLES)


def test_no_batch_of_the_large_model_is_larger_than_the_stated_memory_takes():
    finetune, _ = acts(torch.device("cpu"), 1.0)
    assert finetune.checkpointed
    assert max(finetune.minibatch * finetune.longest, finetune.capacity) <= 2048


def test_a_checkpointed_run_takes_the_steps_of_another_and_every_example_once():
    _, act = acts(torch.device("cpu"), 1.0)
    texts = [list(range(5, 5 + length)) for length in (3, 9, 4, 20, 7, 11)]
    act = replace(
        act, model=partial(small_llama, hidden=64, layers=1), texts=lambda: texts, examples=4, held_out=2, minibatch=2,
        evaluations=1,
    )  # fmt: skip
    plain, checkpointed = (train(replace(act, checkpointed=on), ONLINE) for on in (False, True))
    assert checkpointed.step_losses == pytest.approx(plain.step_losses, rel=1e-3)
    assert checkpointed.steps == 2
    assert checkpointed.real_tokens == checkpointed.computed_tokens == sum(map(len, act.data()[0]))
    assert checkpointed.curve[-1].loss < checkpointed.curve[0].loss
