"""Training on two gloo ranks: the weights are those of a plain run on one, whichever loop trains."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny_models import make
from transformers import Trainer

import packattn
from packattn import BalancedPackingSampler, PackingCollator

HERE = Path(__file__).parent
WAYS = ["by_trainer", "by_accelerate", "by_hand"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "ranks.py", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights of a plain run on one rank: transformers' own sampler, mini-batches of 2, accumulated."""
    folder = tmp_path_factory.mktemp("plain")
    model = make("llama").train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with packattn.patch(model):
        Trainer(
            model, ranks.arguments(folder, 2, 4), data_collator=PackingCollator(), train_dataset=ranks.examples()
        ).train()  # fmt: skip
    return before, model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_a_plain_run(runs, plain, way):
    before, after = plain
    found = torch.load(runs / f"{way}.pt")
    for name, values in after.items():
        moved = (values - before[name]).abs().max()
        assert moved > 1e-4, name
        assert (found[name] - values).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize("way", WAYS)
def test_both_ranks_take_as_many_micro_batches_of_the_examples_of_the_plan(runs, way):
    taken = [json.loads((runs / f"{way}.{rank}.json").read_text()) for rank in range(2)]
    assert len(taken[0]) == len(taken[1])
    options = {"micro_steps": 2} if way == "by_trainer" else {"token_budget": 60}
    lengths = [len(example["input_ids"]) for example in ranks.examples()]
    sampler = BalancedPackingSampler(lengths, ranks.GLOBAL_BATCH, num_replicas=2, rank="all", seed=3, **options)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert list(itertools.chain(*zip(*taken, strict=True))) == expected


def test_the_logged_figures_of_packing_are_of_all_ranks(runs):
    one, other = (json.loads((runs / f"logs.{rank}.json").read_text()) for rank in range(2))
    steps = [entry for entry in one if "packing/fill" in entry]
    assert len(steps) == 8
    sampler = BalancedPackingSampler(
        [len(example["input_ids"]) for example in ranks.examples()], ranks.GLOBAL_BATCH, num_replicas=2, rank=0,
        micro_steps=2, seed=3,
    )  # fmt: skip
    for at, (mine, theirs) in enumerate(zip(steps, [entry for entry in other if "packing/fill" in entry], strict=True)):
        sampler.set_epoch(at // 4)
        rows = [row for micro_step in sampler.assignment(at % 4) for row in micro_step]
        tokens = sum(len(ranks.examples()[number]["input_ids"]) for row in rows for number in row)
        for entry in (mine, theirs):
            assert entry["packing/tokens_per_row"] == tokens / len(rows)
            assert entry["packing/sequences_per_row"] == sum(map(len, rows)) / len(rows)
            assert entry["packing/fill"] == 1.0


@pytest.mark.parametrize("way", [way.__name__ for way in ranks.RESUMED])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_resumed_after_any_step_sees_the_examples_of_one_that_was_not_cut(runs, tmp_path, way, world):
    if world == 2:
        found = [json.loads((runs / f"{way}.{rank}.json").read_text()) for rank in range(2)]
    else:
        found = [getattr(ranks, way)(tmp_path)]
    steps = 4 * ranks.EPOCHS
    for whole, resumed in found:
        assert len(resumed) >= steps - 1
        left = [len(seen) for seen in resumed]
        assert left == sorted(left, reverse=True)
        for seen in resumed:
            assert seen == whole[len(whole) - len(seen) :]
    seen = sorted(number for whole, _ in found for batch in whole for number in batch)
    assert seen == sorted(list(range(26)) * ranks.EPOCHS)
    assert len({len(whole) for whole, _ in found}) == 1
