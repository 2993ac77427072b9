"""The guard: a packed batch goes through a patched model, and something has changed since or is not as it seems."""

import copy
import warnings

import pytest
import torch
from tiny_models import VOCABULARY, alone, assert_close, make, packed_row, spans
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention

import packattn
from packattn import PackedMask
from packattn.hf.running import RUNNING
from packattn.hf.tiny import shrink

IDS = torch.ones(2, 6, dtype=torch.long)


def test_law_3_another_attention_set_after_the_patch_raises():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model):
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match=r"attends by 'sdpa', set after packattn\.patch"):
            model(**batch)
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_law_3_a_layer_that_bypasses_the_interface_is_named(checkpointing):
    model, batch = make("llama"), packed_row("llama")

    class Bypass(type(model.model.layers[1].self_attn)):
        def forward(self, hidden_states, **others):
            return hidden_states, None

    with packattn.patch(model):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        model.model.layers[1].self_attn.__class__ = Bypass
        with pytest.raises(
            RuntimeError, match=r"layers\.1\.self_attn \(.*Bypass\): changed or put into the model after"
        ):
            model(**batch)


def test_law_3_a_mask_of_another_forward_raises():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model, trusted=[type(model.model.layers[1])]):  # with the hook that it gets
        foreign = PackedMask.causal(lengths=[batch["input_ids"].shape[1]])
        layer = model.model.layers[1]
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": foreign}), with_kwargs=True
        )
        with pytest.raises(RuntimeError, match="mask of another forward"):
            model(**batch)


@pytest.mark.parametrize("cache", ["static", "holds tokens"])
def test_law_3_packing_over_a_cache_raises(cache):
    model, batch = make("llama"), packed_row("llama")
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with packattn.patch(model), torch.no_grad():
        if cache == "static":
            given = StaticCache(config=model.config, max_cache_len=64)
        else:
            given = DynamicCache(config=model.config)
            model(input_ids=IDS[:1], past_key_values=given)
        with pytest.raises(ValueError, match="position_ids restart in a forward over a cache"):
            model(**inputs, past_key_values=given)
        # An empty cache that grows holds nothing yet: the row is packed.
        with_cache = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
        assert_close(with_cache, model(**inputs).logits)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_law_3_a_cache_filled_by_a_packed_forward_cannot_be_continued(given, compiled):
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    one_more = torch.tensor([[5]])
    with packattn.patch(model), torch.no_grad():
        call = torch.compile(model, backend="eager") if compiled else model
        extra = {"past_key_values": DynamicCache(config=model.config)} if given else {"use_cache": True}
        cache = call(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **extra).past_key_values
        # Values are read on the host in eager mode, and asserted in a graph.
        with pytest.raises(RuntimeError if compiled else ValueError, match="the cache comes from a packed forward"):
            call(input_ids=one_more, past_key_values=cache)
        whole = call(input_ids=batch["input_ids"], use_cache=True).past_key_values
        found = call(input_ids=one_more, past_key_values=whole).logits
        assert_close(found, model(input_ids=torch.cat([batch["input_ids"], one_more], 1)).logits[:, -1:])


def small(name):
    if name == "bloom":
        return AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[name])).eval()
    return make(name)


@pytest.mark.parametrize("of", ["model", "base_model"])
@pytest.mark.parametrize("name", ["llama", "bert", "bamba", "mamba", "bloom"])
def test_law_1_a_forward_past_the_hooks_goes_through_them(name, of):
    model, batch = small(name), packed_row(name)
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    part = model if of == "model" else model.base_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        with torch.no_grad(), packattn.patch(model):
            expected, found = part(**given)[0], part.forward(**given)[0]
            assert torch.equal(found, expected)
            assert RUNNING.get() is None
    assert "forward" not in vars(part)


