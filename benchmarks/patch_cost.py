"""What a patch costs where it saves nothing: `python -m benchmarks.patch_cost`.

A model as it is against a patched copy, forward and backward on the same batch without packing (rows of one length, no
position_ids), in turns. Random weights; `--profile` says where the host's time of a patched step goes. On a CPU the
seconds are those of the process, not of the clock, so that other work on the machine counts little.
"""

import argparse
import copy
import cProfile
import pstats
import statistics
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import packattn

CONFIGS = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
    # That of HuggingFaceTB/SmolLM2-135M.
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


def step(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    cuda = input_ids.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    model.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    begin = clock()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin


def compare(plain: PreTrainedModel, patched: PreTrainedModel, input_ids: Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds of a step as it is and patched, of runs in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):
        for times, model in zip(seconds, (plain, patched), strict=True):
            found = step(model, input_ids)
            if repeat >= 2:  # the first runs compile and allocate
                times.append(found)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a row (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="the functions of a patched step that take the longest")
    given = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    for name in given.models:
        plain = LlamaForCausalLM(LlamaConfig(**CONFIGS[name])).to(given.device, dtype).train()
        patched = copy.deepcopy(plain)
        packattn.patch(patched)
        size = CONFIGS[name]["vocab_size"]
        input_ids = torch.randint(3, size, (given.rows, given.tokens), device=given.device)
        before, after = compare(plain, patched, input_ids, given.repeats)
        print(
            f"{name:>5}, {given.rows} x {given.tokens} tokens: {before * 1e3:.2f} ms as it is, {after * 1e3:.2f} ms "
            f"patched, {after / before:.3f} of it, {(after - before) * 1e3:+.2f} ms"
        )
        if given.profile:
            profile = cProfile.Profile()
            with profile:
                for _ in range(given.repeats):
                    step(patched, input_ids)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
