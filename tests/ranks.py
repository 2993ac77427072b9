"""One rank of a run on several: `python ranks.py FOLDER`, under the environment that torchrun sets.

Trains the same tiny model on the same examples three ways: BalancedTrainer, an Accelerate loop, a loop of one's own
over DistributedDataParallel. Rank 0 saves the weights of each, every rank the examples of each of its steps. Then three
epochs are cut after every step and resumed, by each of these ways, and every rank writes down which examples it saw.
"""

import gc
import json
import os
import random
import sys
from pathlib import Path

import torch
from tiny_models import make
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import packattn
from packattn import BalancedPackingSampler, PackingCollator
from packattn.hf import BalancedTrainer, PackingCallback

GLOBAL_BATCH, RATE = 8, 0.5


def examples():
    """26 examples of 2 to 40 tokens; some have labels on a part only. The number is kept in the first token."""
    generator = random.Random(0)
    found = []
    for number in range(26):
        ids = [3 + number, *(generator.randrange(3, 99) for _ in range(min(39, 1 + int(generator.expovariate(0.1)))))]
        ignored = generator.randrange(len(ids))
        found.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return found


def arguments(folder, batch, accumulation, **options):
    backend = "gloo" if torch.distributed.is_initialized() else None
    fixed = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "seed": 3,
        "logging_strategy": "no", "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "ddp_backend": backend,
    }  # fmt: skip
    return TrainingArguments(folder, **fixed | options)


class Seen:
    """A collator that writes down which examples it packed."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(_numbers(batch))
        return PackingCollator()(batch)


def by_trainer(folder, seen):
    model = make("llama").train()
    packattn.patch(model)
    options = arguments(folder, 2, 2, logging_strategy="steps", logging_steps=1)
    trainer = BalancedTrainer(
        model, options, data_collator=seen, train_dataset=examples(), callbacks=[PackingCallback()]
    )  # fmt: skip
    trainer.train()
    (folder / f"logs.{os.environ['RANK']}.json").write_text(json.dumps(trainer.state.log_history))
    return model


def by_accelerate(folder, seen):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make("llama").train()
    packattn.patch(model)
    lengths = [len(example["input_ids"]) for example in examples()]
    sampler = BalancedPackingSampler(
        lengths, GLOBAL_BATCH, token_budget=60, num_replicas=accelerator.num_processes, rank="all", seed=3
    )
    loader = DataLoader(examples(), batch_sampler=sampler, collate_fn=seen)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for taken in sampler.by_step(loader):
            targets = sum((batch["labels"] != -100).sum() for batch in taken)
            targets = accelerator.reduce(targets, "sum")
            for batch in taken:
                loss = wrapped(**batch, num_items_in_batch=targets).loss * accelerator.num_processes
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return model


def by_hand(folder, seen):
    model = make("llama").train()
    packattn.patch(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    lengths = [len(example["input_ids"]) for example in examples()]
    sampler = BalancedPackingSampler(lengths, GLOBAL_BATCH, token_budget=60, seed=3)
    loader = DataLoader(examples(), batch_sampler=sampler, collate_fn=seen)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batches in sampler.by_step(loader):
            targets = sum((batch["labels"] != -100).sum() for batch in batches)
            torch.distributed.all_reduce(targets)
            for batch in batches:
                loss = wrapped(**batch, num_items_in_batch=targets).loss * sampler.num_replicas
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


class OneWeight(torch.nn.Module):
    """As little of a model as Trainer takes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels, position_ids):
        return {"loss": self.weight * input_ids.float().mean()}


EPOCHS = 3


def resumed_by_trainer(folder):
    """The micro-batches of a run that is not cut, and of those resumed after each of its steps."""
    world = int(os.environ.get("WORLD_SIZE", "1"))

    def train(checkpoint=None, **options):
        seen = Seen()
        options = arguments(folder / "trainer", 2, GLOBAL_BATCH // 2 // world, num_train_epochs=EPOCHS, **options)
        trainer = BalancedTrainer(OneWeight(), options, data_collator=seen, train_dataset=examples())
        trainer.train(resume_from_checkpoint=checkpoint)
        return seen.batches

    gc.freeze()  # Trainer collects garbage whenever it begins; most of the time would go to modules that stay
    whole = train(save_strategy="steps", save_steps=1)
    cut = [folder / "trainer" / f"checkpoint-{step}" for step in range(1, 4 * EPOCHS)]
    resumed = [train(checkpoint) for checkpoint in cut]
    gc.unfreeze()
    return whole, resumed


def resumed_by_accelerate(folder):
    return _resumed_loops(_prepared, _saved_state)


def resumed_by_skipping(folder):
    """By Accelerate's skip_first_batches, without the sampler's state."""
    from accelerate import skip_first_batches

    def resume(sampler, loader, state, micro_batches):
        loader = skip_first_batches(loader, micro_batches)
        loader.set_epoch(state["epoch"])
        return loader

    return _resumed_loops(_prepared, resume)


def resumed_by_hand(folder):
    def make():
        sampler = BalancedPackingSampler(_lengths(), GLOBAL_BATCH, token_budget=60, seed=3)
        return sampler, DataLoader(examples(), batch_sampler=sampler, collate_fn=_numbers, num_workers=0)

    return _resumed_loops(make, _saved_state)


def _prepared():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    sampler = BalancedPackingSampler(
        _lengths(), GLOBAL_BATCH, token_budget=60, num_replicas=accelerator.num_processes, rank="all", seed=3
    )
    loader = accelerator.prepare(DataLoader(examples(), batch_sampler=sampler, collate_fn=_numbers))
    return sampler, loader


def _saved_state(sampler, loader, state, micro_batches):
    sampler.load_state_dict(state)
    return loader


def _resumed_loops(make, resume):
    """Three epochs of a loop over by_step, and the same from the state after each step."""
    whole, states = [], []
    sampler, loader = make()
    for epoch in range(EPOCHS):
        begun = len(whole)
        getattr(loader, "set_epoch", sampler.set_epoch)(epoch)
        for batches in sampler.by_step(loader):
            whole.extend(batches)
            states.append((json.loads(json.dumps(sampler.state_dict())), len(whole) - begun))
    resumed = []
    for state, micro_batches in states:
        seen = []
        sampler, loader = make()
        following, loader = loader, resume(sampler, loader, state, micro_batches)
        for epoch in range(state["epoch"], EPOCHS):
            getattr(loader, "set_epoch", sampler.set_epoch)(epoch)
            for batches in sampler.by_step(loader):
                seen.extend(batches)
            loader = following
        resumed.append(seen)
    return whole, resumed


def _lengths():
    return [len(example["input_ids"]) for example in examples()]


def _numbers(batch):
    return [example["input_ids"][0] - 3 for example in batch]


RESUMED = (resumed_by_trainer, resumed_by_accelerate, resumed_by_skipping, resumed_by_hand)


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = os.environ["RANK"]
    for way in (by_trainer, by_accelerate, by_hand):
        seen = Seen()
        model = way(folder, seen)
        (folder / f"{way.__name__}.{rank}.json").write_text(json.dumps(seen.batches))
        if rank == "0":
            torch.save(model.state_dict(), folder / f"{way.__name__}.pt")
    for way in RESUMED:
        (folder / f"{way.__name__}.{rank}.json").write_text(json.dumps(way(folder)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