@pytest.mark.parametrize("name", ["llama", "bert", "bamba", "mamba", "bloom"])
def test_law_3_a_compiled_forward_past_the_hooks_raises(name):
    torch._dynamo.reset()
    model = small(name)
    batch = packed_row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    spans = name in ("llama", "bert")  # as one graph: where a graph breaks, the rest runs through the hooks
    forward = torch.compile(model.base_model.forward, backend="eager", fullgraph=spans)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"runs past the hooks of packattn\.patch"):
        forward(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_law_3_a_compiled_forward_that_would_lose_its_positions_raises(name):
    # The heads of these models do not hand position_ids on: only the hooks do.
    torch._dynamo.reset()
    model, batch = small(name), packed_row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        forward(input_ids=batch["input_ids"])
        with pytest.raises(RuntimeError, match=r"runs past the hooks of packattn\.patch"):
            forward(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


def test_law_3_a_compiled_forward_past_the_hooks_over_a_static_cache_raises():
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with packattn.patch(model), torch.no_grad():
        forward = torch.compile(model.model.forward, backend="eager")
        with pytest.raises(RuntimeError, match="position_ids restart in a forward over a cache"):
            forward(**given, past_key_values=StaticCache(config=model.config, max_cache_len=64))


@pytest.mark.parametrize("name", ["roberta", "ibert", "nystromformer", "bert"])
def test_positions_begin_where_they_do_whether_the_weights_are_here_or_not(name):
    from packattn.hf.plan import make_plan
    from packattn.hf.probe import first_position

    def begins():
        model = AutoModelForMaskedLM.from_config(shrink(CONFIG_MAPPING[name]))
        return first_position(make_plan(model).builders[-1][1])

    with torch.device("meta"):
        elsewhere = begins()
    assert elsewhere == begins() == (0 if name == "bert" else 2)


def test_law_3_positions_below_the_first_of_the_model_raise():
    model, batch = make("roberta"), packed_row("llama")
    with packattn.patch(model), pytest.raises(ValueError, match=r"PackingCollator\(start_position=2\)"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


def test_law_3_recomputing_a_mixer_without_its_boundaries_raises():
    model, batch = make("bamba"), packed_row("bamba")
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    with packattn.patch(model, trusted=[type(layer)]):
        loss = model(**batch).loss
        with pytest.raises(RuntimeError, match="recomputed in the backward pass without the boundaries"):
            loss.backward()


def plain_attention(self, hidden_states, *args, **others):
    """What a library with kernels of its own puts in the place of a class's forward: causal over the whole row."""
    q, k, v = (
        p(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def test_law_3_a_class_patched_by_another_library_afterwards_is_named(monkeypatch):
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model):
        model(**batch)
        monkeypatch.setattr(LlamaAttention, "forward", plain_attention)
        with pytest.raises(
            RuntimeError, match=r"layers\.0\.self_attn \(.*with the forward test_hf_guard\.plain_attention\).*changed"
        ):
            model(**batch)


def test_law_3_an_encoder_layer_patched_afterwards_is_named(monkeypatch):
    model, batch = make("bert"), packed_row("bert")
    with packattn.patch(model):
        monkeypatch.setattr(BertSelfAttention, "forward", lambda self, hidden_states, *a, **o: (hidden_states, None))
        with pytest.raises(RuntimeError, match=r"layer\.0\.attention\.self \(.*<lambda>\)"):
            model(**batch)


def test_law_3_a_forward_of_one_layer_replaced_afterwards_is_named():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model):
        layer = model.model.layers[1].self_attn
        layer.forward = plain_attention.__get__(layer)
        with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn \(.*plain_attention\): changed or put"):
            model(**batch)


def test_law_3_a_layer_taken_out_afterwards_is_named():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model):
        model.model.layers[1].self_attn = Bypass(copy.deepcopy(model.model.layers[1].self_attn))
        with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn \(test_hf_guard\.Bypass\).*: changed or put"):
            model(**batch)


def test_law_3_sequences_numbered_in_the_attention_mask_raise():
    model, batch = make("llama"), packed_row("llama", [7, 5])
    numbered = torch.tensor([[1] * 7 + [2] * 5])
    with packattn.patch(model), pytest.raises(ValueError, match="attention_mask holds values other than 0 and 1"):
        model(input_ids=batch["input_ids"], attention_mask=numbered)


def test_law_3_dynamic_quantization_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(make("llama"), {torch.nn.Linear})
    with pytest.raises(packattn.UnsupportedModelError, match="by the range of all tokens of a batch"):
        packattn.patch(model)


def assert_exact_by_rows(model, batch, why):
    with torch.no_grad():
        expected = alone(model, batch)
        with pytest.warns(UserWarning, match=why):
            patch = packattn.patch(model)
        with patch:
            assert patch.how == "rows"
            assert_close(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)


def test_law_3_a_class_patched_before_is_seen_by_the_patch(monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", plain_attention)
    model, batch = make("llama"), packed_row("llama")
    assert_exact_by_rows(model, batch, "does not know .*LlamaAttention with the forward test_hf_guard.plain_attention")


@pytest.mark.parametrize("compiled", [False, True])
def test_law_3_an_encoder_that_is_told_to_be_causal_raises(compiled):
    # SDPA of transformers would take it up, its eager attention would not.
    torch._dynamo.reset()
    model, batch = make("bert"), packed_row("bert")
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with packattn.patch(model), torch.no_grad():
        call = torch.compile(model, backend="eager") if compiled else model
        with pytest.raises(NotImplementedError, match="is_causal=True: of BertModel, which looks both ways"):
            call(**inputs, is_causal=True)
        assert_close(call(**inputs, is_causal=False).logits, model(**inputs).logits)


def test_law_1_a_decoder_that_is_told_to_look_both_ways():
    model, batch = make("llama"), packed_row("llama")
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        rows = [model(input_ids=batch["input_ids"][:, s], is_causal=False, use_cache=False).logits for s in spans()]
        with packattn.patch(model):
            assert_close(model(**inputs, is_causal=False).logits, torch.cat(rows, 1))


class Bypass(torch.nn.Module):
    """A layer of another name that mixes along the row and uses no interface."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **others):
        return plain_attention(self.inner, hidden_states)


def test_law_3_a_layer_that_is_not_known_never_sees_a_packed_row():
    model, batch = make("llama"), packed_row("llama")
    layer = model.model.layers[1]
    layer.self_attn = Bypass(layer.self_attn)
    assert_exact_by_rows(
        model, batch, r"does not know test_hf_guard\.Bypass\..* vouch for them: packattn\.patch\(model, trusted="
    )


@pytest.mark.parametrize("fullgraph", [True, False])
def test_law_3_a_compiled_model_is_checked_when_it_is_traced(fullgraph, monkeypatch):
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with packattn.patch(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
        assert_close(compiled(**inputs).logits, model(**inputs).logits)
        monkeypatch.setattr(LlamaAttention, "forward", plain_attention)
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn"):
            compiled(**inputs)


def test_law_3_a_model_loaded_with_the_name_but_not_patched_raises():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        attn_implementation="packattn",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"runs past the hooks of packattn\.patch"):
        LlamaForCausalLM(config)(input_ids=IDS)


def test_a_model_that_computes_attention_itself_says_how_it_runs():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING["bloom"])).eval()
    with pytest.warns(UserWarning, match=r"once for every length in the batch, .*BloomAttention computes attention"):
        patch = packattn.patch(model)
    with patch:
        assert patch.how == "rows"
        assert "a run of\n  all layers for every length in the batch" in repr(patch)
        assert "BloomAttention computes attention itself" in repr(patch)


@pytest.mark.parametrize("name", ["llama", "bamba", "roberta"])
def test_positions_of_a_dtype_in_which_they_wrap_around_are_refused(name):
    model, batch = make(name), packed_row(name)
    with packattn.patch(model):
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
            with pytest.raises(TypeError, match=f"position_ids must be int32 or int64, got {dtype}"):
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"].to(dtype))
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        with torch.no_grad():
            expected = model(**inputs).logits
            assert_close(model(**inputs | {"position_ids": batch["position_ids"].int()}).logits, expected)
