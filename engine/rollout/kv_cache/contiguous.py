"""Keys and values of the sequences being decoded: a slot per sequence, the live slots always a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KVCache:
    """[slots, kv_heads, capacity, d] keys and values per layer: of this rank's layers and heads.

    Live slots stay a prefix, so that a decode step attends over a view: a finished sequence's slot is overwritten by
    the last live one. `lengths` counts the tokens held per slot; during a decode step it includes the new one.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, slots, kv_heads, capacity, head_dim)
        # What is masked takes part all the same (a score plus -inf, a value times 0), so it must at least be finite.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.live = 0
        self._places = torch.arange(capacity, device=device)
        self._slots = torch.arange(slots, device=device)
        self._visible: dict[int | None, Tensor] = {}
        self._span = 0

    def allocate(self, lengths: list[int], copies: list[int]) -> PrefillSlots:
        """Make room behind the live slots: prompt i of `lengths[i]` tokens takes `copies[i]` neighbouring slots."""
        held = torch.tensor(lengths).repeat_interleave(torch.tensor(copies)).to(self.lengths.device)
        first = self.live
        self.lengths[first : first + held.numel()] = held
        self.live += held.numel()
        return PrefillSlots(self, first, copies)

    def begin_step(self) -> None:
        """One more token per live sequence; its place is `lengths - 1` from now on."""
        self.lengths[: self.live] += 1
        held = self.lengths[: self.live]
        self._span = int(held.max())
        self._visible.clear()

    def attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, window: int | None = None) -> Tensor:
        """Append this step's key and value ([live, kv_heads, d]), attend over the last `window` of those held (None:
        over all); returns [live, heads, d]."""
        slots, place = self._slots[: self.live], self.lengths[: self.live] - 1
        keys, values = self.keys[layer], self.values[layer]
        keys[slots, :, place] = k_NHD
        values[slots, :, place] = v_NHD
        out = scaled_dot_product_attention(
            q_NHD.unsqueeze(2),
            keys[: self.live, :, : self._span],
            values[: self.live, :, : self._span],
            attn_mask=self._mask(window),
            enable_gqa=q_NHD.shape[1] != k_NHD.shape[1],
        )
        return out.squeeze(2)

    def _mask(self, window: int | None) -> Tensor:
        # One for all layers of a step that look as far back.
        if window not in self._visible:
            held, places = self.lengths[: self.live, None], self._places[: self._span]
            visible = places < held
            if window is not None:
                visible &= places >= held - window
            self._visible[window] = visible[:, None, None]
        return self._visible[window]

    def free(self, finished: list[int]) -> list[tuple[int, int]]:
        """Drop these slots. Returns the moves (from, to) that kept the live slots a prefix, in order."""
        moves = []
        for slot in sorted(finished, reverse=True):
            self.live -= 1
            last = self.live
            if slot != last:
                held = int(self.lengths[last])
                self.keys[:, slot, :, :held] = self.keys[:, last, :, :held]
                self.values[:, slot, :, :held] = self.values[:, last, :, :held]
                self.lengths[slot] = held
                moves.append((last, slot))
        return moves


@dataclass(frozen=True)
class PrefillSlots:
    """Slots for the prompts of a prefill, from `first` on, to be filled layer by layer."""

    cache: KVCache
    first: int
    copies: list[int]

    def write(self, layer: int, k_THD: Tensor, v_THD: Tensor, lengths: list[int]) -> None:
        """Take over a prefill's keys and values ([T, kv_heads, d])."""
        for held, new in ((self.cache.keys[layer], k_THD), (self.cache.values[layer], v_THD)):
            first = self.first
            for part, copies in zip(new.split(lengths), self.copies, strict=True):
                held[first : first + copies, :, : part.shape[0]] = part.transpose(0, 1)
                first += copies
