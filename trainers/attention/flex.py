"""Attention over a packed row by FlexAttention: one compiled kernel, blocks that nobody sees left
out (arXiv 2412.05496). For CUDA; without compiling it is a plain function of any device.

Which of the row's blocks of 128 x 128 pairs hold visible ones, and which are visible throughout, is
worked out from the blocks' extremes, so no mask over all pairs is ever made: with query block i
behind key block j, the first query of i sees a key of j iff j's largest ``visible_until`` lies
behind it, and all of i see all of j iff j's smallest reaches i's end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from trainers.attention.variant import Variant

BLOCK = 128

# torch's flex_attention, compiled or not
Flex = Callable[..., Any]


@functools.cache
def compiled() -> Flex:
    """The fused kernel; compiled on the first call, for each kind of layer."""
    function: Flex = torch.compile(flex_attention)
    return function


class FlexMasks:
    """The block masks of a row by window, made once for all layers.

    Args:
        visible_until, positions: int64 [T].
    """

    def __init__(
        self, visible_until: np.ndarray, positions: np.ndarray, device: torch.device
    ) -> None:
        num_tokens = len(visible_until)
        self.padding = -num_tokens % BLOCK  # tokens that see themselves alone
        alone = np.arange(num_tokens + 1, num_tokens + self.padding + 1)
        self._visible_until = np.concatenate([visible_until, alone])
        self._positions = np.concatenate([positions, np.zeros(self.padding, np.int64)])
        self._device = device
        self._made: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """Of a layer with this window (in tokens; None: sees everything before it)."""
        if window not in self._made:
            self._made[window] = self._make(window)
        return self._made[window]

    def num_pairs(self, window: int | None) -> int:
        """In all blocks that are computed."""
        some, _ = visible_blocks(self._visible_until, self._positions, window)
        return int(some.sum()) * BLOCK**2

    def _make(self, window: int | None) -> BlockMask:
        some, whole = visible_blocks(self._visible_until, self._positions, window)
        visible_until = torch.from_numpy(self._visible_until).to(self._device)
        positions = torch.from_numpy(self._positions).to(self._device)

        def is_visible(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            seen = (key <= query) & (query < visible_until[key])
            if window is not None:
                seen = seen & (positions[query] - positions[key] < window)
            return seen

        num_tokens = len(self._visible_until)
        return BlockMask.from_kv_blocks(
            *self._listed(some & ~whole),
            *self._listed(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=is_visible,
            seq_lengths=(num_tokens, num_tokens),
        )

    def _listed(self, blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(int32 [1, 1, N] how many key blocks of each query block, int32 [1, 1, N, N] which)."""
        counts = torch.from_numpy(blocks.sum(1).astype(np.int32))
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        return counts.to(self._device)[None, None], torch.from_numpy(order).to(self._device)[
            None, None
        ]


def visible_blocks(
    visible_until: np.ndarray, positions: np.ndarray, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [N, N] query blocks by key blocks that may hold visible pairs, those that hold nothing
    else), for rows of whole blocks. Without a window the first is exact; with one it may name
    blocks in which each of the two rules leaves something, but no pair passes both.
    """
    until, depth = (array.reshape(-1, BLOCK) for array in (visible_until, positions))
    start = np.arange(len(until)) * BLOCK
    behind = start[:, None] > start
    some = behind & (until.max(1) > start[:, None])
    whole = behind & (until.min(1) >= start[:, None] + BLOCK)
    if window is not None:
        some &= depth.min(1)[:, None] - depth.max(1) < window
        whole &= depth.max(1)[:, None] - depth.min(1) < window
    return some | np.eye(len(until), dtype=bool), whole


def flex_tree_attention(
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    masks: FlexMasks,
    variant: Variant,
    flex: Flex | None = None,
) -> torch.Tensor:
    """[1, T, H, Dv].

    Args:
        flex: None: the compiled kernel.
    """
    num_tokens = query.shape[2]
    if masks.padding:
        query, key, value = (F.pad(s, (0, 0, 0, masks.padding)) for s in (query, key, value))
    softcap = variant.softcap

    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    found = (flex or compiled())(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=masks.mask(variant.window),
        scale=variant.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if variant.sinks is None else AuxRequest(lse=True),
    )
    if variant.sinks is not None:
        # A sink is one more score: it takes its share of the probability and has no value.
        found, aux = found
        share = torch.sigmoid(aux.lse - variant.sinks.to(aux.lse.dtype)[:, None])
        found = found * share.unsqueeze(-1).to(found.dtype)
    output: torch.Tensor = found
    return output[:, :, :num_tokens].transpose(1, 2)
