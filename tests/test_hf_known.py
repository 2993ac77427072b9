"""A closed world: a model runs on packed rows because its parts are known, and what is not known never sees one."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import LENGTHS, SMALL, alone, assert_close, make, one_thread, packed_row, spans  # noqa: F401
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaMLP

import packattn
from packattn.hf import known
from packattn.hf.tiny import load

CONFIG = LlamaConfig(**SMALL, initializer_range=0.2)


def given(batch):
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}


def of_kind(kind):
    torch.manual_seed(0)
    return kind(copy.deepcopy(CONFIG)).eval()


def patch(model, **options):
    """Patched, and what the patch warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = packattn.patch(model, **options)
    return made, " ".join(str(w.message) for w in caught)


class Mixer(nn.Module):
    """Mixes along the row in a way that no name tells; records what it saw."""

    def __init__(self, size, zero=False):
        super().__init__()
        self.proj, self.seen = nn.Linear(size, size), []
        if zero:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, hidden_states, *args, **kwargs):
        self.seen.append(tuple(hidden_states.shape[:2]))
        return self.proj(hidden_states.cumsum(1))


class Attention(Mixer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states), None


class OwnLM(PreTrainedModel):
    """A causal language model of one's own, in one class."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.mix = nn.Embedding(config.vocab_size, 64), Mixer(64)
        self.head = nn.Linear(64, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None):
        logits = self.head(self.mix(self.embed(input_ids)))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def put(where):
    """A Llama with an unknown layer somewhere, and that layer."""
    if where == "own model":
        model = of_kind(OwnLM)
        return model, model.mix
    model = make("llama")
    layer, mixer = model.model.layers[1], Attention(64) if where == "attention" else Mixer(64, zero=where == "zero")
    if where == "attention":
        layer.self_attn = mixer
    elif where == "activation":
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, mixer)
    elif where == "head":
        model.lm_head = nn.Sequential(mixer, model.lm_head)
    else:
        layer.mlp = nn.Sequential(layer.mlp, mixer)
    return model, mixer


@pytest.mark.parametrize("where", ["own model", "attention", "activation", "head", "zero"])
def test_law_3_an_unknown_module_never_sees_a_packed_row(where):
    model, mixer = put(where)
    batch = packed_row("llama")
    with torch.no_grad():
        expected = alone(model, batch)
        made, said = patch(model)
        assert made.how == "rows"
        assert type(mixer).__qualname__ in said or where == "own model"
        assert "packattn.patch(model, trusted=[...])" in said
        mixer.seen.clear()
        assert_close(model(**given(batch)).logits, expected)
        assert sorted(mixer.seen) == sorted((1, n) for n in LENGTHS)


def test_law_3_what_mixes_over_the_batch_runs_one_sequence_at_a_time():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(64)

        def forward(self, x):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    model, lengths = make("llama"), [6, 6, 6]
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Normed())
    batch = packed_row("llama", lengths)
    model.train()
    rows = [model(input_ids=batch["input_ids"][:, s]).logits for s in spans(lengths)]
    patch(model)
    assert_close(model(**given(batch)).logits, torch.cat(rows, 1))


def test_what_a_user_vouches_for_runs_on_packed_rows():
    class Scale(nn.Module):
        def forward(self, x):
            return x * 2

    class Own(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, batch = of_kind(Own), packed_row("llama")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Scale())
    with torch.no_grad():
        expected = alone(model, batch)
        made, said = patch(model, trusted=[Scale, Own])
        assert made.how == "spans"
        assert not said
        assert_close(model(**given(batch)).logits, expected)
    with pytest.raises(ValueError, match="labels have the last token of a sequence predict"):
        model(**given(batch), labels=batch["input_ids"])
    with pytest.raises(TypeError, match=r"trusted must be a list of classes, such as \[MyLayer\]"):
        packattn.patch(make("llama"), trusted=["Scale"])


def test_the_probe_compares_what_is_vouched_for_with_its_sequences_alone():
    class Counts(nn.Module):
        """Takes the index in the row for the position."""

        def forward(self, x):
            return x * (1 + torch.arange(x.shape[1])[:, None])

    model, batch = make("llama"), packed_row("llama")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Counts())
    with torch.no_grad():
        expected = alone(model, batch)
        _, said = patch(model, trusted=[Counts])
        assert "in a forward of short sequences, packed logits differ by" in said
        assert_close(model(**given(batch)).logits, expected)


def test_a_class_that_inherits_its_forward_is_the_one_it_inherits_from():
    class Own(LlamaForCausalLM):
        pass

    class OwnNamed(LlamaForCausalLM):
        def get_input_embeddings(self):
            return super().get_input_embeddings()

    class OwnNorm(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            del self.act_fn
            self.act_fn = lambda x: x.cumsum(1)

    assert packattn.patch(of_kind(Own)).how == "spans"
    assert packattn.patch(of_kind(OwnNamed)).how == "spans"
    model, batch = of_kind(Own), packed_row("llama")
    packattn.patch(model)
    with pytest.raises(ValueError, match="labels have the last token of a sequence predict"):
        model(**given(batch), labels=batch["input_ids"])
    model = make("llama")
    model.model.layers[0].mlp = OwnNorm(CONFIG)
    made, said = patch(model)
    assert made.how == "rows"
    assert "OwnNorm with act_fn of its own" in said


def test_a_class_that_changes_what_its_forward_reaches_is_not_known():
    bert = transformers.models.nystromformer.modeling_nystromformer
    kind = next(k for k in vars(bert).values() if isinstance(k, type) and hasattr(k, "feed_forward_chunk"))

    class Own(kind):
        def feed_forward_chunk(self, attention_output):
            return super().feed_forward_chunk(attention_output.cumsum(1))

    with torch.device("meta"):
        layer = Own(transformers.NystromformerConfig())
        assert known.part_of(kind(transformers.NystromformerConfig())) is not None
    assert known.part_of(layer) is None
    assert known.describe(layer).endswith("with feed_forward_chunk of its own")


class Reward(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model, self.v_head = LlamaModel(config), nn.Linear(64, 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs).last_hidden_state
        return self.v_head(hidden[:, -1])


@pytest.mark.parametrize("lengths", [[5, 9, 3], [2, 2, 2], [1, 1, 1]])
def test_an_unknown_head_gives_one_result_a_sequence(lengths):
    model, batch = of_kind(Reward), packed_row("llama", lengths)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=batch["input_ids"][:, s]) for s in spans(lengths)])
        patch(model)
        assert_close(model(**given(batch)), expected)
        with pytest.raises(NotImplementedError, match=r"labels: packattn does not know .*Reward"):
            model(**given(batch), labels=torch.zeros(1, sum(lengths)))


def test_law_3_an_unknown_head_whose_results_cannot_be_put_back_is_refused():
    class Pairs(Reward):
        def forward(self, input_ids=None, position_ids=None):
            hidden = self.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
            return hidden @ hidden.mT

    model = of_kind(Pairs)
    with pytest.raises(packattn.UnsupportedModelError, match=r"holds neither one value per token nor one per sequence"):
        patch(model)


def test_law_3_an_unknown_module_around_a_model_is_refused():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make("llama")

        def forward(self, **inputs):
            return self.model(**inputs).logits.mean(1)

    with pytest.raises(packattn.UnsupportedModelError, match=r"Around, which stands around the model"):
        packattn.patch(Around())
    assert packattn.patch(Around(), trusted=[Around]).how == "spans"


def put_a_gru(model):
    layer = model.model.layers[1].mlp
    layer.act_fn = nn.GRU(96, 96, batch_first=True)


def quantize(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


class Quantized(torch.Tensor):
    """As torchao has them: a weight that computes in a way of its own."""


def convert(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (put_a_gru, r"act_fn \(.*GRU\)"),
        (quantize, "quantized.dynamic"),
        (convert, r"up_proj \(.*weights of .*Quantized"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_law_3_what_is_put_into_a_model_after_the_patch_raises(change, name, compiled):
    torch._dynamo.reset()
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model), torch.no_grad():
        call = torch.compile(model, backend="eager") if compiled else model
        call(**given(batch))
        change(model)
        with pytest.raises(RuntimeError, match=rf"{name}.*changed or put into the model after packattn\.patch"):
            call(**given(batch))


def test_weights_of_another_library_are_not_known_before_the_patch_either():
    model = make("llama")
    convert(model)
    made, said = patch(model)
    assert made.how == "rows"
    assert "Linear with weights of test_hf_known.Quantized" in said
    made.remove()
    assert packattn.patch(model, trusted=[Quantized]).how == "spans"


def test_peft_one_adapter_for_each_row_raises():
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    model, batch = make("llama"), packed_row("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    packattn.patch(adapted)
    with pytest.raises(NotImplementedError, match="adapter_names: PEFT takes one adapter for each row"):
        adapted(**given(batch), adapter_names=["default"])


def test_peft_adapters_that_route_by_all_tokens_run_one_sequence_at_a_time():
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    if not hasattr(peft, "LilyConfig"):
        pytest.skip("this PEFT has no adapter of the kind")
    adapted = peft.get_peft_model(make("llama"), peft.LilyConfig(target_modules=["q_proj"])).eval()
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    batch = packed_row("llama", [5, 9, 5])
    with torch.no_grad():
        expected = alone(adapted, batch, [5, 9, 5])
        made, _ = patch(adapted)
        assert made.how == "rows"
        assert_close(adapted(**given(batch)).logits, expected)


def test_a_model_whose_weights_are_elsewhere_is_probed_in_its_first_forward():
    accelerate = pytest.importorskip("accelerate")

    class Shift(nn.Module):
        def forward(self, x):
            return x + x.roll(1, 1)

    for trusted in (False, True):
        model, batch = make("llama"), packed_row("llama")
        if trusted:
            model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Shift())
        with torch.no_grad():
            expected = alone(model, batch)
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            made, _ = patch(model, trusted=[Shift])
            assert "not probed: its weights are not here" in repr(made)
            if trusted:
                with pytest.raises(
                    RuntimeError, match=r"moved by .* with the tokens of another\. The weights were not"
                ):
                    model(**given(batch))
            else:
                assert_close(model(**given(batch)).logits, expected)
                assert "not probed" not in repr(made)


def test_labels_of_the_second_sequence_are_seen_behind_padding():
    model = make("llama")
    ids = torch.randint(3, 90, (1, 8))
    real = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 0, 1, 0]])
    call = {"input_ids": ids, "position_ids": positions, "attention_mask": real}
    labels = ids.where(real == 1, -100)
    with packattn.patch(model):
        with pytest.raises(ValueError, match="labels have the last token of a sequence predict"):
            model(**call, labels=labels)
        model(**call, labels=labels.index_fill(1, torch.tensor(5), -100))
        left = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
        model(input_ids=ids, attention_mask=left, labels=ids.where(left == 1, -100))


def test_every_class_of_the_table_is_as_it_was_proven():
    table = json.loads(known.resources.files("packattn.hf").joinpath("known.json").read_text())
    assert table["transformers"] == transformers.__version__ or pytest.skip("the table is of another transformers")
    for name in ("llama", "bert", "bamba", "gpt_oss", "gemma3_text"):
        for module in load(name).modules():
            part, function = known.part_of(module), known.forward_of(module)
            assert part is not None, name
            assert not part.source or part.source == known.hash_of(function), function


def test_a_class_that_changed_in_a_newer_transformers_is_named(monkeypatch):
    monkeypatch.setattr(known.transformers, "__version__", "99.0")
    assert patch(make("llama"))[1] == ""
    name = "transformers.models.llama.modeling_llama.LlamaMLP"
    monkeypatch.setitem(known.table(), name, known.Part("tokens", "00000000"))
    made, said = patch(make("llama"))
    assert made.how == "spans"
    assert "LlamaMLP of LlamaForCausalLM changed since: a small forward found packed sequences isolated" in said
