"""The store of keys and values: one slot a token, handed out as extents.

Layer ``i`` has ``keys [slots, Hkv, Dk]`` and ``values [slots, Hkv, Dv]``, sized from the first keys
and values seen (multi-head latent attention has Dv != Dk). The page size is one slot, so a path may
be forked or cut anywhere without copying. Slots are handed out in runs that are as contiguous as
the free space allows, so that most of what a node holds is a plain view.

One slot past the end takes the writes of padding and of recomputed tokens; nobody reads it.
"""

from __future__ import annotations

import bisect

import numpy as np
import torch

MAX_EXTENT = 64  # slots a growing node reserves at a time


class KVPool:
    """Allocator of slots and the tensors behind them."""

    def __init__(self, num_slots: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.num_slots = num_slots
        self.trash_slot = num_slots
        self.device = device
        self.dtype = dtype
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._starts: list[int] = [0]  # free runs, ascending, never adjacent
        self._lengths: list[int] = [num_slots]
        self.num_free = num_slots

    @property
    def num_held(self) -> int:
        return self.num_slots - self.num_free

    @property
    def bytes_per_slot(self) -> int:
        """Bytes one token takes over all layers (0 until the first forward)."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(t[0].numel() * t.element_size() for t in tensors)

    def allocate(self, count: int, *, at_end: bool = False) -> np.ndarray | None:
        """``count`` slots (int64, ascending runs; one run where there is one), or None when fewer
        are free.

        Args:
            at_end: from the end of the pool. Growing segments go there, so that they lie side by
                side, not between prompts of any length.
        """
        if count > self.num_free:
            return None
        order = range(len(self._lengths))
        for i in reversed(order) if at_end else order:
            if self._lengths[i] >= count:
                return self._take(i, count, at_end=at_end)
        pieces = []
        while count:
            piece = self._take(0, min(count, self._lengths[0]))
            pieces.append(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def allocate_after(self, slot: int, count: int) -> np.ndarray | None:
        """``count`` slots, adjacent to ``slot`` if they are free, elsewhere otherwise."""
        i = bisect.bisect_left(self._starts, slot + 1)
        if i < len(self._starts) and self._starts[i] == slot + 1 and self._lengths[i] >= count:
            return self._take(i, count)
        return self.allocate(count)

    def free(self, slots: np.ndarray) -> None:
        """Give slots back. Giving back a free slot is a programming error."""
        if not len(slots):
            return
        ordered = np.sort(slots)
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        bounds = [0, *breaks.tolist(), len(ordered)]
        for lo, hi in zip(bounds[:-1], bounds[1:], strict=True):
            self._give(int(ordered[lo]), hi - lo)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """Store ``key [N, Hkv, Dk]`` and ``value [N, Hkv, Dv]`` at ``slots [N]``.

        Returns:
            the layer's (keys, values) tensors, trash slot included.
        """
        if layer not in self.keys:
            self.keys[layer] = self._store(key)
            self.values[layer] = self._store(value)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def _store(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros [slots + 1, Hkv, D]. On a CPU a head's rows lie side by side in memory: with few
        queries the fused product is bound by reading keys, which it does head by head.
        """
        _, heads, width = like.shape
        if like.device.type == "cpu":
            return like.new_zeros(heads, self.num_slots + 1, width).transpose(0, 1)
        return like.new_zeros(self.num_slots + 1, heads, width)

    def release_memory(self) -> None:
        """Drop the tensors (they come back, empty, at the next write)."""
        self.keys.clear()
        self.values.clear()

    def free_runs(self) -> list[tuple[int, int]]:
        """Free space as (start, length), ascending."""
        return list(zip(self._starts, self._lengths, strict=True))

    def _take(self, i: int, count: int, *, at_end: bool = False) -> np.ndarray:
        start, length = self._starts[i], self._lengths[i]
        if count == length:
            del self._starts[i], self._lengths[i]
        else:
            self._lengths[i] = length - count
            if at_end:
                start += length - count
            else:
                self._starts[i] = start + count
        self.num_free -= count
        return np.arange(start, start + count, dtype=np.int64)

    def _give(self, start: int, count: int) -> None:
        i = bisect.bisect_left(self._starts, start)
        before = i > 0 and self._starts[i - 1] + self._lengths[i - 1]
        after = self._starts[i] if i < len(self._starts) else self.num_slots
        overlaps = (before is not False and before > start) or start + count > after
        assert not overlaps and start >= 0, f"slots {start}..{start + count - 1} are already free"
        joins_left = i > 0 and before == start
        joins_right = i < len(self._starts) and after == start + count
        if joins_left and joins_right:
            self._lengths[i - 1] += count + self._lengths[i]
            del self._starts[i], self._lengths[i]
        elif joins_left:
            self._lengths[i - 1] += count
        elif joins_right:
            self._starts[i] = start
            self._lengths[i] += count
        else:
            self._starts.insert(i, start)
            self._lengths.insert(i, count)
        self.num_free += count
