"""What advantages are divided by, by name.

| name | divisor |
|---|---|
| tree | std of the estimator's values in the tree, plus eps |
| batch | the same over the batch, plus eps |
| leaves | std of the leaves' advantages over the batch, plus eps |
| tokens | std over the batch's trained tokens, a shared one counted once a leaf, plus eps |
| release | sqrt(variance over the same tokens + 1e-8), after their mean is subtracted |
| none | 1 |

All standard deviations have Bessel's correction (as verl's GRPO). Only 'release', which is what
TreePO's published code does, shifts advantages: under it a leaf of average reward may get one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WHITEN_EPS = 1e-8  # of normalisation 'release': added to the variance


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RawAdvantages:
    """Advantages of one tree's N leaves, or N segments, before they are divided."""

    advantage: np.ndarray  # float64 [N]
    counts: np.ndarray  # bool [N], which have a verdict
    num_tokens: np.ndarray  # int64 [N], trained tokens that take it, a shared one once a leaf
    spread: np.ndarray  # float64 [any], the values that 'tree' and 'batch' look at


def normalise(raw: Sequence[RawAdvantages], normalisation: str, eps: float) -> list[np.ndarray]:
    """Divide the batch's advantages (see the module); float64 [N] of each tree."""
    values = [of_tree.advantage for of_tree in raw]
    if normalisation == "none" or not raw:
        return values
    if normalisation == "tree":
        return [v / (std(of_tree.spread) + eps) for v, of_tree in zip(values, raw, strict=True)]
    if normalisation == "batch":
        divisor = std(np.concatenate([of_tree.spread for of_tree in raw])) + eps
    elif normalisation == "leaves":
        divisor = std(np.concatenate([t.advantage[t.counts] for t in raw])) + eps
    else:
        mean, variance = moments_over_tokens(raw)
        if normalisation == "release":
            return [(v - mean) / np.sqrt(variance + WHITEN_EPS) for v in values]
        assert normalisation == "tokens", normalisation
        divisor = np.sqrt(variance) + eps
    return [v / divisor for v in values]


def std(values: np.ndarray) -> float:
    """Standard deviation with Bessel's correction; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def moments_over_tokens(raw: Sequence[RawAdvantages]) -> tuple[float, float]:
    """Mean and variance (Bessel) of the advantage over all trained tokens of the batch. The tokens
    of an entry have one advantage, so that numbers of tokens are enough.
    """
    values = np.concatenate([of_tree.advantage for of_tree in raw])
    tokens = np.concatenate([of_tree.num_tokens for of_tree in raw])
    total = max(int(tokens.sum()), 1)
    mean = float((tokens * values).sum()) / total
    variance = float((tokens * (values - mean) ** 2).sum()) / max(total - 1, 1)
    return mean, variance
