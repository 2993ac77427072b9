"""Real token lengths (benchmarks/lengths), and packed streams drawn from them."""

import json
import random
from pathlib import Path

NAMES = {
    "math": "math",
    "short tasks": "evals_tasks",
    "code instructions": "code_instr",
    "functions": "code_defs",
    "whole files": "code_files",
}


def lengths(name: str, longest: int | None = None) -> list[int]:
    """All lengths of a set in data order, capped at `longest` tokens."""
    values = json.loads((Path(__file__).parent / "lengths" / f"{NAMES[name]}.json").read_text())
    return values if longest is None else [min(value, longest) for value in values]


def draw(name: str, tokens: int, longest: int | None = None, seed: int = 0) -> list[int]:
    """Lengths drawn without order until `tokens` are full; the last one is cut to fit."""
    generator, pool = random.Random(seed), lengths(name, longest)
    drawn: list[int] = []
    while (left := tokens - sum(drawn)) > 0:
        drawn.append(min(generator.choice(pool), left))
    return drawn
