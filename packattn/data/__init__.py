"""The data side: examples in, packed rows out. It knows nothing of attention."""

from packattn.data.balance import Cost
from packattn.data.collator import PackingCollator
from packattn.data.counts import Counts, count_examples
from packattn.data.dataset import PackedDataset, PackRows, pack_dataset
from packattn.data.packing import pack, pack_histogram
from packattn.data.plan import PackingPlan, Piece
from packattn.data.report import PackingReport, packing_report
from packattn.data.sampler import BalancedPackingSampler
from packattn.data.stream import PackedStream

__all__ = [
    "BalancedPackingSampler",
    "Cost",
    "Counts",
    "PackRows",
    "PackedDataset",
    "PackedStream",
    "PackingCollator",
    "PackingPlan",
    "PackingReport",
    "Piece",
    "count_examples",
    "pack",
    "pack_dataset",
    "pack_histogram",
    "packing_report",
]
