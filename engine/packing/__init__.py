"""Pack sequences into micro-batches and balance them over ranks. Imports numpy, torch and the C++ extension only."""

from icegrt.packing.balance import Plan, Share, balance
from icegrt.packing.batch import PackedBatch, pack, unpack

__all__ = ["PackedBatch", "Plan", "Share", "balance", "pack", "unpack"]
