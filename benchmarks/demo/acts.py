"""What the two acts train, on which texts, and how much of it on a CPU and on a GPU."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.demo import assets

_VOCABULARY = 4096


@dataclass(frozen=True)
class Act:
    """A model, a data set, and the amounts.

    Attributes:
        model: makes the model on a device. texts: makes all examples, lists of token ids.
        longest: examples with more tokens are left out, since the padded batches would not fit in memory.
        examples, held_out: how many are trained on, and how many the loss is measured on.
        minibatch: examples of a step (padding, online). capacity: tokens of a row (offline), a row a step.
        evaluations: how often the held-out loss is measured on the way.
        checkpointed: activations of the layers are computed again in the backward pass, which saves their memory.
    """

    name: str
    model: Callable[[torch.device], Any]
    texts: Callable[[], list[list[int]]]
    longest: int
    examples: int
    held_out: int
    minibatch: int
    capacity: int
    learning_rate: float
    evaluations: int
    checkpointed: bool = False

    def data(self) -> tuple[list[list[int]], list[list[int]]]:
        """Training and held-out examples, the same at every call: of 99 random samples the one with median padding.

        A few dozen examples may by chance be much more, or much less, alike in length than the data set.
        """
        kept = [ids for ids in self.texts() if 2 <= len(ids) <= self.longest]
        samples = [random.Random(seed).sample(kept, self.held_out + self.examples) for seed in range(99)]
        sample = sorted(samples, key=lambda drawn: padded_factor(drawn[self.held_out :], self.minibatch))[49]
        return sample[self.held_out :], sample[: self.held_out]


def padded_factor(examples: list[list[int]], minibatch: int) -> float:
    """Tokens of the padded mini-batches for every real one."""
    lengths = [len(ids) for ids in examples]
    batches = [lengths[start : start + minibatch] for start in range(0, len(lengths), minibatch)]
    return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)


def small_llama(device: torch.device, *, hidden: int, layers: int) -> Any:
    """A random Llama with grouped heads of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def acts(device: torch.device, scale: float) -> tuple[Act, Act]:
    """The fine-tuning and the loss curve, with `scale` times the examples."""
    finetune = Act(
        name="finetune",
        model=assets.load_smollm2,
        texts=assets.tasks,
        # A padded batch of 8 x 256 tokens takes 5 GB: 2.4 for weights and optimiser, half of the rest for the logits.
        longest=256,
        examples=32,
        held_out=8,
        minibatch=8,
        capacity=1024,
        learning_rate=3e-5,
        evaluations=1,
        checkpointed=True,
    )
    curve = Act(
        name="curve",
        model=partial(small_llama, hidden=256, layers=4),
        texts=partial(assets.functions, _VOCABULARY),
        longest=1024,
        examples=192,
        held_out=24,
        minibatch=8,
        capacity=4096,
        learning_rate=2e-3,
        evaluations=4,
    )
    if device.type == "cuda":
        finetune = replace(finetune, longest=2048, examples=1024, held_out=256, capacity=4096, checkpointed=False)
        curve = replace(
            curve,
            model=partial(small_llama, hidden=512, layers=8),
            examples=5600,
            held_out=512,
            learning_rate=1e-3,
            evaluations=20,
        )
    return tuple(replace(act, examples=max(act.minibatch, round(act.examples * scale))) for act in (finetune, curve))
