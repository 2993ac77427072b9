"""What trainers do with a patched model beside calling it: boundaries in every batch, checkpoints, generation."""

from functools import partial

import pytest
import torch
from tiny_models import assert_close
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from packattn.hf.tiny import shrink

EXAMPLES = [{"input_ids": list(range(5, 5 + n))} for n in (5, 9, 3)]


def tiny(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[name]))


@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES[:1]], ids=["packed", "one sequence"])
@pytest.mark.parametrize("given", ["return_flash_attn_kwargs", "return_seq_idx"])
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "bamba", "granitemoehybrid"])
def test_law_1_a_hybrid_takes_given_sequences_in_rows_of_any_number(name, given, examples):
    model, batch = tiny(name).eval(), packattn.PackingCollator(**{given: True})(examples)
    expected = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits for e in examples], 1)
    with packattn.patch(model):
        assert_close(model(**batch).logits, expected)


def checkpoint_layers(model, how):
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=how),
        check_fn=lambda module: isinstance(module, GradientCheckpointingLayer),
    )
    assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
    model.enable_input_require_grads()


@pytest.mark.parametrize(
    ("name", "how", "order"),
    [
        ("llama", CheckpointImpl.NO_REENTRANT, "wrapped before"),
        ("llama", CheckpointImpl.REENTRANT, "wrapped after"),
        ("qwen3_next", CheckpointImpl.NO_REENTRANT, "wrapped after"),
        ("mamba", CheckpointImpl.REENTRANT, "wrapped before"),
        ("gemma3n_text", CheckpointImpl.NO_REENTRANT, "wrapped after"),
        ("gemma4_text", CheckpointImpl.NO_REENTRANT, "wrapped before"),
    ],
)
def test_law_1_whole_layers_checkpointed_from_outside(name, how, order):
    model, batch = tiny(name).train(), packattn.PackingCollator()(EXAMPLES)
    weights = [p for p in model.parameters() if p.requires_grad]
    with packattn.patch(model):
        expected = torch.autograd.grad(model(**batch, use_cache=False).loss, weights, allow_unused=True)
    if order == "wrapped before":
        checkpoint_layers(model, how)
    packattn.patch(model)
    if order == "wrapped after":
        checkpoint_layers(model, how)
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
    for parameter, gradient in zip(weights, expected, strict=True):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("outside", [False, True])
def test_law_3_reentrant_checkpoints_around_shared_keys_raise(outside):
    model, batch = tiny("gemma3n_text").train(), packattn.PackingCollator()(EXAMPLES)
    packattn.patch(model)
    if outside:
        checkpoint_layers(model, CheckpointImpl.REENTRANT)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        model(**batch)
    if not outside:
        model.gradient_checkpointing_disable()
        model(**batch)


def test_verify_probes_a_model_whose_layers_are_checkpointed_from_outside():
    model = tiny("llama")
    packattn.patch(model)
    checkpoint_layers(model, CheckpointImpl.NO_REENTRANT)
    assert packattn.verify(model).ok


def test_a_cache_is_made_in_training_only_where_it_is_asked_for():
    model, batch = tiny("llama").train(), packattn.PackingCollator()(EXAMPLES)
    with packattn.patch(model):
        assert model(**batch).get("past_key_values", None) is None
        assert "cache" in (asked := model(**batch, use_cache=True)) or "past_key_values" in asked
        with torch.no_grad():
            assert "cache" in (without := model(**batch)) or "past_key_values" in without
