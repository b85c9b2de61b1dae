"""The exact quantile of values that lie on several ranks, without gathering them.

Numbers >= 0 in float32 are ordered as their bit patterns are as integers. So two counts of 16 bits
each, added up over ranks, find the value of any rank in the order: the first counts the upper 16
bits and finds in which of 32,768 intervals it lies, the second the lower 16 bits within that one.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

_HALF = 1 << 16


def global_quantile(values: torch.Tensor, q: float) -> float:
    """Smallest value that at least the share ``q`` of all ranks' values does not exceed
    (``numpy.quantile(method="inverted_cdf")``); 0 if there are none, NaN counts as largest.
    Collective.

    Args:
        values: float32 [m] of this rank, each >= 0.
    """
    assert values.dtype == torch.float32 and 0 < q <= 1
    bits = values.abs().contiguous().view(torch.int32).long()
    upper = _summed(torch.bincount(bits >> 16, minlength=_HALF))
    count = int(upper.sum())
    if count == 0:
        return 0.0
    wanted = max(1, math.ceil(q * count))  # the wanted value's place in the order, from 1
    high, before = _place(upper, wanted)
    within = bits[bits >> 16 == high] & (_HALF - 1)
    low, _ = _place(_summed(torch.bincount(within, minlength=_HALF)), wanted - before)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _place(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the value at place ``wanted``, and how many values stand in bins before it."""
    running = counts.cumsum(0)
    at = int((running < wanted).sum())
    return at, int(running[at - 1]) if at else 0


def _summed(counts: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts
