"""The data side: examples in, packed rows out. It knows nothing of attention."""

from packattn.data.collator import PackingCollator
from packattn.data.packing import PackingPlan, pack, pack_histogram

__all__ = ["PackingCollator", "PackingPlan", "pack", "pack_histogram"]
