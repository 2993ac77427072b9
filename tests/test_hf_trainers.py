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
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from packattn.hf.tiny import shrink

EXAMPLES = [{"input_ids": list(range(5, 5 + n))} for n in (5, 9, 3)]


def tiny(name):
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[name])
    if name == "gemma4_text":  # the last two layers read the keys and values of the first two
        changes = {"num_hidden_layers": 4, "layer_types": config.layer_types * 2, "num_kv_shared_layers": 2}
        config = type(config)(**config.to_dict() | changes | {"per_layer_config": None})
        assert config.kv_sharing_modes == ["store", "store", "reuse", "reuse"]
    return AutoModelForCausalLM.from_config(config)


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


def test_law_1_shared_keys_and_values_run_by_spans_whatever_logits_are_kept():
    model, batch = tiny("gemma4_text").eval(), packattn.PackingCollator()(EXAMPLES)
    expected = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits for e in EXAMPLES], 1)
    batch.pop("labels")
    with packattn.patch(model) as patch:
        assert patch.how == "spans"
        assert_close(model(**batch).logits, expected)
        for kept in (0, 2, torch.tensor([3, 16])):
            kept_of_all = expected[:, -kept:] if isinstance(kept, int) else expected[:, kept]
            assert_close(model(**batch, logits_to_keep=kept).logits, kept_of_all)


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


PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=98, pad_token_id=0)


# By default a manager takes most of the memory that is free.
SMALL = {
    "generation_config": GREEDY,
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
}


def generated(model):
    found = model.generate_batch(PROMPTS, **SMALL)
    return [output.generated_tokens for output in found.values()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching_is_unchanged_and_the_patch_in_place_again(attention):
    model, batch = tiny("mistral").eval(), packattn.PackingCollator()(EXAMPLES)
    model.set_attn_implementation(attention)
    expected = generated(model)
    with packattn.patch(model):
        packed = model(**batch).logits
        assert generated(model) == expected
        assert torch.equal(model(**batch).logits, packed)
        manager = model.init_continuous_batching(**SMALL)
        with pytest.raises(RuntimeError, match="set after packattn"):
            model(**batch)
        manager.start()
        manager.stop()
        assert torch.equal(model(**batch).logits, packed)
    assert model.config._attn_implementation == attention
    assert generated(model) == expected
    assert not {"init_continuous_batching", "continuous_batching_context_manager"} & set(vars(model))


def test_continuous_batching_that_fails_leaves_the_patch_in_place(monkeypatch):
    model, batch = tiny("llama").eval(), packattn.PackingCollator()(EXAMPLES)

    def fail(*args):
        raise ValueError("as it is told to")

    with packattn.patch(model):
        packed = model(**batch).logits
        for name in ("warmup", "switch_to_cb_friendly_attn"):
            monkeypatch.setattr(ContinuousBatchingManager, name, fail)
            with pytest.raises(ValueError, match="as it is told to"):
                generated(model)
            monkeypatch.undo()
            assert torch.equal(model(**batch).logits, packed)
