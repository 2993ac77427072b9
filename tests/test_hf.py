"""patch on tiny models of many families: packed equals alone in every call style, and everything can be undone."""

import threading

import pytest
import torch
from tiny_models import (
    LENGTHS,
    MODELS,
    REFUSED,
    SMALL,
    VOCABULARY,
    alone,
    assert_close,
    make,
    packed_row,
    spans,
    start_position,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PersimmonConfig, PersimmonForCausalLM

import packattn
from packattn import PackedMask, UnsupportedMaskError, UnsupportedModelError
from packattn.hf import masks
from packattn.hf.attention import attention_forward

every_model = pytest.mark.parametrize("name", MODELS)
STYLES = {
    "default": lambda ids: {},
    "no cache": lambda ids: {"use_cache": False},
    "all-ones mask": lambda ids: {"attention_mask": torch.ones_like(ids)},
}


def state(model):
    return (
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        [len(m._forward_pre_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("style", STYLES)
@every_model
def test_law_1_packed_equals_alone_in_every_call_style(name, style):
    model, batch = make(name), packed_row(name)
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            packed = model(**inputs, **STYLES[style](batch["input_ids"])).logits
    assert_close(packed, expected)


@every_model
def test_loss_and_gradients_equal_those_of_the_examples_alone(name):
    model, batch = make(name), packed_row(name)
    causal = "labels" in batch and name not in ("bert", "roberta", "modernbert")
    logits = alone(model, batch)
    labels = batch["labels"]
    if causal:
        pairs = [(logits[:, s][:, :-1], labels[:, s][:, 1:]) for s in spans() if s.stop - s.start > 1]
    else:
        pairs = [(logits[:, s], labels[:, s]) for s in spans()]
    predictions, targets = (torch.cat([p[i] for p in pairs], 1) for i in range(2))
    loss = torch.nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with packattn.patch(model):
        packed = model(**batch).loss
        found = torch.autograd.grad(packed, list(model.parameters()), allow_unused=True)
    assert_close(packed, loss)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)


@every_model
def test_several_rows_and_padding(name):
    model = make(name)
    first, second = packed_row(name), packed_row(name, [20, 11], seed=1)
    n, real = first["input_ids"].shape[1], 31
    ids, position_ids = torch.zeros(2, 2, n, dtype=torch.long)
    position_ids += start_position(name)
    mask = torch.zeros(2, n, dtype=torch.long)
    ids[0], position_ids[0], mask[0] = first["input_ids"][0], first["position_ids"][0], 1
    for tail in (slice(0, real), slice(n - real, n)):  # padded on the right, then on the left
        ids[1], position_ids[1], mask[1] = 0, start_position(name), 0
        ids[1, tail], position_ids[1, tail], mask[1, tail] = second["input_ids"][0], second["position_ids"][0], 1
        with torch.no_grad():
            expected = alone(model, first), alone(model, second, [20, 11])
            with packattn.patch(model):
                logits = model(input_ids=ids, position_ids=position_ids, attention_mask=mask).logits
        assert_close(logits[:1], expected[0])
        assert_close(logits[1:, tail], expected[1])
        assert torch.isfinite(logits).all()


def leak(model, batch, **options):
    """How much the others' logits move when the second sequence's tokens change, and their gradient there."""
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"} | options
        before = model(**inputs).logits
        changed = inputs["input_ids"].clone()
        changed[:, spans()[1]] = (changed[:, spans()[1]] + 1) % VOCABULARY
        moved = (model(**inputs | {"input_ids": changed}).logits - before).abs()
    return torch.cat([moved[:, s] for i, s in enumerate(spans()) if i != 1], 1).max().item()


@every_model
def test_law_2_no_leak_where_plain_transformers_leaks(name):
    model, batch = make(name), packed_row(name)
    ones = torch.ones_like(batch["input_ids"])
    assert leak(model, batch, attention_mask=ones) > 0
    with packattn.patch(model):
        # Experts multiply as many rows as the router sends them, so another sequence may move a rounding there.
        allowed = 1e-6 if name in ("gpt_oss", "llama4") else 0
        assert leak(model, batch) <= allowed
        assert leak(model, batch, attention_mask=ones) <= allowed


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "bert"])
def test_gradient_checkpointing(name, use_reentrant):
    model, batch = make(name), packed_row(name)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with packattn.patch(model):
        expected = torch.autograd.grad(model(**batch).loss, model.get_input_embeddings().weight)[0]
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        model(**batch).loss.backward()
    assert_close(model.get_input_embeddings().weight.grad, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert"])
def test_bfloat16_autocast(name):
    # q and k arrive in float32 there, v in bfloat16.
    model, batch = make(name), packed_row(name)
    with torch.no_grad():
        expected = alone(model, batch)
    with packattn.patch(model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert leak(model, batch) <= (1e-2 if name == "gpt_oss" else 0)
        logits = model(**batch).logits
        torch.autograd.grad(logits.float().sum(), model.get_input_embeddings().weight)
    assert (logits.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_dropout_in_training_keeps_sequences_apart():
    model, batch = make("bert"), packed_row("bert")
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with packattn.patch(model):
        model.train()
        logits = model(inputs_embeds=embeddings, position_ids=batch["position_ids"]).logits
        (gradient,) = torch.autograd.grad(logits[:, spans()[1]].square().sum(), embeddings)
    gradient[:, spans()[1]] = 0
    assert gradient.abs().max() == 0


def test_backward_in_another_thread():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model):
        weight = model.get_input_embeddings().weight
        expected = torch.autograd.grad(model(**batch).loss, weight)[0]
        loss = model(**batch).loss
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(
            pytest.param(
                windowed,
                marks=pytest.mark.skipif(
                    torch.__version__ < "2.14", reason="the compiler of older torch cannot read the closure of a window"
                ),
            )
            for windowed in ("mistral", "gemma3")
        ),
    ],
)
def test_law_4_one_compiled_graph_serves_every_packing(name):
    torch._dynamo.reset()
    model, graphs = make(name), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with packattn.patch(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=count)
        for lengths in ([7, 19, 14], [40], [1] * 40):
            batch = packed_row(name, lengths)
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert len(graphs) == 1


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA has no fake GPU either")
def test_law_4_the_forward_runs_on_a_fake_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = MODELS["gemma3"]()
        packattn.patch(model)
        ids = torch.zeros(2, 40, dtype=torch.long)
        logits = model(input_ids=ids, position_ids=ids, attention_mask=ids).logits
    assert (logits.device.type, tuple(logits.shape)) == ("cuda", (2, 40, VOCABULARY))


@every_model
def test_everything_is_restored(name):
    model, batch = make(name), packed_row(name)
    before = state(model)
    patch = packattn.patch(model)
    assert state(model) != before
    assert "packed_attention" in repr(patch)
    patch.remove()
    patch.remove()
    assert state(model) == before
    assert "removed" in repr(patch)
    with pytest.raises(KeyError, match="of the user"), packattn.patch(model):
        raise KeyError("of the user")
    assert state(model) == before
    with packattn.patch(model), pytest.raises(ValueError, match=r"patched already; call \.remove"):
        packattn.patch(model)
    with pytest.raises(ValueError, match="position_ids"), packattn.patch(model):
        model(**batch | {"position_ids": batch["position_ids"][:, :-1]})
    assert state(model) == before


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4"])
def test_generate_is_unchanged(name, cache):
    model = make(name)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left-padded
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    options |= {"cache_implementation": cache, "disable_compile": True}
    expected = model.generate(ids, **options)
    with packattn.patch(model):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_law_3_what_cannot_be_isolated_is_refused_untouched(name):
    make_model, reason = REFUSED[name]
    model = make_model()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        packattn.patch(model)
    assert state(model) == before


def test_only_models_are_patched():
    with pytest.raises(TypeError, match=r"transformers PreTrainedModel, got Linear"):
        packattn.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module that holds a transformers model, got str"):
        packattn.patch("llama")


IDS = torch.ones(2, 6, dtype=torch.long)
BAD = [
    ({"input_ids": IDS[:0]}, ValueError, "input_ids must hold at least one row"),
    ({"position_ids": IDS.float()}, TypeError, "position_ids must be an integer tensor .*, got torch.float32"),
    ({"position_ids": IDS[:, :5]}, ValueError, r"position_ids must have shape \(rows, n\) = \(2, 6\), .* \(2, 5\)"),
    ({"position_ids": IDS.expand(3, 2, 6)[..., :5]}, ValueError, r"position_ids must have shape .* got \(3, 2, 5\)"),
    (
        {"position_ids": IDS.cumsum(1), "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)},
        ValueError,
        "begin other sequences than position_ids",
    ),
    ({"position_ids": IDS.to("meta")}, ValueError, "position_ids must be on the device of the input, cpu, got meta"),
    ({"attention_mask": IDS[:, :4]}, ValueError, r"attention_mask must have shape .* got \(2, 4\)"),
    ({"attention_mask": IDS.float()}, TypeError, "attention_mask must be an integer tensor"),
    ({"attention_mask": torch.ones(2, 1, 6, 6).bool()}, ValueError, "is dense, but a patched model makes its mask"),
    ({"attention_mask": torch.zeros(2, 1, 6, 6)}, ValueError, "is dense, but a patched model makes its mask"),
    ({"posiiton_ids": IDS}, NotImplementedError, "passes posiiton_ids .* If it came with the call, leave it out"),
    (
        {"attention_mask": torch.ones(2, 2, 6, dtype=torch.int32)},
        ValueError,
        r"attention_mask must have shape .* 2, 6\)",
    ),
    (
        {"attention_mask": {"full_attention": IDS}},
        ValueError,
        "attention_mask is a dict of masks that were made before",
    ),
    ({"cu_seq_lens_q": torch.tensor([0, 6, 13])}, RuntimeError, "cu_seqlens must rise from 0 to tokens=12"),
    ({"cu_seq_lens_q": [0, 6, 12]}, TypeError, "cu_seq_lens_q must be an integer tensor, got list"),
    ({"seq_idx": IDS[0]}, ValueError, r"seq_idx must have shape \(rows, n\) = \(2, 6\), got \(6,\)"),
    ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)}, ValueError, "attention_mask has a hole"),
    ({"output_attentions": True}, NotImplementedError, "output_attentions=True: packattn never forms"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_law_10_bad_input_is_named(change, error, message):
    model = make("llama")
    with packattn.patch(model), pytest.raises(error, match=message):
        model(**{"input_ids": IDS} | change)


@pytest.mark.parametrize("name", ["llama", "persimmon", "bert"])
def test_law_10_attention_weights_are_refused_however_asked_for(name):
    # Persimmon's layers keep the keyword from the attention function.
    made = {"persimmon": lambda: PersimmonForCausalLM(PersimmonConfig(**SMALL)).eval()}
    model = made[name]() if name in made else make(name)
    with packattn.patch(model):
        with pytest.raises(NotImplementedError, match="output_attentions=True"):
            model(input_ids=IDS, output_attentions=True)
        model.config._output_attentions = True
        with pytest.raises(NotImplementedError, match="output_attentions=True"):
            model(input_ids=IDS)


def test_law_3_unknown_masks_and_arguments_are_refused():
    carried = masks.carry(torch.arange(4)[None], None, 1)

    def leftmost(batch, head, query, key):
        return key <= query

    with pytest.raises(UnsupportedMaskError, match="leftmost"):
        masks.packed_mask(q_length=4, mask_function=leftmost, attention_mask=carried)
    either = masks.masking_utils.or_masks(masks.masking_utils.causal_mask_function, leftmost)
    with pytest.raises(UnsupportedMaskError, match="or_masks"):
        masks.packed_mask(q_length=4, mask_function=either, attention_mask=carried)
    q, mask, layer = torch.zeros(1, 2, 4, 16), PackedMask.causal(lengths=[4]), torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="Identity passes position_bias to attention"):
        attention_forward(layer, q, q, q, mask, position_bias=q)
    with pytest.raises(RuntimeError, match="Identity got no packattn mask"):
        attention_forward(layer, q, q, q, None)


