"""What the tree kernels do, item by item in plain operations: fast enough for whole engines, where
Triton's interpreter is not."""

from __future__ import annotations

import torch

NEGATIVE = float("-inf")


def attend(query, keys, values, work, variant):
    """See ``rollout.attention.triton_tree.attend``."""
    num_rows, heads, _ = query.shape
    groups = heads // keys.shape[1]
    partials = torch.full((work.num_partials, heads, values.shape[2]), torch.nan)
    lses = torch.full((work.num_partials, heads), torch.nan)
    for items, tile in ((work.small, 16), (work.large, 64)):
        for span, low, high, first, base, offset, start, row, rows in items.tolist():
            if span < 0:
                continue
            high = min(high, int(work.lengths[span]))
            slots = work.slots[offset + low : offset + high].long()
            depth = start + torch.arange(low, max(low, high))
            for stacked in range(first, min(first + tile, rows * groups)):
                for kv_head in range(keys.shape[1]):
                    r, head = row + stacked // groups, kv_head * groups + stacked % groups
                    position = int(work.positions[r])
                    score = (
                        keys[slots, kv_head].float() @ query[r, head].float()
                    ) * variant.scaling
                    if variant.softcap is not None:
                        score = variant.softcap * torch.tanh(score / variant.softcap)
                    hidden = depth > position
                    if variant.window is not None:
                        hidden |= depth <= position - variant.window
                    score = score.masked_fill(hidden, NEGATIVE)
                    place = base + stacked // groups, head
                    lses[place] = torch.logsumexp(score, 0) if len(score) else NEGATIVE
                    weights = torch.softmax(score, 0).nan_to_num()
                    partials[place] = weights @ values[slots, kv_head].float()
    result = torch.zeros(num_rows, heads, values.shape[2], dtype=query.dtype)
    for r in range(num_rows):
        mine = work.order[work.row_start[r] : work.row_start[r + 1]].long()
        if not len(mine):
            continue
        logits = lses[mine]
        if variant.sinks is not None:
            logits = torch.cat([logits, variant.sinks.float()[None]])
        weights = torch.softmax(logits, 0)[: len(mine)]
        result[r] = (weights.unsqueeze(-1) * partials[mine]).sum(0).to(query.dtype)
    return result
