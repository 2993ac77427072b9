"""Masks that single models define, against the dense masks that transformers makes of them."""

import pytest
import torch
from tiny_models import LENGTHS, SMALL, alone, assert_close, packed_row, spans
from transformers import (
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    masking_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma3 import modeling_gemma3

import packattn
from packattn.hf import masks
from packattn.hf.tiny import shrink

GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]])


def dense(mask_function, positions=POSITIONS):
    """The mask by transformers' own functions, sequences apart."""
    n = positions.shape[1]
    index, zero = torch.arange(n), torch.zeros((), dtype=torch.long)
    sequence = (positions[0].diff(prepend=positions[0, :1] - 2) != 1).cumsum(0)
    seen = mask_function(zero, zero, index[:, None], index[None]).expand(n, n)
    return seen & (sequence[:, None] == sequence)


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_a_bidirectional_window_of_its_own_is_a_span(window):
    # As EmbeddingGemma passes it: the causal window, or all within the window.
    causal = masking_utils.sliding_window_causal_mask_function(window)
    function = masking_utils.or_masks(causal, modeling_gemma3._bidirectional_window_overlay(window))
    carried = masks.carry(POSITIONS, None, 1)
    found = masks.packed_mask(q_length=11, mask_function=function, attention_mask=carried)
    assert torch.equal(found.to_dense(), dense(function))


def test_law_3_a_window_that_is_not_the_causal_one_is_refused():
    causal = masking_utils.sliding_window_causal_mask_function(5)
    function = masking_utils.or_masks(causal, modeling_gemma3._bidirectional_window_overlay(3))
    with pytest.raises(packattn.UnsupportedMaskError, match="or_masks"):
        masks.packed_mask(q_length=11, mask_function=function, attention_mask=masks.carry(POSITIONS, None, 1))


def embedding_gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**GROUPED, sliding_window=5, use_bidirectional_attention=True)
    return Gemma3TextModel(config).eval()


def test_law_1_embedding_gemma_by_spans():
    model, batch = embedding_gemma(), packed_row("gemma3")
    ids, position_ids = batch["input_ids"], batch["position_ids"]
    weight = model.get_input_embeddings().weight
    rows = torch.cat([model(input_ids=ids[:, s]).last_hidden_state for s in spans()], 1)
    expected = torch.autograd.grad(rows.square().mean(), weight)[0]
    with packattn.patch(model) as patch:
        assert patch.how == "spans"
        packed = model(input_ids=ids, position_ids=position_ids).last_hidden_state
        assert_close(packed, rows)
        assert_close(torch.autograd.grad(packed.square().mean(), weight)[0], expected)
        assert packattn.verify(model).ok


def test_law_4_embedding_gemma_compiles_whole():
    if torch.__version__ < "2.14":
        pytest.skip("the compiler of older torch cannot read the closure of a window")
    torch._dynamo.reset()
    model, batch = embedding_gemma(), packed_row("gemma3")
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with packattn.patch(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_law_1_a_decoder_told_to_look_both_ways():
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, sliding_window=5, is_causal=False)).eval()
    batch = packed_row("gemma3")
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model) as patch:
            assert patch.how == "spans"
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert_close(packed, expected)


# Prefixes and images that token types mark.


def token_types(kind):
    """One run in each sequence: a prefix, or an image behind the first token; the last sequence has none."""
    rows = []
    for n in LENGTHS:
        marked = torch.zeros(n, dtype=torch.long)
        if kind == "prefix":
            marked[: n // 2] = 1
        elif n > 5:
            marked[1:4] = 1
        rows.append(marked)
    rows[-1][:] = 0
    return torch.cat(rows)[None]


@pytest.mark.parametrize(("name", "kind"), [("paligemma", "prefix"), ("gemma3", "image")])
def test_law_1_blocks_that_token_types_mark(name, kind):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrink(CONFIG_MAPPING[name])).eval()
    first = 1 if name == "paligemma" else 0
    batch, types = packed_row("llama"), token_types(kind)
    ids, position_ids = batch["input_ids"], batch["position_ids"] + first
    given = 1 - types if name == "paligemma" else types  # PaliGemma marks the suffix
    with torch.no_grad():
        rows = [
            model(input_ids=ids[:, s], position_ids=position_ids[:, s], token_type_ids=given[:, s]).logits
            for s in spans()
        ]
        causal = model(input_ids=ids[:, spans()[1]]).logits
        assert (causal - rows[1]).abs().max() > 1e-3  # the types matter
        with packattn.patch(model) as patch:
            assert patch.how == "spans"
            packed = model(input_ids=ids, position_ids=position_ids, token_type_ids=given).logits
    assert_close(packed, torch.cat(rows, 1))


def test_law_3_a_block_in_two_runs_raises():
    build = masking_utils
    twice = torch.tensor([[0, 0, -1, 0, 0, -1, -1, 0, 0, -1, -1]])
    once = torch.tensor([[0, 0, -1, -1, -1, -1, -1, 0, 0, -1, -1]])
    carried = masks.carry(POSITIONS, None, 1)
    for blocks, fails in ((once, False), (twice, True)):
        function = build.or_masks(build.causal_mask_function, build.blockwise_overlay(blocks))
        call = {"q_length": 11, "mask_function": function, "attention_mask": carried}
        if fails:
            with pytest.raises(ValueError, match="two runs of one bidirectional block"):
                masks.packed_mask(**call)
        else:
            assert torch.equal(masks.packed_mask(**call).to_dense(), dense(function))


def test_law_3_a_causal_mask_for_layers_that_look_both_ways_raises():
    # Without token types, plain transformers gives this model one result in SDPA and another in eager.
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrink(CONFIG_MAPPING["paligemma"])).eval()
    batch = packed_row("llama")
    ids = batch["input_ids"]
    with torch.no_grad():
        assert (
            model(input_ids=ids).logits - model(input_ids=ids, token_type_ids=ids * 0 + 1).logits
        ).abs().max() > 1e-3
        with packattn.patch(model), pytest.raises(packattn.UnsupportedMaskError, match="Pass token_type_ids"):
            model(input_ids=ids, position_ids=batch["position_ids"])
