"""Loops that train on a PackedStream on one or several ranks, uncut or resumed, and give the rows of every step."""

import tempfile
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from packattn import PackingCollator
from packattn.data import PackedStream

CAPACITY, ROWS, EPOCHS = 16, 8, 3  # rows of an epoch, over all ranks


class Shuffled:
    """31 examples of 1 to 9 tokens that all differ, in another order in every epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in torch.randperm(31, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield {"input_ids": list(range(10 * number, 10 * number + 1 + number * 7 % 9))}


class Seen(torch.nn.Module):
    """A model that learns nothing and keeps the tokens of every forward pass."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps = []

    def forward(self, input_ids, position_ids=None, labels=None, attention_mask=None):
        self.steps.append(real_tokens(input_ids, attention_mask))
        return {"loss": self.weight + 0.0 * input_ids.sum()}


def real_tokens(input_ids, attention_mask=None):
    return (input_ids if attention_mask is None else input_ids[attention_mask == 1]).flatten().tolist()


def stream(**options):
    return PackedStream(Shuffled(), CAPACITY, open_bins=4, **options)


def loader(dispatch, rows):
    """A loader to be prepared; rows of one size where rank 0 reads for all, as by default."""
    collator = PackingCollator() if dispatch is False else PackingCollator(pad_to=CAPACITY)
    return DataLoader(stream(rows_per_epoch=rows), collate_fn=collator)


def by_trainer(dispatch, stops=(), rows=ROWS, **options):
    """The steps of this rank, uncut, and those after each of `stops` steps in a resumed run."""
    from transformers import Trainer, TrainingArguments

    made = loader(dispatch, rows)
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(folders)

        def run(checkpoint=None):
            fixed = {
                "per_device_train_batch_size": 1, "num_train_epochs": EPOCHS, "logging_strategy": "no", "optim": "sgd",
                "save_strategy": "steps" if stops and checkpoint is None else "no", "save_steps": 1, "use_cpu": True,
                "accelerator_config": {"dispatch_batches": dispatch}, "disable_tqdm": True, "report_to": [],
                "ddp_backend": "gloo" if torch.distributed.is_initialized() else None,
                "ddp_find_unused_parameters": False,
            }  # fmt: skip
            arguments = TrainingArguments(folders[0], **fixed | options)
            model = Seen()
            trainer = Trainer(model, arguments, train_dataset=made.dataset, data_collator=made.collate_fn)
            trainer.train(resume_from_checkpoint=checkpoint)
            return model.steps

        uncut = run()
        return uncut, {stop: run(str(Path(folders[0]) / f"checkpoint-{stop}")) for stop in stops}


def by_accelerate(dispatch, stops=(), rows=ROWS, stateful=False):
    """As `by_trainer`, in a loop of Accelerate's that skips batches or loads the state of its loader."""
    from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches

    config = DataLoaderConfiguration(dispatch_batches=dispatch, use_stateful_dataloader=stateful)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    states = {}

    def run(stop=0):
        prepared = accelerator.prepare(loader(dispatch, rows))
        first, skipped = divmod(stop, len(prepared)) if stop else (0, 0)
        if stop and stateful:
            prepared.load_state_dict(states[stop])
        steps = []
        for epoch in range(first, EPOCHS):
            prepared.set_epoch(epoch)
            skips = skipped if epoch == first and not stateful else 0
            for batch in skip_first_batches(prepared, skips) if skips else prepared:
                steps.append(real_tokens(batch["input_ids"], batch.get("attention_mask")))
                if stateful and not stop:
                    states[len(steps)] = prepared.state_dict()
        return steps

    uncut = run()
    return uncut, {stop: run(stop) for stop in stops}


def by_hand(rank, ranks, stops=(), **options):
    """As `by_trainer`, in a loop of one's own over the rows of one of several ranks."""

    def run(state=None, epoch=0):
        mine = stream(num_replicas=ranks, rank=rank, **options)
        if state is not None:
            mine.load_state_dict(state)
        steps = []
        for now in range(epoch, EPOCHS):
            mine.set_epoch(now)
            for batch in DataLoader(mine, collate_fn=PackingCollator()):
                steps.append(real_tokens(batch["input_ids"]))
                states.append((mine.state_dict(), now))
        return steps

    states = []
    uncut = run()
    saved = list(states)
    return uncut, {stop: run(*saved[stop - 1]) for stop in stops}


def refusal(work):
    """The message of the ValueError that `work` raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def every_way(stops):
    """What every rank saw: {way: [(uncut, {stop: the steps after it})] of the ranks}; and what was refused."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {
        "trainer": by_trainer(None, stops),
        "trainer, every rank reads": by_trainer(False, stops),
        "accelerate": by_accelerate(None, stops),
        "accelerate, every rank reads": by_accelerate(False, stops),
        "by hand": by_hand(rank, ranks, stops, rows_per_epoch=ROWS // ranks),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_accelerate(False, rows=None)
    plain = DataLoader(stream(rows_per_epoch=ROWS), collate_fn=PackingCollator())
    of_one_rank = DataLoader(stream(num_replicas=ranks, rank=rank), collate_fn=PackingCollator())
    refused = {
        "rows of many sizes": refusal(lambda: list(prepare(plain))),
        "split_batches": refusal(lambda: list(prepare(loader(None, ROWS), split_batches=True))),
        "one rank's rows": refusal(lambda: list(prepare(of_one_rank, dispatch_batches=False))),
        "odd rows": refusal(lambda: by_accelerate(False, rows=ROWS + 1)),
        "stateful": refusal(lambda: by_accelerate(None, stateful=True)),
        "no number of rows": " ".join(str(warning.message) for warning in caught),
    }
    gathered = [None] * ranks
    torch.distributed.all_gather_object(gathered, found)
    return {way: [of_rank[way] for of_rank in gathered] for way in found}, refused


def prepare(given, **settings):
    from accelerate import Accelerator, DataLoaderConfiguration

    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings)).prepare(given)
