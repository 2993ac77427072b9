"""A patched model that something is put around: heads, traces, transforms, torch.compile after an error, generation,
another model of the same config."""

import gc
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from tiny_models import SMALL, alone, assert_close, make, packed_row, spans
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import packattn
from packattn.hf.running import RUNNING
from packattn.hf.tiny import shrink


class Wrapper(PreTrainedModel):
    """What makes one result of every row, around a model that was patched before."""

    config_class = LlamaConfig

    def __init__(self, inner):
        super().__init__(inner.config)
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs).last_hidden_state[:, -1]


class WrapperForSequenceClassification(Wrapper):
    pass


@pytest.mark.parametrize("compiled", [False, True])
def test_law_3_a_head_put_around_a_patched_model_raises(compiled):
    torch._dynamo.reset()
    model, batch = make("llama").model, packed_row("llama")
    packattn.patch(model)
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}

    def call(kind):
        return torch.compile(kind(model), backend="eager") if compiled else kind(model)

    call(Wrapper)(**given)
    with pytest.raises(NotImplementedError, match="one result of every row, around a model that was patched by itself"):
        call(WrapperForSequenceClassification)(**given)


class Prompted(torch.nn.Module):
    """As PEFT's prompt tuning does it."""

    active_peft_config = SimpleNamespace(is_prompt_learning=True)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.prompt = torch.nn.Parameter(torch.zeros(1, 3, 64))

    def forward(self, input_ids, position_ids):
        embeddings = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=torch.cat([self.prompt, embeddings], 1)).logits


@pytest.mark.parametrize("compiled", [False, True])
def test_law_3_prompts_put_before_the_row_of_a_patched_model_raise(compiled):
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    packattn.patch(model)
    prompted = Prompted(model)
    call = torch.compile(prompted, backend="eager") if compiled else prompted
    with pytest.raises(NotImplementedError, match="PEFT prompt learning puts virtual tokens before the row"):
        call(batch["input_ids"], batch["position_ids"])


@pytest.mark.parametrize("how", ["make_fx", "export"])
def test_law_3_a_trace_of_layers_by_sequence_raises(how):
    model, batch = make("bamba"), packed_row("bamba")
    given = (batch["input_ids"], batch["position_ids"])

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, positions):
            return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits

    packattn.patch(model)
    make_fx = torch.fx.experimental.proxy_tensor.make_fx(Logits())
    record = (
        partial(torch.export.export, Logits(), given, strict=False) if how == "export" else partial(make_fx, *given)
    )
    with pytest.raises(NotImplementedError, match="would keep the lengths of the example"):
        record()


@pytest.mark.parametrize("strict", [False, True])
def test_law_1_a_model_of_spans_exports(strict):
    model, lengths = make("llama"), [7, 19, 1, 13]
    batch, other = packed_row("llama", lengths), packed_row("llama", lengths[::-1])

    def given(batch):
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}

    with torch.no_grad():
        expected = alone(model, other, lengths[::-1])
        with packattn.patch(model):
            program = torch.export.export(model, (), given(batch), strict=strict).module()
        assert_close(program(**given(other)).logits, expected)


