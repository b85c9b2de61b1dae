"""Partial attention results over disjoint sets of keys, merged by log-sum-exp.

With ``L = logsumexp_p L_p``: ``O = sum_p exp(L_p - L) O_p``, in fp32 (fp64 for float64 models), as
in FlashAttention's split-KV reduction (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class MergeTable:
    """Which partial results belong to which query row.

    Args:
        rows: for each partial result, in the order they are computed, the row it belongs to; -1 for
            padding.
        num_rows: number N of query rows; each needs at least one partial result that saw a key.
    """

    def __init__(self, rows: np.ndarray, num_rows: int, device: torch.device) -> None:
        partials = np.flatnonzero(rows >= 0)
        owners = rows[partials]
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=num_rows)
        assert counts.min() > 0, "a query row sees no key"
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.full((int(counts.max()), num_rows), -1, np.int64)
        table[rank, owners[order]] = partials[order]
        absent = table < 0
        self.num_rows = num_rows
        self.table = torch.from_numpy(np.maximum(table, 0)).to(device)  # [P, N]
        self.absent = (
            torch.from_numpy(absent).unsqueeze(-1).to(device) if absent.any() else None
        )  # [P, N, 1]
        # Where a level is one ascending run it is a slice, which saves a copy.
        self.run_starts = [
            int(level[0]) if np.array_equal(level, np.arange(num_rows) + level[0]) else None
            for level in np.maximum(table, 0)
        ]

    @property
    def num_levels(self) -> int:
        """Most partial results of one row."""
        return len(self.run_starts)

    def levels(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[N, ...] each: partial number 0, 1, ... of each row (anything where it has none), from
        ``pieces`` of the partials.
        """
        starts = [i * self.num_rows for i in range(self.num_levels)]
        if len(pieces) == self.num_levels and self.run_starts == starts:
            if all(len(piece) == self.num_rows for piece in pieces):
                return list(pieces)
        partials = torch.cat(tuple(pieces)) if len(pieces) > 1 else pieces[0]
        return [self._level(partials, i) for i in range(self.num_levels)]

    def _level(self, partials: torch.Tensor, level: int) -> torch.Tensor:
        start = self.run_starts[level]
        if start is not None:
            return partials[start : start + self.num_rows]
        return partials.index_select(0, self.table[level])


def merge_partials(
    outputs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    table: MergeTable,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge each query row's partial results.

    Args:
        outputs: pieces of [M, H, D], all partial results.
        lses: pieces of [M, H], their log-sum-exps; -inf where a partial saw no key.
        sinks: [H], logits that take weight and give no value; they join once.

    Returns:
        [N, H, D] in the outputs' dtype.
    """
    parts = table.levels(outputs)
    dtype = parts[0].dtype
    if len(parts) == 1 and sinks is None:
        return parts[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = [lse.to(wide) for lse in table.levels(lses)]
    if table.absent is not None:
        logits = [
            lse.masked_fill(gone, float("-inf"))
            for lse, gone in zip(logits, table.absent, strict=True)
        ]
    if len(parts) == 2 and sinks is None:
        return _merge_two(parts, logits, wide).to(dtype)
    if sinks is not None:
        logits.append(sinks.to(wide).expand(table.num_rows, -1))
    weights = torch.softmax(torch.stack(logits), dim=0).unsqueeze(-1)
    merged = parts[0].to(wide) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=False):  # the sinks have no part
        merged.addcmul_(part.to(wide), weight)
    return merged.to(dtype)


def _merge_two(
    parts: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], wide: torch.dtype
) -> torch.Tensor:
    """The usual case, in three operations: the second's weight is sigmoid(L_b - L_a)."""
    weight = torch.sigmoid(lses[1] - lses[0]).unsqueeze(-1)
    return torch.lerp(parts[0].to(wide), parts[1].to(wide), weight)
