"""The dropout of attention probabilities: the same integer bits on every backend for the same seed.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one call for each score:
key = the two halves of the seed, counter = (query index, key index, query head, 0), first output word.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def keep(seed: Tensor, query: Tensor, key: Tensor, head: Tensor, dropout_p: float) -> Tensor:
    """Which scores survive: bool, of the broadcast shape of the int64 index tensors query, key and head."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1, c2, c3 = query.long(), key.long(), head.long(), torch.zeros((), dtype=torch.int64, device=seed.device)
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0 >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """Words below it are dropped."""
    return round(dropout_p * 2**32)


def _multiply(value: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    product = value * constant  # wraps in int64, whose bits are those of the unsigned product
    return (product >> 32) & _LOW, product & _LOW
