"""BalancedTrainer and PackingCallback: steps of a plain run, the Trainer's own settings, figures that are true."""

import itertools
import warnings

import pytest
import ranks
import torch
from tiny_models import VOCABULARY, make
from transformers import Trainer, TrainerCallback

import packattn
from packattn.data import Cost
from packattn.hf import BalancedTrainer, BalancedTrainerMixin, PackingCallback

datasets = pytest.importorskip("datasets")


def some(n=24, **columns):
    """n examples of 1 to 9 tokens; the first says which it is."""
    return [{"input_ids": [3 + i, *range(3, 3 + i % 9)], **columns} for i in range(n)]


def trainer_of(folder, kind=BalancedTrainer, examples=None, **options):
    given = {name: options.pop(name) for name in ("token_budget", "cost", "lengths", "callbacks") if name in options}
    return kind(
        ranks.OneWeight(), ranks.arguments(folder, options.pop("batch", 2), options.pop("accumulation", 3), **options),
        data_collator=packattn.PackingCollator(), train_dataset=some() if examples is None else examples, **given,
    )  # fmt: skip


def steps_of(trainer, epoch):
    """The examples of every optimiser step, in any order within it."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    found = [(batch["input_ids"][batch["position_ids"] == 0] - 3).tolist() for batch in loader]
    each = trainer.args.gradient_accumulation_steps
    return [sorted(itertools.chain(*found[at : at + each])) for at in range(0, len(found), each)]


@pytest.mark.parametrize(
    "options",
    [{}, {"seed": 7}, {"data_seed": 5}, {"train_sampling_strategy": "sequential"}, {"accumulation": 1}],
    ids=str,
)
def test_the_steps_are_those_of_a_plain_trainer_with_the_same_arguments(tmp_path, options):
    for epoch in (0, 2):
        plain = steps_of(trainer_of(tmp_path, Trainer, **options), epoch)
        assert steps_of(trainer_of(tmp_path, **options, cost=Cost(1.0, 0.1)), epoch) == plain
        assert steps_of(trainer_of(tmp_path, **options, token_budget=40), epoch) == plain


def test_micro_steps_have_equal_work_and_keep_to_the_budget(tmp_path):
    trainer = trainer_of(tmp_path, batch=4, accumulation=3, token_budget=24)
    sizes = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
    assert len(sizes) == 6
    assert max(sizes) <= 24
    assert all(max(sizes[at : at + 3]) - min(sizes[at : at + 3]) <= 1 for at in (0, 3))


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_columns_that_trainer_removes_do_not_raise(tmp_path, kind):
    examples = some(text="a column of text")
    if kind == "datasets":
        examples = datasets.Dataset.from_list(examples)
    assert sum(map(len, steps_of(trainer_of(tmp_path, examples=examples), 0))) == 24
    kept = trainer_of(tmp_path, examples=examples, remove_unused_columns=False)
    with pytest.raises(TypeError, match="field 'text' must hold one number per token"):
        steps_of(kept, 0)


def test_the_settings_of_the_loader_are_the_trainers(tmp_path):
    chosen = {
        "dataloader_num_workers": 2, "dataloader_pin_memory": False, "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "forkserver",
    }  # fmt: skip
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "timeout", "in_order")
    for options in ({}, chosen):
        mine, plain = (trainer_of(tmp_path, kind, **options) for kind in (BalancedTrainer, Trainer))
        mine, plain = mine.get_train_dataloader(), plain.get_train_dataloader()
        for name in names:
            assert getattr(mine, name) == getattr(plain, name), name
        assert type(mine.multiprocessing_context) is type(plain.multiprocessing_context)
        assert mine.worker_init_fn.func is plain.worker_init_fn.func
        assert type(mine.collate_fn) is type(plain.collate_fn)
    assert (mine.num_workers, mine.prefetch_factor) == (2, 3)


def test_the_last_examples_are_dropped_where_trainer_was_told_to(tmp_path):
    trainer = trainer_of(tmp_path, dataloader_drop_last=True)
    assert trainer.get_train_dataloader().batch_sampler.drop_last


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "train_sampling_strategy must be 'random' or"),
        ({"dataloader_in_order": False}, ValueError, "dataloader_in_order must be True, got False"),
        ({"accelerator_config": {"split_batches": True}}, ValueError, "split_batches must be False, got True"),
        ({"accelerator_config": {"dispatch_batches": True}}, ValueError, "dispatch_batches must be False or None"),
        ({"token_budget": 9}, ValueError, "do not fit into 3 micro-steps of 1 ranks with a token_budget of 9"),
        ({"token_budget": 3}, ValueError, "more than the token_budget of 3"),
        ({"lengths": [3, 4]}, ValueError, "lengths must hold one length for each of the 24 examples"),
        ({"examples": "a stream", "max_steps": 2}, TypeError, "must have a length and numbered examples, got Iter"),
    ],
    ids=str,
)
def test_law_10_what_cannot_be_balanced_is_named(tmp_path, options, error, message):
    if "examples" in options:
        options = options | {"examples": datasets.Dataset.from_list(some()).to_iterable_dataset()}
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, **options).train()


def test_the_collator_packs_unless_another_is_given(tmp_path):
    trainer = BalancedTrainer(ranks.OneWeight(), ranks.arguments(tmp_path, 2, 3), train_dataset=some())
    assert isinstance(trainer.data_collator, packattn.PackingCollator)


def test_a_model_without_a_patch_is_warned_of(tmp_path):
    model = make("llama")
    trainer = BalancedTrainer(model, ranks.arguments(tmp_path, 2, 3), train_dataset=some())
    with pytest.warns(UserWarning, match="LlamaForCausalLM is trained on packed rows without packattn.patch"):
        trainer.get_train_dataloader()
    with packattn.patch(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.get_train_dataloader()


def test_the_mixin_balances_trls_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'packattn[integrations]'")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class BalancedSFTTrainer(BalancedTrainerMixin, trl.SFTTrainer):
        pass

    vocabulary = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    model, losses = make("llama").train(), {}
    with packattn.patch(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl advises flash attention for packing
        for kind in (trl.SFTTrainer, BalancedSFTTrainer):
            options = trl.SFTConfig(
                str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, padding_free=True,
                max_length=None, learning_rate=0.0, logging_steps=1, num_train_epochs=1, report_to=[], use_cpu=True,
                bf16=False, disable_tqdm=True, seed=3,
            )  # fmt: skip
            trainer = kind(
                model, args=options, train_dataset=datasets.Dataset.from_list(some()),
                processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="0", eos_token="2"),
            )  # fmt: skip
            trainer.train()
            losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[trl.SFTTrainer]) == 3
    assert losses[BalancedSFTTrainer] == pytest.approx(losses[trl.SFTTrainer], abs=2e-5)


class Reporter(TrainerCallback):
    """What TensorBoard would be told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("first", [False, True])
