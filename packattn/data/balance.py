"""Spread the examples of one optimiser step over ranks and micro-steps, so that no rank waits for another."""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What a packed example costs: `per_token * tokens + per_square * tokens ** 2`.

    Attributes:
        per_token: the work of all matrix products, in any unit.
        per_square: the work of attention, in the same unit.
    """

    per_token: float = 1.0
    per_square: float = 0.0

    def of_length(self, length: int) -> float:
        """The cost of an example of `length` tokens."""
        return self.per_token * length + self.per_square * length * length

    @classmethod
    def of_model(cls, config: Any) -> "Cost":
        """Multiplications per token and per pair of tokens of a decoder, from a Hugging Face configuration.

        Counts the projections, the MLP (of a mixture of experts: the experts that a token visits) and the output
        layer; attention is causal, so half of the square. Training multiplies both alike.

        Args:
            config: has hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size and, where
                they differ from the usual, num_key_value_heads, head_dim, num_experts_per_tok, moe_intermediate_size.
        """
        text = getattr(config, "text_config", config)
        hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        experts = getattr(text, "num_experts_per_tok", None) or 1
        width = (getattr(text, "moe_intermediate_size", None) if experts > 1 else None) or text.intermediate_size
        projections = 2 * hidden * head_dim * (heads + kv_heads)
        per_token = layers * (projections + 3 * experts * hidden * width) + hidden * text.vocab_size
        return cls(1.0, layers * heads * head_dim / per_token)


class _Part:
    """The examples of one micro-batch or rank, with their tokens and their cost."""

    __slots__ = ("cost", "items", "tokens")

    def __init__(self) -> None:
        self.items: list[int] = []
        self.tokens, self.cost = 0, 0.0

    def add(self, item: int, tokens: int, cost: float) -> None:
        self.items.append(item)
        self.tokens += tokens
        self.cost += cost


def assign(
    lengths: Sequence[int], cost: Cost, ranks: int, micro_steps: int, budget: int | None
) -> list[list[list[int]]] | None:
    """Micro-batches for every rank: `[micro_step][rank]`, indices into `lengths`, none of them empty.

    Costs are spread over the ranks by the longest-processing-time rule (Graham, 1969), then each rank's share over
    micro-steps of common targets, so that the slowest ranks of a micro-step are alike.

    Args:
        lengths: tokens of each example, at least ranks * micro_steps of them, none longer than the budget.
        budget: tokens that a micro-batch may hold. None: any number.

    Returns:
        None if the examples do not fit into that many micro-steps.
    """
    costs = [cost.of_length(length) for length in lengths]
    return _spread(lengths, costs, ranks, micro_steps, budget) or _fill(lengths, costs, ranks, micro_steps, budget)


def micro_step_costs(lengths: Sequence[int], cost: Cost, micro_batches: list[list[list[int]]]) -> list[list[float]]:
    """The cost of every micro-batch, `[micro_step][rank]`."""
    return [[sum(cost.of_length(lengths[item]) for item in items) for items in ranks] for ranks in micro_batches]


def _spread(
    lengths: Sequence[int], costs: list[float], ranks: int, micro_steps: int, budget: int | None
) -> list[list[list[int]]] | None:
    """First over the ranks, then over the micro-steps: the best balance."""
    heavy_first = sorted(range(len(lengths)), key=lambda item: (-costs[item], item))
    shares = [[] for _ in range(ranks)]  # type: list[list[int]]
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in heavy_first:
        load, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + costs[item], rank))
    # A rank with one huge example still needs something for its other micro-steps: the lightest there is.
    while len(poorest := min(shares, key=len)) < micro_steps:
        giver = max((share for share in shares if len(share) > micro_steps), key=len)
        poorest.append(giver.pop())
    targets = _targets(costs, shares, micro_steps)
    micro_batches: list[list[list[int]]] = [[] for _ in range(micro_steps)]
    for share in shares:
        parts = [_Part() for _ in range(micro_steps)]
        for place, item in enumerate(share):
            empty = sum(not part.items for part in parts)
            open_ = [
                (part.cost - targets[at], at)
                for at, part in enumerate(parts)
                if (budget is None or part.tokens + lengths[item] <= budget)
                and (not part.items or empty < len(share) - place)
            ]
            if not open_:
                return None
            parts[min(open_)[1]].add(item, lengths[item], costs[item])
        for at, part in enumerate(parts):
            micro_batches[at].append(part.items)
    return micro_batches


def _targets(costs: list[float], shares: list[list[int]], micro_steps: int) -> list[float]:
    """The cost that each micro-step should have on every rank: equal, but for examples that are larger than that."""
    left = max(sum(costs[item] for item in share) for share in shares)
    targets = []
    for at in range(micro_steps):
        largest = max(costs[share[at]] for share in shares)
        targets.append(max(largest, left / (micro_steps - at)))
        left = max(left - targets[-1], 0.0)
    return targets


def _fill(
    lengths: Sequence[int], costs: list[float], ranks: int, micro_steps: int, budget: int | None
) -> list[list[list[int]]] | None:
    """By tokens over all micro-batches at once, where the budget is tight; micro-batches of like cost run together."""
    parts = [_Part() for _ in range(ranks * micro_steps)]
    emptiest = [(0, at) for at in range(len(parts))]
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, at = emptiest[0]
        if budget is not None and tokens + lengths[item] > budget:
            return None
        parts[at].add(item, lengths[item], costs[item])
        heapq.heapreplace(emptiest, (tokens + lengths[item], at))
    parts.sort(key=lambda part: -part.cost)
    return [[part.items for part in parts[at : at + ranks]] for at in range(0, len(parts), ranks)]
