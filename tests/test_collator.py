"""PackingCollator: what it makes, what it refuses, and a Trainer that uses it as it is."""

import numpy as np
import pytest
import torch
from tiny_models import LENGTHS, alone, make, packed_row, spans

import packattn
from packattn import PackingCollator

EXAMPLES = [{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22]}]


def lists(batch):
    return {name: values.tolist() for name, values in batch.items()}


def test_the_worked_example():
    assert lists(PackingCollator()(EXAMPLES)) == {
        "input_ids": [[11, 12, 13, 21, 22]],
        "labels": [[-100, 12, 13, -100, 22]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_the_first_label_is_ignored_exactly_once():
    given = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    assert PackingCollator()(given)["labels"].tolist() == [[-100, -100, 3, -100, 5]]
    assert given[1]["labels"] == [4, 5]


def test_law_9_nothing_is_dropped_cut_or_reordered():
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"input_ids": torch.randint(0, 99, (int(n),), generator=generator)}
        for n in torch.randint(1, 20, (50,), generator=generator)
    ]
    batch = PackingCollator()(examples)
    assert torch.equal(batch["input_ids"][0], torch.cat([e["input_ids"] for e in examples]))
    lengths = packattn.boundaries(batch["position_ids"]).exact_cu_seqlens().diff().tolist()
    assert lengths == [len(e["input_ids"]) for e in examples]


def test_any_sequence_of_numbers_and_further_fields():
    examples = [
        {"input_ids": np.array([1, 2], dtype=np.int32), "token_type_ids": [0, 1], "weight": torch.tensor([0.5, 1.0])},
        {"input_ids": torch.tensor([3]), "token_type_ids": [1], "weight": [2.0]},
    ]
    batch = PackingCollator(start_position=2)([e | {"attention_mask": [1] * len(e["input_ids"])} for e in examples])
    assert lists(batch) == {
        "input_ids": [[1, 2, 3]],
        "labels": [[-100, 2, -100]],
        "position_ids": [[2, 3, 2]],
        "token_type_ids": [[0, 1, 1]],
        "weight": [[0.5, 1.0, 2.0]],
    }
    assert batch["input_ids"].dtype == torch.int64


BAD = [
    ([], ValueError, "at least one example, got none"),
    ([[1, 2]], TypeError, "example 0 must be a mapping with input_ids, got list"),
    ([{"labels": [1]}], ValueError, "example 0 has no input_ids"),
    ([EXAMPLES[0], {"input_ids": [1], "labels": [1]}], ValueError, "example 1 has fields input_ids, labels where"),
    ([{"input_ids": []}], ValueError, "example 0, field 'input_ids' is empty"),
    ([{"input_ids": [1.5, 2.0]}], TypeError, "field 'input_ids' must hold integers, got torch.float32"),
    ([{"input_ids": [[1, 2]]}], ValueError, r"must have shape \(tokens,\), got \(1, 2\)"),
    ([{"input_ids": [1, 2], "labels": [1]}], ValueError, "'labels' must hold one value for each of the 2 input_ids"),
    ([{"input_ids": [1, 2], "labels": 3}], ValueError, "'labels' must hold one value per token, got the single value"),
    ([{"input_ids": [1, 2], "text": "a story"}], TypeError, "field 'text' must hold one number per token, got str"),
    ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], ValueError, "marks 1 of 2 tokens as padding"),
    ([{"input_ids": [1, 2], "position_ids": [0, 1]}], ValueError, "has position_ids, which packing decides"),
]


@pytest.mark.parametrize(("examples", "error", "message"), BAD)
def test_law_10_what_cannot_be_packed_is_named(examples, error, message):
    with pytest.raises(error, match=message):
        PackingCollator()(examples)


def test_start_position_must_be_a_position():
    with pytest.raises(ValueError, match="start_position must be an int of at least 0, got -1"):
        PackingCollator(start_position=-1)


def test_trainer_takes_it_and_its_loss_is_that_of_the_examples_alone(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make("llama")
    batch = packed_row("llama")
    examples = [{"input_ids": batch["input_ids"][0, span]} for span in spans()]
    with torch.no_grad():
        logits = alone(model, batch)
        losses = [
            torch.nn.functional.cross_entropy(logits[0, span][:-1], batch["input_ids"][0, span][1:], reduction="sum")
            for span in spans()
            if span.stop - span.start > 1
        ]
    expected = sum(losses) / (sum(LENGTHS) - len(LENGTHS))
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        report_to=[], learning_rate=1e-3, use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = model.get_input_embeddings().weight.detach().clone()
    with packattn.patch(model):
        trainer = Trainer(model, arguments, data_collator=PackingCollator(), train_dataset=examples)
        trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    # Two micro-batches of an accumulated step, normalised by the tokens that the whole step predicts.
    assert logged == pytest.approx(expected.item(), abs=2e-4)
    assert not torch.equal(model.get_input_embeddings().weight, before)
