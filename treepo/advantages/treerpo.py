"""TreeRPO: siblings, with values that count each branch the same."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.advantages.siblings import finish_siblings
from treepo.advantages.trees import mean_over_children
from treepo.algorithm_settings import AdvantageSettings


def treerpo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """TreeRPO (arXiv 2506.05183): a node's value is the mean of its children's values (a leaf's its
    reward), and A_s = (V(s) - mean over siblings) / (std over siblings + eps). See
    :func:`treepo.advantages.siblings.finish_siblings`.
    """
    return finish_siblings(groups, [mean_over_children(group) for group in groups], settings)
