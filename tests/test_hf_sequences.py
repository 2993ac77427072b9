"""Where the sequences of a packed row begin: by positions, by explicit numbers, by the planes of M-RoPE."""

import copy
import warnings

import pytest
import torch
import transformers
from tiny_models import LENGTHS, SMALL, VOCABULARY, alone, assert_close, make, packed_row, spans
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from packattn.hf.tiny import shrink

SEQ_IDX = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
CU_SEQ_LENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
EXPLICIT = {
    "seq_idx": {"seq_idx": SEQ_IDX},
    "cu_seq_lens": {"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": CU_SEQ_LENS},
}


@pytest.mark.parametrize("given", EXPLICIT)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "bamba"])
def test_law_1_sequences_that_are_given_without_positions(name, given):
    model, batch = make(name), packed_row(name)
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            try:
                packed = model(input_ids=batch["input_ids"], **EXPLICIT[given]).logits
            except TypeError:
                pytest.skip(f"{name} takes no {given}")
    assert_close(packed, expected)


@pytest.mark.parametrize("given", EXPLICIT)
def test_law_3_given_sequences_that_positions_deny_raise(given):
    model, batch = make("llama"), packed_row("llama")
    ids = batch["input_ids"]
    cases = {
        "one more by positions": packed_row("llama", [7, 10, 9, 1, 13])["position_ids"],
        "one more as given": torch.arange(ids.shape[1])[None],
    }
    with packattn.patch(model):
        model(input_ids=ids, position_ids=batch["position_ids"], **EXPLICIT[given])
        for position_ids in cases.values():
            with pytest.raises(ValueError, match="begin other sequences than position_ids"):
                model(input_ids=ids, position_ids=position_ids, **EXPLICIT[given])


def test_law_3_two_ways_of_giving_sequences_must_agree():
    model, ids = make("llama"), packed_row("llama")["input_ids"]
    with packattn.patch(model), pytest.raises(ValueError, match="cu_seq_lens_q and seq_idx say different sequences"):
        model(input_ids=ids, seq_idx=SEQ_IDX, cu_seq_lens_q=torch.tensor([0, 8, ids.shape[1]]))


def test_law_3_a_sequence_over_two_rows_raises():
    model, ids = make("llama"), torch.ones(2, 6, dtype=torch.long)
    with packattn.patch(model), pytest.raises(ValueError, match="goes on from one row into the next"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 4, 8, 12]))


def test_a_dead_segment_is_no_contradiction():
    collate = packattn.PackingCollator(pad_to=16, return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    model = make("llama")
    with packattn.patch(model), torch.no_grad():
        with_mask = model(**batch).logits[:, :5]
        batch.pop("attention_mask")
        without = model(**batch).logits[:, :5]
    assert torch.equal(with_mask, without)


@pytest.mark.parametrize("given", EXPLICIT)
def test_law_1_a_compiled_model_keeps_what_was_given(given):
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            packed = compiled(input_ids=batch["input_ids"], use_cache=False, **EXPLICIT[given]).logits
    assert_close(packed, expected)


@pytest.mark.parametrize("embedded", [False, True], ids=["input_ids", "inputs_embeds"])
def test_padding_whose_embedding_is_zero_gives_finite_gradients(embedded):
    # Gemma-3n divides by the norm of a token's state: by itself, a row of padding tokens has no gradient at all.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING["gemma3n_text"])).eval()
    assert model.get_input_embeddings().weight[0].abs().max() == 0
    batch = packed_row("llama")
    real = batch["input_ids"].shape[1]
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 5))
    position_ids = torch.nn.functional.pad(batch["position_ids"], (0, 5))
    mask = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5))
    weights = [p for p in model.parameters() if p.requires_grad]

    def given(ids):
        return {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}

    with packattn.patch(model):
        expected = model(**given(batch["input_ids"]), position_ids=batch["position_ids"]).logits
        found = model(**given(ids), position_ids=position_ids, attention_mask=mask).logits[:, :real]
        assert_close(found, expected)
        expected = torch.autograd.grad(expected.square().mean(), weights, allow_unused=True)
        found = torch.autograd.grad(found.square().mean(), weights, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-4 * other.norm() + 1e-9


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("cpmant", AutoModelForCausalLM),
        ("bamba", AutoModelForCausalLM),
        ("convbert", AutoModelForMaskedLM),
        ("fnet", AutoModelForMaskedLM),
    ],
)
def test_law_1_rows_of_one_padded_sequence_each(name, auto):
    # By themselves, most of these give a padded row other results than its sequence alone.
    torch.manual_seed(0)
    model, lengths = auto.from_config(shrink(CONFIG_MAPPING[name])).eval(), [13, 7]
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask} | ({"use_cache": False} if auto is AutoModelForCausalLM else {})
    with torch.no_grad():
        rows = [model(input_ids=ids[i : i + 1, :n]).logits[0] for i, n in enumerate(lengths)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # by rows
            packattn.patch(model)
        found = model(**given).logits
    for i, n in enumerate(lengths):
        assert_close(found[i, :n], rows[i])


@pytest.mark.parametrize("how", ["asked", "by default"])
def test_rows_of_one_padded_sequence_each_fill_a_cache(how):
    model, ids = make("bamba"), packed_row("llama", [16])["input_ids"].expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask} | ({"use_cache": True} if how == "asked" else {})
    with torch.no_grad():
        truth = model(**given)
        with packattn.patch(model):
            found = model(**given)
    assert found.cache.get_seq_length() == truth.cache.get_seq_length() == 16
    assert_close(found.logits[mask == 1], truth.logits[mask == 1])