TRANSFORMS = {
    "vmap": lambda loss, x: torch.vmap(loss)(x[None]),
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func_raise(transform):
    model, batch = make("llama"), packed_row("llama")
    x = model.get_input_embeddings()(batch["input_ids"]).detach()

    def loss(x):
        return model(inputs_embeds=x, position_ids=batch["position_ids"], use_cache=False).logits.square().mean()

    with packattn.patch(model), pytest.raises(NotImplementedError, match=r"no rules for torch\.func"):
        transform(loss, x)


def test_vmap_over_rows_whose_lengths_differ_raises():
    model, batch = make("mamba"), packed_row("mamba")
    ids = batch["input_ids"].expand(2, -1)
    positions = torch.cat([batch["position_ids"], torch.arange(ids.shape[1])[None]])

    def logits(ids, positions):
        return model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits

    with packattn.patch(model), pytest.raises(NotImplementedError, match=r"no rules for torch\.func"):
        torch.vmap(logits)(ids, positions)


def test_law_1_an_error_in_a_compiled_hybrid_leaves_nothing_for_the_next_call():
    torch._dynamo.reset()
    model, batch = make("bamba"), packed_row("bamba")
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            compiled = torch.compile(model, backend="eager")
            with pytest.raises(Exception, match=r"shape|size|batch"):
                compiled(**given, labels=batch["labels"][:, :3])
            assert_close(compiled(**given).logits, expected)
            assert RUNNING.get() is None


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_law_3_a_packed_prompt_is_not_generated_from_with_a_cache(name):
    model, batch = make(name), packed_row(name)
    given = {"position_ids": batch["position_ids"], "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    last = batch["input_ids"][:, spans()[-1]]
    expected = model.generate(last, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, -3:]
    with packattn.patch(model):
        with pytest.raises(ValueError, match="the cache comes from a packed forward"):
            model.generate(batch["input_ids"], **given)
        assert torch.equal(model.generate(batch["input_ids"], **given, use_cache=False)[:, -3:], expected)


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_law_1_an_interrupted_forward_leaves_nothing_for_the_next_call(name):
    model, first, second = make(name), packed_row(name), packed_row(name, [19, 13, 7, 1], seed=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = alone(model, second, [19, 13, 7, 1])
        whole = model(second["input_ids"]).logits
        with packattn.patch(model):
            hook = model.base_model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**first)
            hook.remove()
            # Straight to the inner model, which takes no sequences over from the interrupted call.
            assert_close(model.lm_head(model.base_model(second["input_ids"])[0]), whole)
            assert_close(model(second["input_ids"], position_ids=second["position_ids"]).logits, expected)


@pytest.mark.parametrize("cached", [False, True])
def test_a_layer_that_a_checkpoint_of_torch_runs_again(cached):
    model, batch = make("llama").train(), packed_row("llama")
    with packattn.patch(model):
        model(**batch).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
        loss = model(**batch, use_cache=cached).loss
        if cached:
            with pytest.raises(RuntimeError, match=r"80 keys for 40 tokens.* Pass use_cache=False in training"):
                loss.backward()
        else:
            loss.backward()
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                assert_close(parameter.grad, gradient)


def test_rwkv_generates_as_before():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING["rwkv"])).eval()
    ids, mask = torch.arange(3, 17).view(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **given)
    with packattn.patch(model):
        assert torch.equal(model.generate(ids, **given), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_config_leave_it_as_it_was(order):
    config, batch = LlamaConfig(**SMALL), packed_row("llama")
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    before, inputs = config._attn_implementation, {k: batch[k] for k in ("input_ids", "position_ids")}
    with torch.no_grad():
        expected = [alone(model, batch) for model in models]
        patches = [packattn.patch(model) for model in models]
        patches[order[0]].remove()
        assert_close(models[order[1]](**inputs).logits, expected[order[1]])  # the one that is still patched
        patches[order[1]].remove()
    assert config._attn_implementation == before


def test_a_model_that_is_gone_does_not_keep_the_config_it_shared():
    config = LlamaConfig(**SMALL)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    before = config._attn_implementation
    patch = packattn.patch(model)
    packattn.patch(other)
    del other
    gc.collect()
    patch.remove()
    assert config._attn_implementation == before


@pytest.mark.parametrize("name", ["minimax", "roberta", "whisper"])  # caches and positions of their own
def test_generate_from_padded_prompts_is_unchanged(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[name])).eval()
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def scores():
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        made = model.generate(ids, attention_mask=mask, **options, output_scores=True, return_dict_in_generate=True)
        return torch.stack(made.scores).clamp(min=-1e4)

    expected = scores()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        patch = packattn.patch(model)
    with patch:
        assert_close(scores(), expected)
