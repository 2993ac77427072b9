"""PackingCollator: what it makes, what it refuses, and a Trainer that uses it as it is."""

import numpy as np
import pytest
import torch
from tiny_models import LENGTHS, SMALL, alone, make, packed_row, spans

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
    (
        [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1, 2], "labels": [3, 4]}],
        ValueError,
        "example 0, field 'labels' must hold one value per token, got the single value 3",
    ),
    (
        [{"input_ids": [1, 2], "weight": 0.5}],
        ValueError,
        "'weight' must hold one value per token, got the single value",
    ),
    ({"input_ids": [[1, 2], [3]]}, TypeError, "must be a sequence of mappings, .* got one dict of columns"),
    ([{"input_ids": [1, 2], "text": "a story"}], TypeError, "field 'text' must hold one number per token, got str"),
    ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], ValueError, "marks 1 of 2 tokens as padding"),
    ([{"input_ids": [1, 2], "seq_idx": [0, 1]}], ValueError, "has seq_idx, which packing decides"),
    (
        [{"input_ids": [1, 2], "position_ids": [3, 4]}],
        ValueError,
        "must begin at the start_position, 0, .* got 3 first",
    ),
    ([{"input_ids": [1, 2], "position_ids": [0, -1]}], ValueError, "got 0 first and -1 as the least"),
    ([{"input_ids": [1, 2], "position_ids": [0.0, 1.0]}], TypeError, "'position_ids' must hold integers"),
]


@pytest.mark.parametrize(("examples", "error", "message"), BAD)
def test_law_10_what_cannot_be_packed_is_named(examples, error, message):
    with pytest.raises(error, match=message):
        PackingCollator()(examples)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start_position": -1}, ValueError, "start_position must be an int of at least 0, got -1"),
        ({"start_position": ["a tokenizer"] * 1000}, TypeError, r"start_position must be an int, got .{1,120}$"),
        ({"pad_to": 0}, ValueError, "pad_to must be an int of at least 1, got 0"),
        ({"pad_to_multiple_of": 8.0}, TypeError, "pad_to_multiple_of must be an int, got 8.0"),
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an int, got None"),
        ({"pad_to": 8, "pad_to_multiple_of": 8}, ValueError, "give pad_to or pad_to_multiple_of, not both"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        PackingCollator(**options)


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("label", [1, 0], torch.tensor([1, 0])),
        ("labels", torch.tensor([1, 0], dtype=torch.int32), torch.tensor([1, 0])),
        ("label", [0.5, 2.0], torch.tensor([0.5, 2.0])),
    ],
)
def test_one_label_for_each_example(name, given, wanted):
    examples = [example | {name: value} for example, value in zip(EXAMPLES, given, strict=True)]
    batch = PackingCollator(pad_to=8)(examples)
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert torch.equal(batch["labels"], wanted)
    assert batch["labels"].dtype == wanted.dtype
    for kind in (examples, dict(enumerate(examples)).values()):  # rows, or a stream of them, would drop the labels
        with pytest.raises(ValueError, match="one label each cannot be packed beforehand"):
            next(iter(packattn.pack_dataset(kind, 8)))


