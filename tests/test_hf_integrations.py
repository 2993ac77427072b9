"""A patched model in the hands of other libraries: each the real one, each against the examples run alone."""

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import on_ranks
from tiny_models import VOCABULARY, alone, make, packed_row
from torch import nn

import packattn
import packattn.hf  # registers attn_implementation="packattn"

assert_close = partial(tiny_models.assert_close, rtol=1e-4)
ROOT = Path(__file__).parent.parent
LENGTHS = [9, 4, 14, 6, 11, 3, 8, 5]


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]


def loss_alone(model, some):
    """Mean over the predicted tokens of the examples run one by one."""
    losses, count = 0.0, 0
    for example in some:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits
        losses = losses + nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    return losses / count


def gradient_alone(model, some):
    return torch.autograd.grad(loss_alone(model, some), list(model.parameters()))


def arguments(folder, **options):
    return {"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0} | options


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_the_steps_of_the_examples_alone(tmp_path, checkpointing):
    from transformers import Trainer, TrainingArguments

    model = make("llama")
    plain = copy.deepcopy(model)
    options = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
    )
    with packattn.patch(model):
        Trainer(
            model,
            TrainingArguments(**options),
            train_dataset=examples(),
            data_collator=packattn.PackingCollator(),
        ).train()
    # One optimiser step over all examples: the mean over all of their predicted tokens.
    for parameter, before, gradient in zip(
        model.parameters(), plain.parameters(), gradient_alone(plain, examples()), strict=True
    ):
        assert_close(parameter, before - 0.1 * gradient)


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_trainer_keeps_the_boundaries_of_packed_rows(name, kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    from transformers import Trainer, TrainingArguments

    model = make(name)  # Mamba's own forward names no position_ids, and Trainer drops columns without a name
    expected = loss_alone(model, examples()).item()
    rows = packattn.pack_dataset(datasets.Dataset.from_list(examples()) if kind == "datasets" else examples(), 64)
    options = arguments(tmp_path, max_steps=1, learning_rate=0.0, logging_steps=1, per_device_train_batch_size=1)
    with packattn.patch(model):
        trainer = Trainer(
            model, TrainingArguments(**options), train_dataset=rows, data_collator=packattn.PackingCollator()
        )
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_trainer_keeps_the_masks_of_targets(tmp_path):
    datasets = pytest.importorskip("datasets")
    from transformers import Trainer, TrainingArguments

    model, ids = make("llama"), examples()[0]["input_ids"]
    mask = [0] * (len(ids) - 2) + [1, 1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -3:-1]
    expected = nn.functional.cross_entropy(logits, torch.tensor(ids[-2:])).item()
    options = arguments(tmp_path, max_steps=1, learning_rate=0.0, logging_steps=1)
    with packattn.patch(model):
        rows = datasets.Dataset.from_list([{"input_ids": ids, "completion_mask": mask}])
        trainer = Trainer(
            model, TrainingArguments(**options), train_dataset=rows, data_collator=packattn.PackingCollator()
        )
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_noise_on_embeddings_is_said_to_be_that_of_the_row(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make("llama")
    with packattn.patch(model):
        options = TrainingArguments(**arguments(tmp_path, neftune_noise_alpha=5, max_steps=1))
        trainer = Trainer(
            model, options, train_dataset=examples(), eval_dataset=examples(), data_collator=packattn.PackingCollator()
        )
        with pytest.warns(UserWarning, match="less of it than alone"):
            trainer.train()


@pytest.mark.parametrize("how", ["packing", "padding_free"])
def test_trl_sft_trainer_gives_the_loss_of_the_unpacked_run(tmp_path, how):
    trl = pytest.importorskip("trl", reason="pip install 'packattn[integrations]'")
    datasets = pytest.importorskip("datasets")
    from transformers import PreTrainedTokenizerFast

    model = make("llama")
    expected = loss_alone(model, examples()).item()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="0", eos_token="2")
    chosen = {"packing": True, "max_length": 64} if how == "packing" else {"padding_free": True, "max_length": None}
    options = trl.SFTConfig(
        **arguments(tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0, logging_steps=1),
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": how == "padding_free"},
        **chosen,
    )
    with packattn.patch(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl advises flash attention for packing
        trainer = trl.SFTTrainer(
            model, args=options, train_dataset=datasets.Dataset.from_list(examples()), processing_class=tokenizer
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=2e-5)


def test_trl_dpo_trainer_says_how_its_reference_model_is_patched(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'packattn[integrations]'")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    make("llama").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="0", eos_token="2")
    pairs = [{"prompt": "5 6", "chosen": "7 8 9", "rejected": "10"}, {"prompt": "5", "chosen": "9", "rejected": "8 8"}]
    options = trl.DPOConfig(**arguments(tmp_path, max_steps=1, logging_steps=1), bf16=False)
    with packattn.patch(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = datasets.Dataset.from_list(pairs)
        trainer = trl.DPOTrainer(model, args=options, train_dataset=data, processing_class=tokenizer)
        with pytest.raises(RuntimeError, match=r"a reference model.*packattn\.patch\(trainer\.ref_model\)"):
            trainer.train()
        packattn.patch(trainer.ref_model)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] == pytest.approx(math.log(2), abs=1e-4)  # of a policy that is its reference still


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_peft_lora(order):
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    model, batch = make("llama"), packed_row("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    expected = alone(plain, batch)
    torch.manual_seed(0)
    if order == "patch first":
        packattn.patch(model)
    adapted = peft.get_peft_model(model, config)
    if order == "adapter first":
        packattn.patch(adapted)
    assert_close(adapted(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)
    adapted(**batch).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_peft_prompt_learning_is_refused():
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    model = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(packattn.UnsupportedModelError, match="prompt learning puts virtual tokens"):
        packattn.patch(model)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_peft_prompt_learning_around_a_patched_model_raises(kind):
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    model, batch = make("llama"), packed_row("llama")
    packattn.patch(model)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    warnings.simplefilter("ignore")  # PEFT says that it drops position_ids
    with pytest.raises(NotImplementedError, match="prompt learning puts virtual tokens"):
        adapted(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_law_3_an_activated_lora_is_refused(order):
    peft = pytest.importorskip("peft", reason="pip install 'packattn[integrations]'")
    model, batch = make("llama"), packed_row("llama")
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=batch["input_ids"][0, 3:5].tolist(),
    )
    message = "begins once in every row, where its last invocation tokens are"
    if order == "adapter first":
        with pytest.raises(packattn.UnsupportedModelError, match=message):
            packattn.patch(peft.get_peft_model(model, config))
    else:
        packattn.patch(model)
        with pytest.raises(NotImplementedError, match=message):
            peft.get_peft_model(model, config)(**batch)


LIGER = """
import sys, torch, packattn
sys.path.insert(0, "tests")
from liger_kernel.transformers import apply_liger_kernel_to_llama
from tiny_models import alone, make, packed_row
model, batch = make("llama").train(), packed_row("llama")
expected = alone(model, batch)
with packattn.patch(model):
    loss = model(**batch).loss
gradient = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
apply_liger_kernel_to_llama(model=model, rope=True, fused_linear_cross_entropy=True, rms_norm=False, swiglu=False)
with packattn.patch(model):
    found = model(**batch)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(torch.autograd.grad(found.loss, model.model.embed_tokens.weight)[0], gradient)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=5e-6, rtol=1e-4)
"""


@pytest.mark.slow
def test_liger_kernels_around_packed_attention():
    pytest.importorskip("liger_kernel", reason="pip install 'packattn[heavy]'")
    # Without a GPU its kernels run in Triton's interpreter: those that the interpreter can run.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", LIGER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_accelerate_mixed_precision():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    model, batch = make("llama"), packed_row("llama")
    expected = alone(model, batch)
    packattn.patch(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    logits = prepared(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
    accelerator.backward(prepared(**batch).loss)
    accelerator.free_memory()


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_hooks_of_accelerate_outlast_a_patch_that_was_there_before(name):
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make(name), packed_row(name)
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            hooks.attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=weights)
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            assert_close(model(**inputs).logits, expected)
        assert_close(alone(model, batch), expected)


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_accelerate_unwraps_a_patched_model(name):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    model, batch = make(name), packed_row(name)
    with torch.no_grad():
        expected = alone(model, batch)
        with packattn.patch(model):
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
            unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            assert_close(unwrapped(**inputs).logits, expected)
        assert_close(alone(unwrapped, batch), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "bamba"])
def test_a_patched_model_can_be_copied_pickled_and_saved(name, tmp_path):
    model, batch = make(name), packed_row(name)
    expected = alone(model, batch)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    patch = packattn.patch(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(copied(**inputs).logits, expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert_close(model(**inputs).logits, expected)  # nothing is shared
    model.save_pretrained(tmp_path)
    patch.remove()
    assert "packattn" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "packattn"
    assert set(loaded.state_dict()) == set(model.state_dict())
    with packattn.patch(loaded):
        assert_close(loaded(**inputs).logits, expected)


def test_attn_implementation_packattn_raises_until_the_model_is_patched(tmp_path):
    model, batch = make("llama"), packed_row("llama")
    expected = alone(model, batch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="packattn")
    with pytest.raises(RuntimeError, match=r"Call packattn\.patch\(model\) on this very model"):
        loaded(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    with packattn.patch(loaded):
        assert_close(loaded(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)


def test_double_backward_raises():
    model, batch = make("llama"), packed_row("llama")
    with packattn.patch(model), pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(model(**batch).loss, model.get_input_embeddings().weight, create_graph=True)


def test_a_hybrid_is_isolated_under_torch_compile_and_refuses_fullgraph():
    torch._dynamo.reset()
    model, batch = make("bamba"), packed_row("bamba")
    with torch.no_grad():
        expected = alone(model, batch)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        with packattn.patch(model):
            assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported):
                torch.compile(model, backend="eager", fullgraph=True)(**inputs)


def test_the_operator_exports():
    class Attention(nn.Module):
        def forward(self, q, k, v, position_ids):
            mask = packattn.PackedMask.causal(packattn.boundaries(position_ids))
            return packattn.packed_attention(q, k, v, mask)

    q, k, v = torch.randn(12, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]])
    program = torch.export.export(Attention(), (q, k, v, positions))
    other = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert_close(program.module()(q, k, v, other), Attention()(q, k, v, other))


def _gradient_on_rank(how, rank, world):
    model = make("bamba" if how.endswith("hybrid") else "llama")
    packattn.patch(model)
    mine = packattn.PackingCollator()(examples()[rank * 8 // world : (rank + 1) * 8 // world])
    wrapped = model
    if how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    # Both wrappers divide gradients by the number of ranks; the helper's denominator counts the tokens of all ranks.
    labels = mine.pop("labels")
    losses = packattn.token_losses(wrapped(**mine).logits, labels)
    packattn.mean_over_tokens(losses, labels).backward()
    return [p.grad.full_tensor() if how != "ddp" else p.grad for p in model.parameters()]


def _gradients(*hows):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [[gradient.numpy() for gradient in _gradient_on_rank(how, rank, world)] for how in hows]


@pytest.mark.parametrize(
    ("world", "hows"),
    [(2, ["ddp", "fsdp2", "fsdp2 hybrid"]), pytest.param(4, ["ddp", "fsdp2"], marks=pytest.mark.slow)],
)
def test_ranks_together_take_the_gradient_of_the_examples_alone(world, hows):
    found = on_ranks(world, _gradients, *hows)
    for how, gradients in zip(hows, found, strict=True):
        expected = gradient_alone(make("bamba" if how.endswith("hybrid") else "llama"), examples())
        for one, other in zip(gradients, expected, strict=True):
            assert_close(torch.from_numpy(one), other)
