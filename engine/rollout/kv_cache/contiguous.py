"""A KV cache with one contiguous slot per sequence. Used slots are always a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KVCache:
    """Keys and values of the running sequences, [layers, slots, kv_heads, capacity, d] each.

    Used slots stay a prefix, so that a decode step attends over a view: the last used slot is copied into a freed one.

    Args:
        layers: indices in the whole model of the layers that this rank holds.
        slots: number of sequences.
        capacity: tokens per slot.
        kv_heads: key/value heads on this rank.
        head_dim: elements per head.
        dtype: of keys and values.
        device: of keys and values.

    Attributes:
        used: number of used slots.
        lengths: [slots] int64, tokens per slot; during a decode step the new token is included.
        row_of_layer: rows of `keys` and `values` by layer index.
    """

    def __init__(
        self,
        layers: Sequence[int],
        slots: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (len(layers), slots, kv_heads, capacity, head_dim)
        # Masked entries still enter the arithmetic (score - inf, 0 * value), so they must be finite.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.used = 0
        self.row_of_layer = {layer: row for row, layer in enumerate(layers)}
        self._offsets = torch.arange(capacity, device=device)
        self._slots = torch.arange(slots, device=device)
        self._mask_of_window: dict[int | None, Tensor] = {}
        self._longest = 0
        self._new_offsets = self.lengths[:0]

    def allocate(self, lengths: list[int], copies: list[int]) -> PrefillSlots:
        """Allocate slots after the used ones: prompt i of `lengths[i]` tokens gets `copies[i]` neighbouring slots."""
        new_lengths = torch.tensor(lengths).repeat_interleave(torch.tensor(copies)).to(self.lengths.device)
        first = self.used
        self.lengths[first : first + new_lengths.numel()] = new_lengths
        self.used += new_lengths.numel()
        return PrefillSlots(self, first, copies)

    def free(self, slots: list[int]) -> list[tuple[int, int]]:
        """Free slots. Returns the moves (from, to) that kept the used slots a prefix, in order."""
        moves = []
        for slot in sorted(slots, reverse=True):
            self.used -= 1
            last = self.used
            if slot != last:
                length = int(self.lengths[last])
                self.keys[:, slot, :, :length] = self.keys[:, last, :, :length]
                self.values[:, slot, :, :length] = self.values[:, last, :, :length]
                self.lengths[slot] = length
                moves.append((last, slot))
        return moves

    def begin_step(self) -> None:
        """Add one token to every used slot; `attend` writes its key and value at offset `lengths - 1`."""
        self.lengths[: self.used] += 1
        self._longest = int(self.lengths[: self.used].max())
        self._new_offsets = self.lengths[: self.used] - 1
        self._mask_of_window.clear()

    def attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, window: int | None = None) -> Tensor:
        """Write a decode step's keys and values, and attend over the sequences so far.

        Args:
            layer: index of the layer in the whole model.
            q_NHD: queries, [used, heads, d].
            k_NHD: keys, [used, kv_heads, d].
            v_NHD: values, [used, kv_heads, d].
            window: how many tokens a token attends to, itself included; None attends to all.

        Returns:
            [used, heads, d].
        """
        row = self.row_of_layer[layer]
        keys, values = self.keys[row], self.values[row]
        slots = self._slots[: self.used]
        keys[slots, :, self._new_offsets] = k_NHD
        values[slots, :, self._new_offsets] = v_NHD
        # The queries of a group are rows of one head: its keys and values are read once, and never copied per query.
        grouped = q_NHD.unflatten(1, (keys.shape[1], -1))
        out = scaled_dot_product_attention(
            grouped,
            keys[: self.used, :, : self._longest],
            values[: self.used, :, : self._longest],
            attn_mask=self._mask(window),
        )
        return out.flatten(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        # All layers of a step with the same window share a mask.
        if window not in self._mask_of_window:
            lengths, offsets = self.lengths[: self.used, None], self._offsets[: self._longest]
            visible = offsets < lengths
            if window is not None:
                visible &= offsets >= lengths - window
            self._mask_of_window[window] = visible[:, None, None]
        return self._mask_of_window[window]


@dataclass(frozen=True)
class PrefillSlots:
    """Slots of a prefill, written layer by layer.

    Attributes:
        cache: the cache.
        first: the first slot.
        copies: number of neighbouring slots of each prompt.
    """

    cache: KVCache
    first: int
    copies: list[int]

    def write(self, layer: int, k_THD: Tensor, v_THD: Tensor, lengths: list[int]) -> None:
        """Write a layer's keys and values of all prompts, [T, kv_heads, d] each, into the slots of their sequences."""
        row = self.cache.row_of_layer[layer]
        for slots, new_THD in ((self.cache.keys[row], k_THD), (self.cache.values[row], v_THD)):
            first = self.first
            for prompt_THD, copies in zip(new_THD.split(lengths), self.copies, strict=True):
                slots[first : first + copies, :, : prompt_THD.shape[0]] = prompt_THD.transpose(0, 1)
                first += copies