# One result per sequence: rows padded to one length where attention knows it, rows of one length where layers mix.


@pytest.mark.parametrize("name", ["bert", "llama", "deberta", "xlnet", "jamba"])
def test_law_1_classification_takes_one_label_a_sequence(name):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(shrink(CONFIG_MAPPING[name])).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lengths, labels = [7, 19, 7, 13], torch.tensor([1, 0, 1, 1])
    batch = packed_row("llama", lengths)
    weights = list(model.parameters())
    rows = torch.cat([model(input_ids=batch["input_ids"][:, s]).logits for s in spans(lengths)])
    loss = torch.nn.functional.cross_entropy(rows, labels)
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch = packattn.patch(model)
    with patch:
        given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        packed = model(**given, labels=labels)
        found = torch.autograd.grad(packed.loss, weights, allow_unused=True)
        with pytest.raises(ValueError, match=r"one label for each of the 4 packed sequences.*\(1, 46\)"):
            model(**given, labels=batch["input_ids"])
    assert_close(packed.logits, rows)
    assert_close(packed.loss, loss)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-4 * other.norm() + 1e-7


@pytest.mark.parametrize(("name", "compiled"), [("llama", False), ("llama", True), ("gpt2", False), ("jamba", False)])
def test_law_1_a_classifier_without_a_padding_token_takes_the_last_token_by_length(name, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[name])
    config.pad_token_id = None
    model, lengths, batch = (
        AutoModelForSequenceClassification.from_config(config).eval(),
        [7, 3, 7],
        packed_row("llama", [7, 3, 7]),
    )
    ids = batch["input_ids"]
    ids[0, [6, 9, 16]] = torch.tensor([0, 1, 3])  # none of these can stand for padding
    given = {"input_ids": ids, "position_ids": batch["position_ids"]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        rows = torch.cat([model(input_ids=ids[:, s]).logits for s in spans(lengths)])
        with packattn.patch(model):
            call = torch.compile(model, backend="eager") if compiled else model
            assert_close(call(**given).logits, rows)
            assert model.config.pad_token_id is None
            with pytest.raises(ValueError, match=r"one label for each"):
                call(**given, labels=ids)
            assert model.config.pad_token_id is None


# M-RoPE: three planes of positions, or four with those of the text before them.


@pytest.fixture(scope="module")
def qwen2_vl():
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(shrink(CONFIG_MAPPING["qwen2_vl"])).eval()


def with_an_image(position_ids):
    """Planes of a packed row whose second sequence begins with an image of 2 x 3 tokens, as the model counts them."""
    planes = position_ids.expand(3, -1, -1).clone()
    image = slice(LENGTHS[0], LENGTHS[0] + 6)
    planes[0, :, image] = 0
    planes[1, :, image] = torch.tensor([0, 0, 0, 1, 1, 1])
    planes[2, :, image] = torch.tensor([0, 1, 2, 0, 1, 2])
    planes[:, :, image.stop : LENGTHS[0] + LENGTHS[1]] -= 3  # text goes on after the longest side
    return planes


@pytest.mark.parametrize("form", ["equal planes", "text before", "seq_idx", "cu_seq_lens"])
def test_law_1_planes_of_positions(qwen2_vl, form):
    batch = packed_row("llama")
    ids, position_ids = batch["input_ids"], batch["position_ids"]
    planes = position_ids.expand(3, -1, -1) if form == "equal planes" else with_an_image(position_ids)
    with torch.no_grad():
        rows = [qwen2_vl(input_ids=ids[:, s], position_ids=planes[:, :, s]).logits for s in spans()]
        with packattn.patch(qwen2_vl):
            given = torch.cat([position_ids[None], planes]) if form == "text before" else planes
            packed = qwen2_vl(input_ids=ids, position_ids=given, **EXPLICIT.get(form, {})).logits
    assert_close(packed, torch.cat(rows, 1))


def test_law_1_planes_in_a_compiled_model(qwen2_vl):
    torch._dynamo.reset()
    batch = packed_row("llama")
    given = {"input_ids": batch["input_ids"], "position_ids": with_an_image(batch["position_ids"]), "seq_idx": SEQ_IDX}
    with packattn.patch(qwen2_vl), torch.no_grad():
        compiled = torch.compile(qwen2_vl, backend="eager")
        assert_close(compiled(**given).logits, qwen2_vl(**given).logits)


def test_law_3_planes_that_differ_say_no_boundaries(qwen2_vl):
    batch = packed_row("llama")
    with packattn.patch(qwen2_vl), pytest.raises(ValueError, match=r"planes .* that differ.*Say it by seq_idx"):
        qwen2_vl(input_ids=batch["input_ids"], position_ids=with_an_image(batch["position_ids"]))


@pytest.mark.parametrize("form", ["equal planes", "text before", "images"])
def test_law_3_planes_that_restart_over_a_static_cache_raise(qwen2_vl, form):
    batch = packed_row("llama")
    ids, position_ids = batch["input_ids"], batch["position_ids"]
    planes = position_ids.expand(3 if form == "equal planes" else 4, -1, -1)
    if form == "images":
        planes = with_an_image(position_ids)

    def over_a_cache(ids, planes):
        cache = StaticCache(config=qwen2_vl.config.get_text_config(), max_cache_len=64)
        return qwen2_vl(input_ids=ids, position_ids=planes, past_key_values=cache).logits

    second = spans()[1]  # with the image in it
    with packattn.patch(qwen2_vl), torch.no_grad():
        with pytest.raises(ValueError, match="position_ids restart in a forward over a cache"):
            over_a_cache(ids, planes)
        one = {"input_ids": ids[:, second], "position_ids": planes[:, :, second], "use_cache": False}
        assert_close(
            over_a_cache(ids[:, second], planes[:, :, second]),
            qwen2_vl(**one, seq_idx=torch.zeros_like(ids[:, second])).logits,
        )


def test_planes_without_a_text_plane_are_not_taken_for_one():
    # A model that takes three planes only would read the text's positions as those of time.
    model, batch = make("llama"), packed_row("llama")
    planes = torch.cat([batch["position_ids"][None], with_an_image(batch["position_ids"])])
    with packattn.patch(model), pytest.raises(ValueError, match=r"planes .* that differ"):
        model(input_ids=batch["input_ids"], position_ids=planes)


# Rotary embeddings that look at the longest position.

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def dynamic_llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 8}, num_key_value_heads=2, rope_parameters=DYNAMIC)
    return LlamaForCausalLM(config).eval()