@every_model
def test_verify_tells_the_leak_and_its_end(name):
    model = make(name)
    options = {"lengths": LENGTHS, "start_position": start_position(name)}
    plain = packattn.verify(model, **options)
    assert not plain.isolated
    assert not plain.ok
    assert "LEAKS" in str(plain)
    assert "NOT ISOLATED" in str(plain)
    model.train()
    with packattn.patch(model):
        report = packattn.verify(model, **options)
    assert report.ok, str(report)
    assert "isolated and exact" in str(report)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_verify_refuses_bad_arguments():
    with pytest.raises(TypeError, match="transformers PreTrainedModel"):
        packattn.verify(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two or more"):
        packattn.verify(make("llama"), lengths=[5])


def test_two_forwards_before_their_backwards_keep_their_boundaries_in_checkpoints():
    model = make("bamba").train()
    batches = [packed_row("bamba"), packed_row("bamba", [20, 11, 9], seed=1)]
    with packattn.patch(model):
        expected = [torch.autograd.grad(model(**b).loss, model.get_input_embeddings().weight)[0] for b in batches]
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(**b).loss for b in batches]
        for loss in losses:
            loss.backward()
    assert_close(model.get_input_embeddings().weight.grad, sum(expected))


@pytest.mark.parametrize("name", ["bamba", "mamba"])
def test_hybrids_generate_as_before(name):
    model = make(name)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    with packattn.patch(model):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.skipif(not hasattr(masks.masking_utils, "blockwise_overlay"), reason="this transformers has no blocks")
