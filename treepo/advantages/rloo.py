"""Leave-one-out over a prompt's responses."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def rloo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """RLOO (arXiv 2402.14740): A_i = R_i - mean(R of the other leaves)
    = n / (n - 1) * (R_i - mean(R)), divided only if asked for. One leaf has advantage 0.
    """
    by_level = [level_advantages(group).root.leave_one_out for group in groups]
    return finish_levels(groups, by_level, settings)
