"""GRPO: each response against all of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def grpo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """GRPO (arXiv 2402.03300): A_i = (R_i - mean(R)) / (std(R) + eps) over the tree's leaves.

    ``norm_adv_by_std_in_grpo=False`` leaves the division out; other normalisations than 'tree' are
    those of :func:`treepo.advantages.treepo` with the root's level alone. One leaf has advantage 0.
    """
    return finish_levels(groups, [level_advantages(group).root for group in groups], settings)