def test_law_3_image_blocks_are_spans_in_both_forms():
    ids = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    build = masks.masking_utils
    causal, block = build.causal_mask_function, build.blockwise_overlay(ids)
    sequence = torch.tensor([0] * 6 + [1] * 4)
    i, j = torch.arange(10)[:, None], torch.arange(10)
    same, blocks = sequence[:, None] == sequence, (ids[0][:, None] == ids[0]) & (ids[0][:, None] >= 0)
    window = j > i - 2
    cases = {
        "blocks": (build.or_masks(causal, block), (j <= i) | blocks),
        "cut by the window": (
            build.and_masks(build.or_masks(causal, block), build.sliding_window_overlay(2)),
            ((j <= i) | blocks) & window,
        ),
        "whole": (
            build.or_masks(build.and_masks(build.sliding_window_overlay(2), causal), block),
            ((j <= i) & window) | blocks,
        ),
    }
    for name, (function, expected) in cases.items():
        carried = masks.carry(positions, None, 1)
        found = masks.packed_mask(q_length=10, mask_function=function, attention_mask=carried).to_dense()
        assert torch.equal(found, expected & same), name


def test_every_kind_of_mask_gets_the_launch_order_of_its_tiles(monkeypatch):
    asked = []
    monkeypatch.setattr(masks, "schedule", lambda mask, **shape: asked.append(shape) or mask)
    model = make("gemma3")
    packattn.patch(model)
    asked.clear()  # a patch may try the model out
    config = model.config.get_text_config()
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed_row("gemma3"))
    heads = {"heads_q": config.num_attention_heads, "heads_k": config.num_key_value_heads, "head_dim": config.head_dim}
    assert asked == [heads | {"dtype": torch.bfloat16}] * 2  # full and sliding
