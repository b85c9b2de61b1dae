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

    def level(self, partials: torch.Tensor, level: int) -> torch.Tensor:
        """[N, ...]: partial number ``level`` of each row (anything where it has none)."""
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
    output = torch.cat(tuple(outputs)) if len(outputs) > 1 else outputs[0]
    levels = table.table.shape[0]
    if levels == 1 and sinks is None:
        return table.level(output, 0)
    lse = torch.cat(tuple(lses)) if len(lses) > 1 else lses[0]
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    logits = torch.stack([table.level(lse, i) for i in range(levels)]).to(wide)  # [P, N, H]
    if table.absent is not None:
        logits = logits.masked_fill(table.absent, float("-inf"))
    if sinks is not None:
        extra = sinks.to(wide).expand(1, table.num_rows, -1)
        logits = torch.cat([logits, extra])
    weights = torch.softmax(logits, dim=0).unsqueeze(-1)
    merged = table.level(output, 0).to(wide) * weights[0]
    for i in range(1, levels):
        merged.addcmul_(table.level(output, i).to(wide), weights[i])
    return merged.to(output.dtype)
