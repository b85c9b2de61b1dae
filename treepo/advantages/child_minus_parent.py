"""A segment's value less its parent's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo.advantages.finish import finish_segments
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import mean_over_leaves
from treepo.algorithm_settings import AdvantageSettings


def child_minus_parent(
    groups: Sequence[ScoredTree], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """A_s = V(s) - V(parent of s), V the mean reward of the leaves with a verdict below; an option
    of TreePO's published code that its paper does not report.

    Parents are TreePO's segments: where one carries on another without a fork its advantage is 0,
    and credit falls on the first segment after a fork alone (``spo`` shares it out).
    """
    advantages = []
    for group in groups:
        values = mean_over_leaves(group)
        parents = np.array([max(segment.parent, 0) for segment in group.tree.segments])
        advantages.append(values - values[parents])
    return finish_segments(groups, advantages, settings)
