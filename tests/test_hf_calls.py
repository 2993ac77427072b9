"""Ways of calling a patched model that once gave wrong numbers without an error: state left behind, names, padding."""

import warnings

import pytest
import torch
import transformers
from tiny_models import LENGTHS, SMALL, alone, assert_close, make, packed_row, spans
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from packattn.hf.running import RUNNING
from packattn.hf.tiny import shrink


def tiny(name, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    return auto.from_config(shrink(CONFIG_MAPPING[name])).eval()


def patched(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        return packattn.patch(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_law_1_a_checkpointed_row_after_a_packed_one_is_not_cut_by_it(name, reentrant):
    model, batch = make(name).train(), packed_row(name)
    given, weights = {"input_ids": batch["input_ids"], "use_cache": False}, list(model.parameters())
    truth = model(**given).logits
    expected = torch.autograd.grad(truth.square().mean(), weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with packattn.patch(model):
        model(**given, position_ids=batch["position_ids"]).logits.sum().backward()
        model.zero_grad()
        found = model(**given).logits
        assert_close(found, truth)
        found.square().mean().backward()
    for parameter, gradient in zip(weights, expected, strict=True):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_law_1_a_compiled_hybrid_leaves_nothing_behind(name):
    torch._dynamo.reset()
    model, lengths = make(name), [7, 19, 1, 5]
    first, second = packed_row(name, lengths), packed_row(name, lengths[::-1], seed=1)
    with torch.no_grad():
        expected = torch.cat([model.base_model(second["input_ids"][:, s])[0] for s in spans(lengths[::-1])], 1)
        with packattn.patch(model):
            compiled = torch.compile(model, backend="eager")
            compiled(input_ids=first["input_ids"], position_ids=first["position_ids"])
            assert RUNNING.get() is None
            given = {"input_ids": second["input_ids"], "position_ids": second["position_ids"]}
            assert_close(model.base_model(**given)[0], expected)


class Around(PreTrainedModel):
    """A model of one's own around a language model."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm = LlamaForCausalLM(config)
        self.post_init()


class OtherNames(Around):
    def forward(self, tokens, positions):
        return self.lm(input_ids=tokens, position_ids=positions)


class OwnPositions(Around):
    def forward(self, input_ids, lengths):
        return self.lm(input_ids=input_ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None])


def test_law_1_a_model_around_may_have_other_names():
    model, batch = OtherNames(LlamaConfig(**SMALL)).eval(), packed_row("llama")
    with torch.no_grad():
        expected = alone(model.lm, batch)
        with packattn.patch(model, trusted=[OtherNames]):
            assert_close(model(batch["input_ids"], batch["position_ids"]).logits, expected)


def test_law_1_a_forward_that_hides_its_names():
    model, batch = make("llama"), packed_row("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model, trusted=[type(model)]):
            assert_close(model(batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)


def test_law_3_a_model_around_that_makes_its_own_positions_raises():
    model, lengths = OwnPositions(LlamaConfig(**SMALL)).eval(), [7, 5]
    ids = packed_row("llama", lengths)["input_ids"]
    with packattn.patch(model), torch.no_grad():
        model(ids, [12])
        with pytest.raises(ValueError, match="begin other sequences than those that it was called with"):
            model(ids, lengths)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("opt", AutoModelForCausalLM),
        ("gpt2", AutoModelForCausalLM),
        ("llama4_text", AutoModelForCausalLM),
        ("xlm-roberta", AutoModelForMaskedLM),
    ],
)
def test_law_1_padding_on_the_left_without_positions(name, auto):
    model, ids = tiny(name, auto), packed_row("llama", [12])["input_ids"]
    padding = model.get_input_embeddings().padding_idx or 0  # which RoBERTa counts no positions for
    ids = torch.nn.functional.pad(ids, (5, 0), value=padding)
    mask = torch.nn.functional.pad(torch.ones_like(ids[:, 5:]), (5, 0))
    with torch.no_grad():
        expected = model(input_ids=ids[:, 5:]).logits
        with packattn.patch(model):
            assert_close(model(input_ids=ids, attention_mask=mask).logits[:, 5:], expected)


def test_law_1_chunks_of_sequences_that_begin_at_other_positions():
    model, lengths = tiny("llama4_text"), [7, 19, 13]
    batch = packed_row("llama", lengths)
    batch["position_ids"] += torch.repeat_interleave(torch.tensor([50, 3, 11]), torch.tensor(lengths))
    with torch.no_grad():
        expected = alone(model, batch, lengths)
        with packattn.patch(model):
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert_close(found, expected)


def test_law_3_given_sequences_over_a_static_cache_raise():
    model, ids = make("llama"), packed_row("llama", [7, 5])["input_ids"]
    seq_idx = torch.tensor([[0] * 7 + [1] * 5])
    cache = StaticCache(config=model.config, max_cache_len=64)
    with packattn.patch(model), pytest.raises(ValueError, match="restart in a forward over a cache"):
        model(input_ids=ids, seq_idx=seq_idx, past_key_values=cache)


def test_law_1_a_mask_of_another_meaning_is_laid_out_too():
    model = tiny("longformer", AutoModelForMaskedLM)
    batch = packed_row("roberta", [7, 19, 13])
    ids, first = batch["input_ids"], (batch["position_ids"] == 2).long()
    with torch.no_grad():
        rows = [model(input_ids=ids[:, s], global_attention_mask=first[:, s]).logits for s in spans([7, 19, 13])]
        with patched(model):
            found = model(input_ids=ids, position_ids=batch["position_ids"], global_attention_mask=first).logits
    assert_close(found, torch.cat(rows, 1))


def test_law_3_a_mask_that_cannot_be_laid_out_raises():
    model, batch = tiny("xlnet"), packed_row("llama", [7, 5])
    with patched(model), pytest.raises(NotImplementedError, match="perm_mask of shape"):
        model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], perm_mask=torch.zeros(1, 12, 12),
        )  # fmt: skip


def test_law_3_the_last_token_of_embeddings_is_not_guessed():
    model, batch = LlamaForSequenceClassification(LlamaConfig(**SMALL)).eval(), packed_row("llama")
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    message = "finds the last token of a sequence by its padding token"
    with packattn.patch(model), pytest.raises(NotImplementedError, match=message):
        model(inputs_embeds=embeddings, position_ids=batch["position_ids"])


def test_law_1_sequences_as_long_as_there_are_labels():
    model, lengths = tiny("xlnet", AutoModelForSequenceClassification), [2, 2, 2]
    batch = packed_row("llama", lengths)
    with torch.no_grad():
        rows = torch.cat([model(input_ids=batch["input_ids"][:, s]).logits for s in spans(lengths)])
        with patched(model):
            assert_close(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, rows)


def test_a_row_of_padding_alone_has_no_result():
    # By itself, XLNet gives padded rows other results than their sequences alone.
    model, ids = tiny("xlnet", AutoModelForSequenceClassification), packed_row("llama", [12])["input_ids"]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    with torch.no_grad():
        rows = torch.cat([model(input_ids=ids[:, :n]).logits for n in (7, 12)])
        with patched(model):
            assert_close(model(input_ids=ids.expand(2, -1), attention_mask=mask).logits, rows)
            mask[1] = 0
            with pytest.raises(ValueError, match="1 of the 2 rows hold padding alone"):
                model(input_ids=ids.expand(2, -1), attention_mask=mask)


def test_masks_made_beforehand_over_an_empty_cache_raise_for_a_packed_row():
    model, batch = make("llama"), packed_row("llama")
    n = batch["input_ids"].shape[1]
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    inputs["attention_mask"] = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    cache = transformers.DynamicCache(config=model.config)
    with packattn.patch(model), pytest.raises(ValueError, match="position_ids restart in a forward over a cache"):
        model(**inputs, past_key_values=cache)


QUESTIONS = {
    "bert": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)),
    "llama": lambda: transformers.LlamaForQuestionAnswering(LlamaConfig(**SMALL)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", QUESTIONS)
def test_the_loss_of_spans_of_a_whole_row_raises_for_a_packed_row(name, compiled):
    torch._dynamo.reset()
    model = QUESTIONS[name]().eval()
    row = {"input_ids": torch.arange(3, 12)[None], "position_ids": torch.arange(9)[None]}
    asked = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([3])}
    plain = model(**row, **asked).loss
    with packattn.patch(model):
        call = torch.compile(model, backend="eager") if compiled else model
        torch.testing.assert_close(call(**row, **asked).loss, plain)
        row["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        with pytest.raises(RuntimeError if compiled else ValueError, match="a loss over the tokens of a whole row"):
            call(**row, **asked)


POOLING = {
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SMALL, embedding_size=16)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL)),
    "clip projected": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**SMALL)),
    "siglip": lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**SMALL)),
}
POOLERS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SMALL | {"pad_token_id": 1})),
    "dpr": lambda: transformers.DPRQuestionEncoder(transformers.DPRConfig(**SMALL)),
}


def pooled(output):
    return next(x for x in output.to_tuple() if x.ndim == 2) if hasattr(output, "to_tuple") else output[-1]


@pytest.mark.parametrize("how", ["eager", "compiled", "tuple"])
@pytest.mark.parametrize("name", POOLING)
def test_a_result_of_a_packed_row_is_not_a_number(name, how):
    torch._dynamo.reset()
    model = POOLING[name]().eval()
    ids, first = torch.arange(3, 12)[None].expand(2, -1), torch.arange(9)
    positions = torch.stack([first, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])])
    expected = pooled(model(input_ids=ids))
    with packattn.patch(model), torch.no_grad():
        call = torch.compile(model, backend="eager") if how == "compiled" else model
        output = call(input_ids=ids, position_ids=positions, return_dict=how != "tuple")
    found = next(x for x in output if x.ndim == 2) if how == "tuple" else pooled(output)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].isnan().all()


@pytest.mark.parametrize("how", ["eager", "compiled", "tuple"])
@pytest.mark.parametrize("name", POOLERS)
def test_law_1_a_pooler_gives_one_result_of_each_sequence(name, how):
    torch._dynamo.reset()
    model, lengths = POOLERS[name]().eval(), [4, 5, 3]
    batch = packed_row("roberta" if name == "xlm-roberta" else name, lengths)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=batch["input_ids"][:, s]).pooler_output for s in spans(lengths)])
        with packattn.patch(model):
            call = torch.compile(model, backend="eager") if how == "compiled" else model
            given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            output = call(**given, return_dict=how != "tuple")
    assert_close(output[-1] if how == "tuple" else output.pooler_output, expected)


def test_a_reader_with_one_logit_of_every_row_is_refused():
    with pytest.raises(packattn.UnsupportedModelError, match="one relevance logit of every row"):
        packattn.patch(transformers.DPRReader(transformers.DPRConfig(**SMALL)))


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "GPT2DoubleHeadsModel"])
def test_choices_of_as_many_rows_are_refused(name):
    maker = getattr(transformers, name)
    with pytest.raises(packattn.UnsupportedModelError, match=f"{name} makes one result of every row"):
        packattn.patch(maker(maker.config_class(**SMALL)))


@pytest.mark.parametrize("how", ["eager", "compiled", "shifted", "gpt2", "mamba"])
def test_law_3_labels_across_sequences_raise(how):
    torch._dynamo.reset()
    model = {"gpt2": lambda: tiny("gpt2"), "mamba": lambda: make("mamba")}.get(how, lambda: make("llama"))()
    batch = packed_row("llama")
    labels = batch.pop("labels")
    with packattn.patch(model):
        call = torch.compile(model, backend="eager") if how == "compiled" else model
        call(**batch, labels=labels.index_fill(1, torch.tensor([0]), 5))  # nothing predicts the first of a row
        labels[:, spans()[2]] = 5
        given = {"labels": labels}
        if how == "shifted":
            given["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        error = RuntimeError if how == "compiled" else ValueError
        with pytest.raises(error, match="the last token of a sequence predict the first of the next one"):
            call(**batch, **given)


def test_law_1_labels_that_are_not_shifted_may_be_at_first_tokens():
    model, batch = make("bert"), packed_row("bert")
    labels = batch["input_ids"]
    with packattn.patch(model), torch.no_grad():
        result = model(input_ids=labels, position_ids=batch["position_ids"], labels=labels)
    assert_close(result.loss, torch.nn.functional.cross_entropy(result.logits[0], labels[0]))


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_law_1_labels_that_are_shifted_already(name):
    model, batch = make(name), packed_row(name)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with packattn.patch(model), torch.no_grad():
        assert_close(model(**batch, shift_labels=shifted).loss, model(**batch).loss)


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_law_1_one_attention_mask_for_several_rows(name):
    model, batch = make(name), packed_row(name)
    ids = batch["input_ids"].expand(2, -1)
    mask = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            found = model(input_ids=ids, position_ids=batch["position_ids"], attention_mask=mask).logits
    assert_close(found, expected.expand(2, -1, -1))


HEADS = {
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)), "model"),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**SMALL | {"pad_token_id": 1})
        ),
        "roberta",
    ),
    "questions": (QUESTIONS["bert"], "bert"),
}


@pytest.mark.parametrize("name", HEADS)
def test_law_3_a_model_inside_of_a_head_that_takes_rows_is_refused(name):
    maker, attribute = HEADS[name]
    head = maker().eval()
    inner = getattr(head, attribute)
    with pytest.raises(packattn.UnsupportedModelError, match=f"it is a part of a {type(head).__name__}"):
        packattn.patch(inner)
    del head
    packattn.patch(inner)  # nobody else holds it


def test_law_3_the_compiled_forward_of_a_classifier_raises():
    torch._dynamo.reset()
    model, batch = LlamaForSequenceClassification(LlamaConfig(**SMALL)).eval(), packed_row("llama")
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with packattn.patch(model):
        assert torch.equal(model.forward(**given).logits, model(**given).logits)
        with pytest.raises(RuntimeError, match=r"runs past the hooks of packattn\.patch"):
            torch.compile(model.forward, backend="eager")(**given)


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_what_only_the_loss_reads_may_pass_through_the_layers(name):
    model, batch = tiny(name), packed_row("llama")
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    with packattn.patch(model), torch.no_grad():
        logits = model(**given).logits
        expected = torch.nn.functional.cross_entropy(logits[0], targets[0])
        assert_close(model(**given, labels=batch["labels"]).loss, expected)
        found = model(**given, labels=batch["labels"], shift_labels=targets, ignore_index=-100).loss
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "bamba", "bert", "mamba"])
def test_hooks_put_on_after_the_patch_get_the_arguments_as_they_came(name):
    model, batch, seen = make(name), packed_row(name), []
    ids, position_ids, real = batch["input_ids"], batch["position_ids"], torch.ones_like(batch["input_ids"])
    with torch.no_grad(), packattn.patch(model):
        part = model.base_model
        for module in (model, part):
            module.register_forward_pre_hook(lambda module, args: seen.append(args))
            module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args), with_kwargs=True)
            module.register_forward_hook(lambda module, args, output: seen.append(args))
        for module, count in ((model, 6), (part, 3)):
            seen.clear()
            module(ids, position_ids=position_ids)
            assert len(seen) == count
            assert all(args[0] is ids for args in seen if args)
            assert sum(len(args) == 1 for args in seen) >= 3
        expected = model(input_ids=ids, attention_mask=real, position_ids=position_ids)[0]
        if name != "mamba":  # whose second argument is another
            assert torch.equal(model(ids, real, position_ids=position_ids)[0], expected)
            changed = model(input_ids=torch.full_like(ids, 5), position_ids=position_ids)[0]
            model.register_forward_pre_hook(lambda module, args: (torch.full_like(args[0], 5), *args[1:]))
            assert torch.equal(model(ids, position_ids=position_ids)[0], changed)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["xlm-roberta", "esm", "bert"])
def test_law_1_an_unpacked_row_with_a_padding_token_inside_is_unchanged(name, compiled):
    # The RoBERTa family counts its positions from the token ids, and padding tokens have none.
    torch._dynamo.reset()
    model, ids = tiny(name, AutoModelForMaskedLM), packed_row("llama")["input_ids"].repeat(2, 1)
    ids[0, [0, 4, 5]] = ids[1, -3:] = model.config.pad_token_id
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with patched(model):
            call = torch.compile(model, backend="eager") if compiled else model
            assert_close(call(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["fnet", "big_bird", "convbert"])
def test_law_1_a_row_longer_than_the_longest_sequence(name):
    model = tiny(name, AutoModelForMaskedLM)
    lengths = [model.config.max_position_embeddings - 3, 12, 9]
    batch = packed_row("llama", lengths)
    with torch.no_grad():
        expected = alone(model, batch, lengths)
        with patched(model):
            assert_close(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_law_1_a_model_that_gives_out_its_attention_mask(compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = transformers.Qwen2AudioForConditionalGeneration
    model, batch = made(shrink(made.config_class)).eval(), packed_row("llama")
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    given = {"input_ids": ids, "position_ids": batch["position_ids"]}
    with torch.no_grad():
        logits = alone(model, batch)
        with packattn.patch(model):
            call = torch.compile(model, backend="eager") if compiled else model
            for more in ({}, {"attention_mask": mask}):
                found = call(**batch, **more)
                assert_close(found.loss, torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:]))
                assert found.attention_mask is None or torch.equal(found.attention_mask, mask)
            _, *rest = model.model(**given, attention_mask=mask, return_dict=False, use_cache=False)
            assert [part.shape for part in rest if isinstance(part, torch.Tensor)] == [mask.shape]


def altclip():
    """A model that pools by itself, and a packed row for it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = transformers.AltCLIPTextModel
    return made(shrink(made.config_class)).eval(), packed_row("roberta")


@pytest.mark.parametrize("how", ["eager", "tuple", "compiled"])
def test_a_model_that_pools_by_itself_gives_one_vector_a_sequence(how):
    model, batch = altclip()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=batch["input_ids"][:, s]).pooler_output for s in spans()])
        whole = model(input_ids=batch["input_ids"]).pooler_output
        with pytest.warns(UserWarning, match=r"does not know .*AltCLIPTextModel"):
            patch = packattn.patch(model)
        call = torch.compile(model, backend="eager") if how == "compiled" else model
        given = {"return_dict": False} if how == "tuple" else {}
        assert_close(call(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **given)[1], expected)
        assert_close(call(input_ids=batch["input_ids"], **given)[1], whole)
        patch.remove()


@pytest.mark.parametrize("how", ["eager", "tuple", "compiled"])
def test_a_trusted_model_that_pools_by_itself_has_no_result_of_a_packed_row(how):
    model, batch = altclip()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"]).pooler_output
        with packattn.patch(model, trusted=[type(model)]):
            call = torch.compile(model, backend="eager", fullgraph=True) if how == "compiled" else model
            given = {"return_dict": False} if how == "tuple" else {}
            assert call(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **given)[1].isnan().all()
            assert_close(call(input_ids=batch["input_ids"], **given)[1], expected)


def test_law_1_two_dimensional_convolutions_along_the_row():
    from transformers.models.sam3_lite_text import modeling_sam3_lite_text as sam3

    config = shrink(sam3.Sam3LiteTextTextModel.config_class)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model, batch = sam3.Sam3LiteTextTextModel(config).eval(), packed_row("llama")
    with torch.no_grad():
        parts = [model(input_ids=batch["input_ids"][:, span]).last_hidden_state for span in spans(LENGTHS)]
        with patched(model):
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    assert_close(found, torch.cat(parts, 1))