def test_law_1_dynamic_rope_is_that_of_a_model_just_loaded():
    # No sequence is short enough to make transformers forget the longer one before it.
    model, lengths = dynamic_llama(), [19, 13, 9]
    batch, where = packed_row("llama", lengths), spans(lengths)
    with torch.no_grad():
        rows = [copy.deepcopy(model)(input_ids=batch["input_ids"][:, s]).logits for s in where]
        model(input_ids=batch["input_ids"][:, where[0]])
        assert (model(input_ids=batch["input_ids"][:, where[1]]).logits - rows[1]).abs().max() > 1e-4
        with packattn.patch(model) as patch:
            assert patch.how == "by sequence"
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            single = model(input_ids=batch["input_ids"][:, where[2]]).logits
            assert packattn.verify(model, lengths=lengths).ok
    assert_close(packed, torch.cat(rows, 1))
    assert_close(single, rows[2])


def test_law_1_equal_lengths_at_other_positions_are_not_one_group():
    # The second sequence begins at position 50, beyond the original context of the first.
    model = dynamic_llama()
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    position_ids = torch.cat([torch.arange(6), torch.arange(50, 56)])[None]
    halves = [slice(0, 6), slice(6, 12)]
    with torch.no_grad():
        rows = [copy.deepcopy(model)(input_ids=ids[:, s], position_ids=position_ids[:, s]).logits for s in halves]
        with packattn.patch(model):
            packed = model(input_ids=ids, position_ids=position_ids).logits
    assert_close(packed, torch.cat(rows, 1))


