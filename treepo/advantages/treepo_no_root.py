"""TreePO's advantage without the comparison over the whole tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def treepo_no_root(
    groups: Sequence[ScoredTree], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """TreePO's ablation: Eq. 5 over levels j >= 1 alone. A leaf that has company at the root only
    (a flat tree's, or one that a fallback started at the prompt) has advantage 0. The paper found
    it comparable.
    """
    by_level = [level_advantages(group) for group in groups]
    below = [levels.only(np.arange(levels.values.shape[1]) > 0) for levels in by_level]
    return finish_levels(groups, below, settings)
