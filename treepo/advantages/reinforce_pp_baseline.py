"""REINFORCE++ with each prompt's mean as baseline."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def reinforce_pp_baseline(
    groups: Sequence[ScoredTree], settings: AdvantageSettings
) -> list[TreeAdvantages]:
    """REINFORCE++-baseline (arXiv 2501.03262): A_i = (R_i - mean(R of its tree)) / (std + eps), the
    std over all leaves of the batch, whose mean is then 0.

    'leaves' ('auto') is the formula; 'batch' is the same here; 'release' whitens over tokens, as
    verl does; 'tokens' takes the std over them alone.
    """
    return finish_levels(groups, [level_advantages(group).root for group in groups], settings)
