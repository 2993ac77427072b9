"""verify on models whose forward is not that of a plain decoder."""

import warnings

import pytest

import packattn
from packattn.hf.tiny import load


@pytest.mark.parametrize("name", ["rwkv", "xlstm"])
def test_verify_takes_no_gradients_through_caches(name):
    model = load(name)  # whose forward over a cache changes it in place
    assert not packattn.verify(model).isolated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    assert packattn.verify(model).ok


@pytest.mark.parametrize(
    ("name", "why"),
    [("canine", "no table of token embeddings"), ("cpmant", "on which CpmAntForCausalLM fails with AttributeError")],
)
def test_verify_names_what_it_cannot_probe(name, why):
    model = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    with pytest.raises(ValueError, match=why):
        packattn.verify(model)


@pytest.mark.parametrize("name", ["ctrl", "dbrx"])
def test_verify_probes_models_that_scale_embeddings_in_place_or_hide_their_experts(name):
    model = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    assert packattn.verify(model).ok


def test_verify_says_of_a_model_with_a_tower_that_it_was_probed_with_text():
    model = load("qwen2_vl")
    with packattn.patch(model):
        assert "of text alone: pixel_values" in str(packattn.verify(model))
    model = load("llama")
    with packattn.patch(model):
        assert "text alone" not in str(packattn.verify(model))
