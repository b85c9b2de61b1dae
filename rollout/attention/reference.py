"""The oracle: one dense mask over every slot in use, softmax in fp32 (fp64 for float64 models).

Slow and obvious. It shares no code with the per-node back end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout.attention.base import Block, LayerVariant


class ReferencePlan:
    """See the module.

    Attributes:
        slots: int64 [S], every slot some row sees.
        visible: bool [N, S].
        distance: int64 [N, S], position of the row less position of the key.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        index: dict[int, int] = {}  # slot -> column
        depths: list[int] = []
        seen: list[list[int]] = []  # columns each row sees
        positions: list[int] = []
        for block in blocks:
            above = [
                self._column(index, depths, int(slot), node.start + i)
                for node in block.node.path()[:-1]
                for i, slot in enumerate(node.slots)
            ]
            own = [
                self._column(index, depths, int(slot), block.node.start + i)
                for i, slot in enumerate(block.node.slots[: block.stop])
            ]
            for row in range(block.start, block.stop):
                seen.append(above + own[: row + 1])
                positions.append(block.node.start + row)
        visible = torch.zeros(len(seen), len(depths), dtype=torch.bool)
        for row, columns in enumerate(seen):
            visible[row, columns] = True
        self.visible = visible.to(device)
        self.slots = torch.tensor(list(index), dtype=torch.int64, device=device)
        self.distance = torch.from_numpy(np.subtract.outer(positions, depths)).to(device)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        groups = query.shape[1] // keys.shape[1]
        key = keys[self.slots].to(wide).repeat_interleave(groups, dim=1)  # [S, H, Dk]
        value = values[self.slots].to(wide).repeat_interleave(groups, dim=1)
        scores = torch.einsum("nhd,shd->hns", query.to(wide), key) * variant.scaling
        if variant.softcap is not None:
            scores = torch.tanh(scores / variant.softcap) * variant.softcap
        visible = self.visible
        if variant.window is not None:
            visible = visible & (self.distance < variant.window)
        scores = scores.masked_fill(~visible, float("-inf"))
        if variant.sinks is not None:
            sinks = variant.sinks.to(wide).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        return torch.einsum("hns,shd->nhd", weights, value).to(query.dtype)

    @staticmethod
    def _column(index: dict[int, int], depths: list[int], slot: int, depth: int) -> int:
        if slot not in index:
            index[slot] = len(depths)
            depths.append(depth)
        return index[slot]
