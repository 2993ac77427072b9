"""A patched model split over devices and processes: tensor parallel works, what would mix rows or ranks is refused."""

import contextlib
import os
from functools import partial

import pytest
import tiny_models
import torch
from processes import on_ranks
from tiny_models import alone, make, packed_row
from torch import nn

import packattn

assert_close = partial(tiny_models.assert_close, rtol=1e-4)


def _tensor_parallel(folder, name):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(tp_size=torch.distributed.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split)
    patch = packattn.patch(model)
    assert patch.how == "spans"
    batch = packed_row(name)
    result = model(**batch)
    result.loss.backward()
    # One that every rank holds whole, and one that is split.
    gradients = [layer.weight.grad for layer in (model.model.norm, model.model.layers[0].self_attn.q_proj)]
    gradients = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]
    logits = result.logits.full_tensor() if hasattr(result.logits, "full_tensor") else result.logits
    heads = model.model.layers[0].self_attn.q_proj.weight
    local = heads.to_local() if hasattr(heads, "to_local") else heads
    return [x.detach().numpy() for x in (logits, *gradients)], tuple(local.shape)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tensor_parallel(name, tmp_path):
    pytest.importorskip("transformers.distributed", reason="transformers before 5.10 splits models otherwise")
    model, batch = make(name), packed_row(name)
    model.save_pretrained(tmp_path)
    expected = alone(model, batch)
    with packattn.patch(model):
        model(**batch).loss.backward()
    (logits, *gradients), local = on_ranks(2, _tensor_parallel, tmp_path, name)
    whole = model.model.layers[0].self_attn.q_proj.weight
    assert local == (whole.shape[0] // 2, whole.shape[1])
    assert_close(torch.from_numpy(logits), expected)
    for found, layer in zip(gradients, (model.model.norm, model.model.layers[0].self_attn.q_proj), strict=True):
        found = torch.from_numpy(found)
        wanted = layer.weight.grad
        assert_close(found, wanted if found.shape == wanted.shape else wanted[: found.shape[0]])


def _context_parallel(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    model, batch = make(name), packed_row(name)
    packattn.patch(model)
    size = 2 * torch.distributed.get_world_size()
    buffers = [batch[key][:, : batch[key].shape[1] // size * size].clone() for key in ("input_ids", "position_ids")]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    try:
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1]):
            model(input_ids=buffers[0], position_ids=buffers[1])
    except NotImplementedError as error:
        return str(error)
    return "nothing was raised"


def test_context_parallel_is_refused():
    assert "a row split over ranks (context parallel)" in on_ranks(2, _context_parallel, "llama")


def test_attention_of_another_library_is_refused_when_patching(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # As DeepSpeed's Ulysses does, whose ranks hold a part of the row each.
    model = make("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "ulysses", lambda *_, **__: None)
    model.config._attn_implementation_internal = "ulysses"
    with pytest.raises(packattn.UnsupportedModelError, match="attends by 'ulysses', which another library registered"):
        packattn.patch(model)


def test_data_parallel_on_several_devices_is_refused():
    model, batch = make("llama"), packed_row("llama")
    packattn.patch(model)
    assert_close(nn.DataParallel(model)(**batch).logits, model(**batch).logits)  # one device or none: the model itself
    replica = model._replicate_for_data_parallel()  # what DataParallel calls on each of several devices
    with pytest.raises(NotImplementedError, match=r"nn\.DataParallel .*DistributedDataParallel"):
        replica(**batch)


def _deepspeed(stage, name):
    import deepspeed

    model = make(name)
    packattn.patch(model)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    batch = packed_row(name, seed=torch.distributed.get_rank())
    try:
        result = engine(**batch)
    except NotImplementedError as error:
        return str(error)
    engine.backward(result.loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())) if stage == 3 else contextlib.nullcontext():
        return [result.logits.detach().numpy(), *(p.detach().clone().numpy() for p in model.parameters())]


def _all_deepspeed(*runs):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.torch

    # Reductions in shared memory, C++ that would be compiled here for minutes; without it gloo makes them.
    deepspeed.comm.torch.build_shm_op = lambda: None
    return [_deepspeed(*run) for run in runs]


@pytest.mark.slow
def test_deepspeed_takes_the_steps_of_the_examples_alone_or_refuses():
    pytest.importorskip("deepspeed", reason="pip install 'packattn[heavy]'")
    *stepped, refused = on_ranks(2, _all_deepspeed, (1, "llama"), (3, "llama"), (3, "bamba"))
    model = make("llama")
    batches = [packed_row("llama", seed=rank) for rank in range(2)]
    expected = alone(model, batches[0])
    with packattn.patch(model):  # which other tests hold to the examples alone
        loss = sum(model(**batch).loss for batch in batches) / 2
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for logits, *after in stepped:
        assert_close(torch.from_numpy(logits), expected)
        for found, before, gradient in zip(after, model.parameters(), gradients, strict=True):
            assert_close(torch.from_numpy(found), before.detach() - 0.1 * gradient)
    # Its layers would be gathered a different number of times on each rank.
    assert "BambaMixer runs one row per sequence" in refused
    assert "DeepSpeed ZeRO-3" in refused
