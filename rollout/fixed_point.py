"""Probabilities as integers, and draws from them by the inverse of the cumulative distribution.

A float64 in [4, 8) is a multiple of 2^-50. So ``probability + 6`` is the probability rounded to
that grid, and the bits of the sum, read as an integer, are a constant (``BIAS``) plus the
probability in units of 2^-50. Integers add up to the same sum in any order: the cumulative weights
of a row are the same on every device, for every block size and in any company. What two devices
can differ in is the last bit of a float64 ``exp``, about 2^-53 of a probability, so that a draw
differs with a chance of about 2^-53 times the number of tokens that matter.

A token of probability below 2^-51 has weight 0; together such tokens have less than 2^-33 of the
probability in a vocabulary of 2^18. The uniform itself is a multiple of 2^-53.
"""

from __future__ import annotations

import struct

import torch

UNIT = 2.0**-50
_OFFSET = 6.0
BIAS = struct.unpack("<q", struct.pack("<d", _OFFSET))[0]


def biased_weights(probs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [N, V]: ``BIAS`` plus each probability in units of 2^-50.

    Args:
        probs: float64 [N, V], each in [0, 1].
        out: float64 [N, V], memory that may be overwritten.
    """
    return torch.add(probs, _OFFSET, out=out).view(torch.int64)


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor, *, bias: int = 0) -> torch.Tensor:
    """The first column whose cumulative weight exceeds ``uniform`` of the row's total.

    Sums of blocks are taken first, then one block is searched.

    Args:
        weights: int64 [N, V], each ``bias`` more than a weight >= 0; no row's weights add up to 0
            or to 2^53 and more.
        uniform: float64 [N] in (0, 1).

    Returns:
        int64 [N]; never a column of weight 0 (any column if the weights are not as above).
    """
    columns = weights.shape[1]
    size = 1 << (columns.bit_length() // 2)
    sums = _block_sums(weights, size, bias)
    cumulative = sums.cumsum(1)
    total = cumulative[:, -1:]
    # Below the total, though the product may round up to it.
    target = torch.minimum((uniform.unsqueeze(1) * total).long(), total - 1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    target = target - cumulative.gather(1, block) + sums.gather(1, block)
    members = block * size + torch.arange(size, device=weights.device)
    if columns % size:  # columns behind the last one repeat it, behind its turn
        members = members.clamp_(max=columns - 1)
    inside = (weights.gather(1, members) - bias).cumsum(1)
    found = torch.searchsorted(inside, target, right=True).clamp_(max=size - 1)
    return members.gather(1, found).squeeze(1)


def _block_sums(weights: torch.Tensor, size: int, bias: int) -> torch.Tensor:
    """int64 [N, ceil(V / size)], the weights of each ``size`` columns in a row; the biases add up
    to a known number, modulo 2^64 as everything here.
    """
    columns = weights.shape[1]
    whole = columns - columns % size
    sums = weights[:, :whole].unflatten(1, (-1, size)).sum(2) - _wrapped(size * bias)
    if whole == columns:
        return sums
    rest = weights[:, whole:].sum(1, keepdim=True) - _wrapped((columns - whole) * bias)
    return torch.cat([sums, rest], dim=1)


def _wrapped(number: int) -> int:
    """``number`` modulo 2^64 as a signed 64-bit integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
