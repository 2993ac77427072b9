"""The data side: examples in, packed rows out. It knows nothing of attention."""

from packattn.data.balance import Cost
from packattn.data.collator import PackingCollator
from packattn.data.packing import PackingPlan, pack, pack_histogram
from packattn.data.sampler import BalancedPackingSampler

__all__ = ["BalancedPackingSampler", "Cost", "PackingCollator", "PackingPlan", "pack", "pack_histogram"]