def test_trainer_of_a_classifier_takes_it_and_learns_what_padded_rows_teach(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

    examples = [{"input_ids": list(range(3, 3 + n)), "label": n % 2} for n in (7, 19, 1, 13)]

    def padded(batch):
        rows = torch.zeros(len(batch), 19, dtype=torch.long)
        for row, example in zip(rows, batch, strict=True):
            row[: len(example["input_ids"])] = torch.tensor(example["input_ids"])
        labels = torch.tensor([example["label"] for example in batch])
        return {"input_ids": rows, "attention_mask": (rows != 0).long(), "labels": labels}

    weights = []
    for collate in (padded, PackingCollator()):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=2, report_to=[], learning_rate=1e-3, use_cpu=True,
            disable_tqdm=True, save_strategy="no", optim="sgd",
        )  # fmt: skip
        if collate is not padded:
            packattn.patch(model)
        Trainer(model, arguments, data_collator=collate, train_dataset=examples).train()
        weights.append([p.detach() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForMaskedLM"])
def test_first_labels_are_kept_for_models_that_do_not_shift_them(auto):
    import transformers

    from packattn.hf.tiny import shrink

    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(shrink(transformers.BertConfig)).eval()
    examples = [{"input_ids": list(range(3, 3 + n)), "labels": [i % 2 for i in range(n)]} for n in (5, 1, 9)]
    rows = [{name: torch.tensor([values]) for name, values in example.items()} for example in examples]
    with torch.no_grad():
        expected = sum(model(**row).loss * row["labels"].numel() for row in rows) / 15
        with packattn.patch(model):
            batch = PackingCollator(keep_first_labels=True, pad_to=20)(examples)
            assert model(**batch).loss == pytest.approx(expected.item(), rel=1e-5)
            assert model(**PackingCollator()(examples)).loss != pytest.approx(expected.item(), rel=1e-3)


def test_first_labels_that_are_not_given_are_not_kept():
    with pytest.raises(ValueError, match="keep_first_labels=True needs examples with labels"):
        PackingCollator(keep_first_labels=True)([{"input_ids": [1, 2]}])


def test_bins_of_examples_are_taken_one_after_another():
    assert lists(PackingCollator()([EXAMPLES, EXAMPLES[:1]])) == lists(PackingCollator()([*EXAMPLES, EXAMPLES[0]]))


def test_packed_rows_keep_their_boundaries_and_lose_each_first_label_once():
    rows = [
        {name: values[0] for name, values in PackingCollator()(part).items()} for part in (EXAMPLES, EXAMPLES[::-1])
    ]
    assert lists(PackingCollator()(rows)) == lists(PackingCollator()([*EXAMPLES, *EXAMPLES[::-1]]))
    unmasked = [row | {"labels": row["input_ids"]} for row in rows]
    assert lists(PackingCollator()(unmasked)) == lists(PackingCollator()(rows))


@pytest.mark.parametrize("options", [{"pad_to": 8}, {"pad_to_multiple_of": 4}], ids=str)
def test_a_static_row_ends_in_one_dead_segment(options):
    examples = [e | {"weight": [0.5] * len(e["input_ids"])} for e in EXAMPLES]
    collate = PackingCollator(start_position=2, pad_token_id=7, return_flash_attn_kwargs=True, return_seq_idx=True,
                              **options)  # fmt: skip
    assert {name: v if isinstance(v, int) else v.tolist() for name, v in collate(examples).items()} == {
        "input_ids": [[11, 12, 13, 21, 22, 7, 7, 7]],
        "labels": [[-100, 12, 13, -100, 22, -100, -100, -100]],
        "position_ids": [[2, 3, 4, 2, 3, 2, 2, 2]],
        "weight": [[0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0]],
        "seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2]],
        "cu_seq_lens_q": [0, 3, 5, 8],
        "cu_seq_lens_k": [0, 3, 5, 8],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    full = collate([{"input_ids": [1] * 8}])
    assert full["attention_mask"].tolist() == [[1] * 8]
    assert full["cu_seq_lens_q"].tolist() == [0, 8]
    with pytest.raises(ValueError, match="the examples hold 9 tokens, more than pad_to=8"):
        PackingCollator(pad_to=8)([{"input_ids": [1] * 9}])


def test_the_extra_fields_are_those_of_transformers():
    from transformers import DataCollatorWithFlattening

    wanted = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [e | {"labels": e["input_ids"]} for e in EXAMPLES]
    )
    found = PackingCollator(return_flash_attn_kwargs=True, return_seq_idx=True)(EXAMPLES)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(values)), name
        assert not isinstance(values, torch.Tensor) or values.dtype == found[name].dtype, name


def test_the_dead_segment_costs_no_attention_tile_and_is_no_sequence():
    collate = PackingCollator(pad_to=4096)
    batch = collate([{"input_ids": list(range(1, n))} for n in (300, 50, 700)])
    real, alone = int(batch["attention_mask"].sum()), packattn.PackedMask.causal(lengths=[299, 49, 699])

    found = packattn.boundaries(batch["position_ids"], batch["attention_mask"])
    assert found.exact_cu_seqlens().tolist() == [0, 299, 348, real]
    assert found.max_seqlen == 699
    mask = packattn.PackedMask.causal(found)
    for start, end in ((mask.k_start, mask.k_end), (mask.q_start, mask.q_end)):
        for block in (64, 128):  # what a tile of dead tokens has to visit
            first = torch.arange(-(-real // block) * block, 4096, block)
            assert (start[first] >= end[first + block - 1]).all()
            edge = real // block * block  # what the tile at the seam has to visit: nothing beyond the real tokens
            assert end[edge + block - 1] in (real, 4096)

    # A mask that is lost on the way changes nothing: each dead token is a sequence of its own then.
    lost = packattn.PackedMask.causal(packattn.boundaries(batch["position_ids"]))
    for name in ("k_start", "k_end", "q_start", "q_end"):
        assert torch.equal(getattr(lost, name)[:real], getattr(alone, name)), name
        assert name == "q_end" or torch.equal(getattr(mask, name)[:real], getattr(alone, name)), name
    assert torch.equal(lost.k_end[real:], torch.arange(real, 4096).int() + 1)


def test_static_rows_change_neither_loss_nor_gradient_and_compile_once():
    model, examples = make("llama").train(), [{"input_ids": list(range(3, 3 + n))} for n in (7, 1, 19)]
    with packattn.patch(model):
        losses, gradients = [], []
        told = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
        for collate in (PackingCollator(), PackingCollator(pad_to=64), PackingCollator(pad_to=64, **told)):
            model.zero_grad()
            loss = model(**collate(examples)).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append([p.grad.clone() for p in model.parameters()])
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(model, backend=count, fullgraph=True)
        for lengths in [(7, 1, 19), (30,), (2, 2, 2, 2, 30), (64,)]:
            compiled(**PackingCollator(pad_to=64)([{"input_ids": list(range(3, 3 + n))} for n in lengths]))
    for loss, found in zip(losses[1:], gradients[1:], strict=True):
        assert losses[0] == pytest.approx(loss, abs=1e-6)
        for plain, static in zip(gradients[0], found, strict=True):
            assert torch.allclose(plain, static, atol=1e-6)
    assert len(graphs) == 2  # of the hook that looks at the labels, and of the model


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
