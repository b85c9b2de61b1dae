"""TreePO's advantage with large groups weighing more."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def treepo_size_weighted(
    groups: Sequence[ScoredTree], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """TreePO, Eq. 6: Â_i = sum_j |G_ij| Â_ij / (sum_j |G_ij| * std) over the levels of
    :func:`treepo.advantages.treepo`. |G_ij| counts leaves with a verdict; the std is that of the
    Â_ij, unweighted. The paper found it worse than the average.
    """
    by_level = [level_advantages(group) for group in groups]
    averages = [levels.averages(levels.sizes) for levels in by_level]
    return finish_levels(groups, by_level, settings, averages)
