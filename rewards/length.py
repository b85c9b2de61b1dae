"""Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13).

With ``L = num_tokens``, the longest response ``L_max`` and a buffer ``B`` before it:

    value = 0                              L <= L_max - B
            factor * ((L_max - B) - L) / B  L_max - B < L <= L_max
            -factor                        L > L_max
"""

from __future__ import annotations

from rewards.records import RewardItem
from rewards.registry import Part, PartResult


def make(max_response_length: int, buffer_length: int, penalty_factor: float = 1.0) -> Part:
    """A part with value in ``[-penalty_factor, 0]``.

    Args:
        max_response_length: ``L_max`` in tokens, of the whole response.
        buffer_length: ``B``: the last tokens before it, over which the penalty grows.
        penalty_factor: the penalty at ``L_max``.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"reward part 'length': buffer_length={buffer_length} must be in "
            f"1..max_response_length ({max_response_length})"
        )
    if not penalty_factor >= 0:
        raise ValueError(f"reward part 'length': penalty_factor={penalty_factor} must be >= 0")

    def length(item: RewardItem) -> PartResult:
        value = overlong_penalty(
            item.num_tokens, max_response_length, buffer_length, penalty_factor
        )
        return PartResult(value=value)

    return length


def overlong_penalty(
    num_tokens: int, max_response_length: int, buffer_length: int, penalty_factor: float
) -> float:
    """The formula above, on one length."""
    excess = num_tokens - (max_response_length - buffer_length)
    return -penalty_factor * min(max(excess / buffer_length, 0.0), 1.0)
