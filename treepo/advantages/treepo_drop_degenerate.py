"""TreePO's advantage without the groups that say nothing."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.filtering import SPREAD_TOLERANCE
from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def treepo_drop_degenerate(
    groups: Sequence[ScoredTree], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """TreePO, Eq. 7: Eq. 5 over the levels at which the rewards of G_ij differ (std > 0). Levels
    left out count neither in |J_i| nor in the std. The paper found that it hurts.
    """
    by_level = [level_advantages(group) for group in groups]
    kept = [levels.only(levels.std > SPREAD_TOLERANCE) for levels in by_level]
    return finish_levels(groups, kept, settings)
