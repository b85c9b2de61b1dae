"""Which groups carry a signal (dynamic sampling of DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo.advantages.records import ScoredTree

SPREAD_TOLERANCE = 1e-9  # rewards that differ by less are the same


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterCounts:
    """What :func:`filter_groups` saw. ``num_kept`` may be 0: then there is nothing to learn from
    and the update is to be skipped.
    """

    num_groups: int
    num_kept: int
    num_zero_std: int  # groups with verdicts that are all the same (a single one is)
    num_without_verdict: int  # groups whose every verdict failed

    @property
    def frac_reward_zero_std(self) -> float:
        return self.num_zero_std / self.num_groups if self.num_groups else 0.0


def filter_groups(
    groups: Sequence[ScoredTree], metric: str = "score"
) -> tuple[list[ScoredTree], FilterCounts]:
    """Drop the groups that carry no signal: those whose verdicts are all the same by ``metric``
    ('score' or 'acc').
    """
    spreads = [has_spread(group, metric) for group in groups]
    without = sum(not group.valid.any() for group in groups)
    kept = [group for group, spread in zip(groups, spreads, strict=True) if spread]
    counts = FilterCounts(
        num_groups=len(groups),
        num_kept=len(kept),
        num_zero_std=len(groups) - len(kept) - without,
        num_without_verdict=without,
    )
    return kept, counts


def has_spread(group: ScoredTree, metric: str = "score") -> bool:
    """Whether two verdicts of the group differ."""
    values = (group.rewards if metric == "score" else group.correct.astype(float))[group.valid]
    return len(values) > 1 and bool(np.ptp(values) > SPREAD_TOLERANCE)
