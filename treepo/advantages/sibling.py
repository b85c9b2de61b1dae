"""A segment's value among its siblings'."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.siblings import finish_siblings
from treepo.advantages.trees import mean_over_leaves
from treepo.algorithm_settings import AdvantageSettings


def sibling(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """A_s = (V(s) - mean over siblings) / (std over siblings + eps), V the mean reward of the
    leaves with a verdict below; an option of TreePO's published code that its paper does not
    report. See :func:`treepo.advantages.siblings.finish_siblings`.
    """
    return finish_siblings(groups, [mean_over_leaves(group) for group in groups], settings)
