"""Training by one approach in a process of its own, and the figures of that run."""

import multiprocessing
import random
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import packattn
from benchmarks.demo.acts import Act
from benchmarks.demo.approaches import Approach, Batch, Examples, minibatches, pack

T = TypeVar("T")
_WARMUP_STEPS = 5


@dataclass
class Point:
    """A place on the loss curve: seconds and real tokens trained so far, mean loss of the held-out examples."""

    seconds: float
    tokens: int
    loss: float


@dataclass
class Run:
    """What one approach did. Real tokens are those of the examples; computed tokens are what the model was given."""

    approach: str
    device: str
    precision: str
    rows: int = 0
    steps: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    step_losses: list[float] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)

    @property
    def padding(self) -> float:
        """Share of the computed tokens that are padding."""
        return 1 - self.real_tokens / self.computed_tokens

    @property
    def speed(self) -> float:
        """Real tokens per second."""
        return self.real_tokens / self.seconds


def quiet() -> None:
    """Leave the screen to the demo."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result from a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise SystemExit(
                f"the process of `{function.__name__}` was ended by the system, most likely for lack of memory: the "
                "padded batches need the most, about 5 GB. Close other programs and run again."
            ) from None


def device_and_precision() -> tuple[torch.device, torch.dtype]:
    """The GPU if there is one, and bfloat16 (by autocast) where the machine computes it natively."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.device("cpu"), torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computing in `dtype` on the device; float32 as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def isolation(model: Any, approach: Approach) -> AbstractContextManager[Any]:
    """The model as the approach runs it: patched, or as transformers made it."""
    return packattn.patch(model) if approach.patched else nullcontext()


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: values.to(device) for name, values in batch.items()}


def train(act: Act, approach: Approach) -> Run:
    """Train the act's model by the approach, one pass over the examples, measuring the held-out loss on the way."""
    device, dtype = device_and_precision()
    examples, held_out = act.data()
    lengths = [len(ids) for ids in examples]
    plan = approach.plan(lengths, act.minibatch, act.capacity)
    random.Random(0).shuffle(plan)
    model = act.model(device)
    if act.checkpointed:
        model.gradient_checkpointing_enable()
    optimiser = torch.optim.AdamW(model.parameters(), lr=act.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / _WARMUP_STEPS, total_iters=_WARMUP_STEPS - 1)
    run = Run(approach.name, device.type, str(dtype).removeprefix("torch."))
    run.curve.append(Point(0.0, 0, held_out_loss(model, held_out, act.minibatch)))

    def loss_of(batch: Batch) -> Tensor:
        with autocast(device, dtype):
            return model(**to(batch, device)).loss

    def step(indices: Sequence[int]) -> None:
        began = time.perf_counter()
        batch = approach.collate([examples[index] for index in indices])
        optimiser.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimiser.step()
        run.step_losses.append(loss.item())
        run.seconds += time.perf_counter() - began
        schedule.step()
        run.steps += 1
        run.rows += batch["input_ids"].shape[0]
        run.computed_tokens += batch["input_ids"].numel()
        run.real_tokens += sum(lengths[index] for index in indices)

    with isolation(model, approach):
        # Not counted: the first forward and backward of a process, which pay for compilers and allocators.
        warmup = plan[0] if device.type == "cuda" else plan[0][:1]
        loss_of(approach.collate([examples[index] for index in warmup])).backward()
    with tqdm(total=sum(lengths), unit=" tokens", desc=f"{approach.name:<32}", leave=False, disable=None) as bar:
        for part in _parts(plan, lengths, act.evaluations):
            model.train()
            with isolation(model, approach):
                for indices in part:
                    step(indices)
                    bar.update(run.real_tokens - bar.n)
                    bar.set_postfix_str(f"loss {run.step_losses[-1]:.2f}")
            run.curve.append(Point(run.seconds, run.real_tokens, held_out_loss(model, held_out, act.minibatch)))
    run.peak_mb = _peak_mb(device)
    return run


def _parts(plan: list[list[int]], lengths: Sequence[int], count: int) -> list[list[list[int]]]:
    """The plan in at most `count` consecutive parts of about as many tokens each."""
    parts: list[list[list[int]]] = [[] for _ in range(count)]
    done, total = 0, sum(lengths)
    for indices in plan:
        parts[done * count // total].append(indices)
        done += sum(lengths[index] for index in indices)
    return [part for part in parts if part]


@torch.no_grad()
def held_out_loss(model: Any, examples: Examples, minibatch: int) -> float:
    """Mean loss of a token of the examples, each seen alone: packed, however the model was trained."""
    model.eval()
    total, tokens = 0.0, 0
    with packattn.patch(model), autocast(*device_and_precision()):
        for indices in minibatches([len(ids) for ids in examples], minibatch):
            batch = to(pack([examples[index] for index in indices]), model.device)
            predicted = sum(len(examples[index]) - 1 for index in indices)
            total += model(**batch).loss.item() * predicted
            tokens += predicted
    return total / tokens


def _peak_mb(device: torch.device) -> float:
    """The process's largest memory so far, in MB: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
