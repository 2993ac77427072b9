"""Tiny random models of many families, with windows and chunks shorter than the sequences of the tests."""

import pytest
import torch
import transformers
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

transformers.logging.set_verbosity_error()

LENGTHS = [7, 19, 1, 13]
VOCABULARY = 99
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=5)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, sliding_window=5)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_GROUPED, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**_GROUPED, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_ROPE)
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **_GROUPED,
            intermediate_size_mlp=96,
            attention_chunk_size=6,
            attn_temperature_tuning=False,
            num_local_experts=2,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL | {"pad_token_id": 1})),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SMALL, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    ),
}

REFUSED = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
        ),
        "attends across two sequences",
    ),
}

_STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
# Layers that mix along the row beside attention, or in its place: they run on one row per sequence.
HYBRIDS = {
    "bamba": lambda: BambaForCausalLM(BambaConfig(**_GROUPED, **_STATE, attn_layer_indices=[1])),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """For models so small, or machines so busy, that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name):
    """The model, with the same weights every time, in eval mode, in transformers' eager attention."""
    torch.manual_seed(0)
    model = (MODELS | HYBRIDS)[name]().eval()
    model.set_attn_implementation("eager")
    return model


def start_position(name):
    return 2 if name == "roberta" else 0


def assert_close(packed, truth, rtol=5e-5):
    """To a few roundings of float32 through two layers; a leak is five orders larger."""
    torch.testing.assert_close(packed, truth, atol=5e-6, rtol=rtol)


def packed_row(name, lengths=LENGTHS, seed=0):
    """input_ids, position_ids, labels of one packed row; no label of a first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(n) + start_position(name) for n in lengths])[None]
    labels = ids.masked_fill(position_ids == start_position(name), -100)
    return {"input_ids": ids, "position_ids": position_ids, "labels": labels}


def spans(lengths=LENGTHS):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def alone(model, batch, lengths=LENGTHS):
    """Logits of every sequence of a packed row run by itself through a plain model, end to end."""
    rows = [
        model(input_ids=batch["input_ids"][:, span], position_ids=batch["position_ids"][:, span]).logits
        for span in spans(lengths)
    ]
    return torch.cat(rows, 1)
