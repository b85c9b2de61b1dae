"""SPO: what a segment changes in the value."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.finish import finish_segments
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.trees import fork_above, mean_over_leaves
from treepo.algorithm_settings import AdvantageSettings


def spo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Segment Policy Optimization (arXiv 2505.23564): A_s = V(end of s) - V(start of s).

    V: mean reward of the leaves with a verdict below. A segment in the paper's sense runs from fork
    to fork, since nothing in between says more about its value: several of TreePO's segments
    without a fork share V(end) - V(start) of them together. On every path the advantages of its
    runs add up to R_i - V(root). The paper's mask of improbable tokens is not part of this.
    """
    advantages = []
    for group in groups:
        values = mean_over_leaves(group)
        advantages.append(values - values[fork_above(group)])
    return finish_segments(groups, advantages, settings)
