"""Packed micro-batches and their balance over ranks; imports numpy, torch and the C++ extension only."""

from icegrt.packing.balance import Plan, Share, balance
from icegrt.packing.batch import PackedBatch, pack, unpack

__all__ = ["PackedBatch", "Plan", "Share", "balance", "pack", "unpack"]
