"""One rank of a run on several: `python ranks.py FOLDER`, under the environment that torchrun sets.

Trains the same tiny model on the same examples three ways: transformers' Trainer, an Accelerate loop, a loop of one's
own over DistributedDataParallel. Rank 0 saves the weights of each, every rank the examples of each of its steps.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from tiny_models import make
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import packattn
from packattn import BalancedPackingSampler, PackingCollator

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


class BalancedTrainer(Trainer):
    def get_train_dataloader(self):
        sampler = BalancedPackingSampler(
            [len(example["input_ids"]) for example in self.train_dataset], GLOBAL_BATCH,
            num_replicas=self.args.world_size, rank="all", seed=self.args.seed,
            micro_steps=self.args.gradient_accumulation_steps,
        )  # fmt: skip
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class Seen:
    """A collator that writes down which examples it packed."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append([example["input_ids"][0] - 3 for example in batch])
        return PackingCollator()(batch)


def by_trainer(folder, seen):
    model = make("llama").train()
    packattn.patch(model)
    BalancedTrainer(model, arguments(folder, 1, 2), data_collator=seen, train_dataset=examples()).train()
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
