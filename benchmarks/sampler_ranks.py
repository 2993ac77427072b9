"""Four real gloo ranks train by each way of sampling: `python -m benchmarks.sampler_ranks`.

A small Llama learns real lengths of made-up tokens for one epoch. Every rank computes in one thread and counts the CPU
seconds of its own forward and backward passes, so that ranks may outnumber cores: the time of a step on four machines
is the sum over its micro-steps of the slowest rank. The held-out loss says what became of the optimiser's steps.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import packattn
from benchmarks import sampler_schemes as schemes
from benchmarks.packs import lengths as real_lengths
from benchmarks.sampler_schemes import Setting
from packattn import PackingCollator
from packattn.data import Cost

VOCABULARY, LONGEST, EXAMPLES, HELD_OUT = 512, 1024, 640, 64


def pad(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A padded batch, as any padding collator makes it."""
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(filler: int, name: str = "input_ids") -> torch.Tensor:
        return torch.tensor([e[name] + [filler] * (longest - len(e[name])) for e in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {"input_ids": rows(0), "labels": rows(-100), "attention_mask": torch.tensor(mask)}


# name -> (scheme, collator, whether the model is patched)
APPROACHES: dict[str, tuple[Any, Callable[..., Any], bool]] = {
    "padding": (schemes.plain, pad, False),
    "batch_rebalance, padding": (schemes.rebalanced, pad, False),
    "online packing (the paper)": (schemes.plain, PackingCollator(), True),
    "batch_rebalance + flattening": (schemes.rebalanced, DataCollatorWithFlattening(), True),
    "**balanced**": (schemes.balanced, PackingCollator(), True),
    "offline packing (the paper)": (schemes.offline, PackingCollator(), True),
    "multipack": (schemes.multipack, PackingCollator(), True),
}


def make_examples() -> list[dict[str, list[int]]]:
    """Real lengths; the tokens count up in a stride that the first of them says, so that something can be learnt."""
    generator = random.Random(0)
    found = []
    for length in real_lengths("short tasks", LONGEST)[: EXAMPLES + HELD_OUT]:
        stride, first = generator.randrange(1, 8), generator.randrange(VOCABULARY)
        ids = [stride] + [8 + (first + stride * at) % (VOCABULARY - 8) for at in range(length - 1)]
        found.append({"input_ids": ids})
    return found


def make_model() -> LlamaForCausalLM:
    """A small Llama, the same everywhere."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LONGEST,
        )
    )  # fmt: skip


def train(rank: int, ranks: int, name: str, setting: Setting) -> dict[str, float]:
    """One epoch by one approach; the figures of all ranks."""
    scheme, collate, patched = APPROACHES[name]
    examples = make_examples()
    training, held_out = examples[:EXAMPLES], examples[EXAMPLES:]
    model = make_model()
    patch = packattn.patch(model) if patched else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seconds = waited = 0.0
    steps = 0
    dist.barrier()
    began = time.perf_counter()
    for step in scheme([len(example["input_ids"]) for example in training], setting):
        batches = [collate([training[i] for i in micro_step[rank]]) for micro_step in step]
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        dist.all_reduce(targets)
        own = []
        for batch in batches:
            start = time.process_time()
            model(**batch, num_items_in_batch=targets, use_cache=False).loss.backward()
            own.append(time.process_time() - start)
        everyone = [torch.zeros(len(own), dtype=torch.float64) for _ in range(ranks)]
        dist.all_gather(everyone, torch.tensor(own, dtype=torch.float64))
        table = torch.stack(everyone)
        seconds += float(table.amax(0).sum())
        waited += float((table.amax(0) - table.mean(0)).sum())
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        for parameter, gradient in zip(
            model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.grad.copy_(gradient.view_as(parameter))
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    wall = time.perf_counter() - began
    if patch is not None:
        patch.remove()
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([e["input_ids"]]), labels=torch.tensor([e["input_ids"]])).loss
                  for e in held_out[rank::ranks]]  # fmt: skip
    total = torch.stack(losses).sum()
    dist.all_reduce(total)
    return {
        "steps": steps, "seconds": seconds, "idle": waited / seconds, "wall": wall,
        "loss": float(total) / len(held_out),
    }  # fmt: skip


def work(rank: int, ranks: int, folder: str, repeats: int) -> None:
    """All approaches in turn, so that what else the machine does falls on all alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    setting = Setting(ranks, 4, 2, 1024, Cost.of_model(make_model().config))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in APPROACHES}
    for _ in range(repeats):
        for name in APPROACHES:
            runs[name].append(train(rank, ranks, name, setting))
    if rank == 0:
        median = {
            name: {key: sorted(run[key] for run in found)[len(found) // 2] for key in found[0]}
            for name, found in runs.items()
        }
        print("| approach | steps | seconds of an epoch | speed-up | idle | held-out loss |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, found in median.items():
            speed = median["padding"]["seconds"] / found["seconds"]
            print(
                f"| {name} | {found['steps']:.0f} | {found['seconds']:.1f} | {speed:.2f}x | {found['idle']:.0%} | "
                f"{found['loss']:.4f} |"
            )
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (arguments.ranks, str(Path(folder)), arguments.repeats), nprocs=arguments.ranks
        )  # fmt: skip


if __name__ == "__main__":
    main()
