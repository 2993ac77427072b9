"""Known classes that a user changed, before the patch and after: no change is run on a packed row."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from tiny_models import SMALL, alone, assert_close, packed_row
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import packattn

ROTATE = modeling_llama.apply_rotary_pos_emb


def looks_back(hidden):
    """Farther than the sequences of the probe are long."""
    return torch.cat([hidden[:, :8], hidden[:, 8:] + hidden[:, :-8]], 1) if hidden.shape[1] > 8 else hidden


def hook_of_no_use_yet(module, args, output):
    return output + 0 * output.cumsum(1)


def hook_that_looks(module, args, output):
    module.seen = output.shape


class LooksBack:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, hidden):
        return looks_back(self.inner(hidden))


def replace_activation(mlp):
    act = mlp._modules.pop("act_fn")
    mlp.act_fn = LooksBack(act)


def rotate_back(q, k, cos, sin, **options):
    return ROTATE(q, looks_back(k.transpose(1, 2)).transpose(1, 2), cos, sin, **options)


CHANGES = {
    "forward hook": lambda model, _: model.model.layers[0].mlp.register_forward_hook(hook_of_no_use_yet),
    "forward pre-hook": lambda model, _: model.model.norm.register_forward_pre_hook(lambda m, a: (looks_back(a[0]),)),
    "callable of its own": lambda model, _: replace_activation(model.model.layers[0].mlp),
    "function of its module": lambda _, patch: patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_back),
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2)).eval()


LENGTHS = (5, 12, 9, 12)


def packed():
    return packed_row("llama", LENGTHS)


def of(batch):
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}


@pytest.mark.parametrize("change", CHANGES)
def test_law_3_a_known_class_that_was_changed_runs_one_sequence_at_a_time(change, monkeypatch):
    model = llama()
    CHANGES[change](model, monkeypatch)
    batch = packed()
    expected = alone(model, batch, LENGTHS)
    with pytest.warns(UserWarning, match="one sequence at a time"):
        patch = packattn.patch(model)
    assert patch.how == "rows"
    assert_close(model(**of(batch)).logits, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_law_3_a_known_class_that_is_changed_after_the_patch_raises(change, monkeypatch):
    model, batch = llama(), packed()
    packattn.patch(model)
    model(**of(batch))
    CHANGES[change](model, monkeypatch)
    with pytest.raises(RuntimeError, match=r"Llama\w+ with .* of its own.*after packattn.patch"):
        model(**of(batch))


def test_a_hook_that_returns_nothing_only_looks():
    model, batch = llama(), packed()
    model.model.norm.register_forward_hook(hook_that_looks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packattn.patch(model).how == "spans"
    model.model.layers[0].mlp.register_forward_hook(functools.partial(hook_that_looks))
    model(**of(batch))
    assert model.model.layers[0].mlp.seen[1] == batch["input_ids"].shape[1]


def test_a_hook_after_the_patch_may_look_in_any_way_and_stays_the_users():
    model, batch, seen = llama(), packed(), []
    patch = packattn.patch(model)

    def look(module, args, output):
        return seen.append(output.shape)

    handle = model.model.layers[0].mlp.register_forward_hook(look)
    model(**of(batch))
    model(**of(batch))
    assert len(seen) == 2
    patch.remove()
    assert model.model.layers[0].mlp._forward_hooks[handle.id] is look
    handle.remove()
    assert not model.model.layers[0].mlp._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_law_3_a_copy_of_a_patched_model_is_watched_too(copied):
    model, batch = llama(), packed()
    expected = alone(model, batch, LENGTHS)
    packattn.patch(model)
    model = copied(model)
    assert_close(model(**of(batch)).logits, expected)
    for again in (model, copied(model)):
        mlp = again.model.layers[0].mlp
        mlp.forward = LooksBack(mlp.forward)
        with pytest.raises(RuntimeError, match=r"LooksBack.*after packattn.patch"):
            again(**of(batch))


def test_law_3_an_unknown_head_put_on_a_model_that_runs_one_sequence_at_a_time_raises():
    class Head(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden.cumsum(1))

    class Mlp(nn.Identity):
        def forward(self, hidden):
            return hidden

    model, batch = llama(), packed()
    model.model.layers[0].mlp = Mlp()
    with pytest.warns(UserWarning, match="one sequence at a time"):
        packattn.patch(model)
    model(**of(batch))
    model.lm_head = Head(model.config.hidden_size, model.config.vocab_size)
    with pytest.raises(RuntimeError, match=r"lm_head .*Head.*after packattn.patch"):
        model(**of(batch))


def test_a_part_that_torch_compiles_is_what_it_was():
    model, batch = llama(), packed()
    expected = alone(model, batch, LENGTHS)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    assert packattn.patch(model).how == "spans"
    assert_close(model(**of(batch)).logits, expected)