# Positions that are counted along the row by a layer itself, and heads that look along it.


def test_law_1_chunked_layers_without_rope_count_from_the_sequence():
    torch.manual_seed(0)
    kinds = ["chunked_attention", "chunked_attention"]
    config = Llama4TextConfig(
        **SMALL | {"num_key_value_heads": 2, "head_dim": 16},
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=6,
        layer_types=kinds,
        no_rope_layers=[1, 0],
        floor_scale=4,
    )
    model, batch = Llama4ForCausalLM(config).eval(), packed_row("llama")
    with torch.no_grad():
        expected = alone(model, batch)
        with pytest.warns(UserWarning, match="scale queries by their index in the row"), packattn.patch(model):
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert_close(packed, expected)


@pytest.mark.parametrize(
    ("name", "why"), [("splinter", "by question tokens"), ("big_bird", "first separator of a row")]
)
def test_law_3_heads_that_look_along_the_row_are_refused(name, why):
    model = AutoModelForQuestionAnswering.from_config(shrink(CONFIG_MAPPING[name]))
    with pytest.raises(packattn.UnsupportedModelError, match=why):
        packattn.patch(model)


@pytest.mark.parametrize(
    ("auto", "name", "changes", "why"),
    [
        (AutoModelForMaskedLM, "perceiver", {}, "max_position_embeddings logits for every row"),
        (AutoModelForMaskedLM, "ibert", {"quant_mode": True}, "range that it takes from the whole batch"),
        (AutoModelForCausalLM, "xlnet", {"bi_data": True}, "other positions to the first half"),
        (AutoModelForCausalLM, "prophetnet", {}, "hidden states of n-grams"),
        (AutoModelForCausalLM, "reformer", {}, "hashes at random"),
        (AutoModelForCausalLM, "gemma4_unified_assistant", {}, "keys of another model"),
        (AutoModelForImageTextToText, "blip", {}, "attends to images from all tokens"),
        (AutoModelForImageTextToText, "idefics", {}, "attends to images from all tokens"),
        (AutoModelForImageTextToText, "diffusion_gemma", {}, "one canvas for a row"),
        (AutoModelForImageTextToText, "kosmos-2", {}, "images beside the tokens"),
    ],
)
def test_law_3_what_a_row_cannot_hold_is_refused_by_name(auto, name, changes, why):
    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    config = shrink(CONFIG_MAPPING[name])
    config.update(changes)
    model = auto.from_config(config)
    with pytest.raises(packattn.UnsupportedModelError, match=why):
        packattn.patch(model)


@pytest.mark.parametrize("name", ["Musicgen", "MusicgenMelody"])
def test_law_3_rows_of_codebooks_are_refused(name):
    config = getattr(transformers, f"{name}DecoderConfig")
    model = getattr(transformers, f"{name}ForCausalLM")(shrink(config))
    with pytest.raises(packattn.UnsupportedModelError, match="num_codebooks rows for one"):
        packattn.patch(model)


def test_verify_gives_paligemma_the_token_types_that_it_needs():
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrink(CONFIG_MAPPING["paligemma"])).eval()
    with packattn.patch(model):
        assert packattn.verify(model).ok
