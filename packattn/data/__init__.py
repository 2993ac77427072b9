"""The data side: examples in, packed rows out. It knows nothing of attention."""

from packattn.data.collator import PackingCollator

__all__ = ["PackingCollator"]