def test_the_figures_of_packing_are_in_every_log_of_a_step(tmp_path, monkeypatch, first):
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    reporter, callback = Reporter(), PackingCallback()
    options = {"logging_strategy": "steps", "logging_steps": 2, "num_train_epochs": 1}
    given = [reporter] if first else [reporter, callback]
    trainer = trainer_of(tmp_path, batch=2, accumulation=3, callbacks=given, **options)
    if first:
        assert callback.add_to(trainer) is callback
    trainer.train()
    tokens, sequences = sum(1 + i % 9 for i in range(24)), 24
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert sum(entry["packing/tokens_per_row"] for entry in steps) * 6 == tokens
    assert sum(entry["packing/sequences_per_row"] for entry in steps) * 6 == sequences
    assert [entry["packing/fill"] for entry in steps] == [1.0, 1.0]
    assert all(entry["packing/tokens_per_second"] > 0 for entry in steps)
    assert [("packing/fill" in entry) for entry in reporter.logs] == [first, first, False]
    assert not trainer.model._forward_pre_hooks


def test_padding_is_not_counted_as_tokens():
    callback, model = PackingCallback(), ranks.OneWeight().train()
    padded = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]),
    }
    rows = [
        padded,
        packattn.PackingCollator(pad_to=20)(some(4)),
        packattn.PackingCollator(return_seq_idx=True)(some(3)),
        {"input_ids": torch.ones(3, 4, dtype=torch.long)},
    ]
    rows[2].pop("position_ids")
    for batch in rows:
        callback._count(model, (), batch)
    found = [tuple(counted.tolist()) for counted in callback._counts]
    assert found == [(2, 10, 8, 2), (1, 20, 10, 4), (1, 6, 6, 3), (3, 12, 12, 3)]
    callback._count(model.eval(), (), padded)
    assert len(callback._counts) == 4
