"""From rewards of a tree's leaves to advantages of its nodes; one estimator a file.

An estimator sees a whole batch of groups (one prompt's tree each), since some normalisations span
the batch: ``estimator(groups, settings) -> one TreeAdvantages per group``. Leaves without a verdict
stay out of every baseline and get weight 0. All arithmetic is in float64.

Your own estimator goes in by path and ends in :func:`spread_over_leaves` (one advantage a leaf) or
:func:`spread_over_segments` (one a segment).
"""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.child_minus_parent import child_minus_parent
from treepo.advantages.dr_grpo import dr_grpo
from treepo.advantages.filtering import SPREAD_TOLERANCE, FilterCounts, filter_groups, has_spread
from treepo.advantages.finish import spread_over_leaves, spread_over_segments
from treepo.advantages.grpo import grpo
from treepo.advantages.levels import LevelAdvantages, level_advantages
from treepo.advantages.normalisation import WHITEN_EPS, std
from treepo.advantages.records import Estimator, ScoredTree, TreeAdvantages, scored_tree
from treepo.advantages.reinforce_pp import reinforce_pp
from treepo.advantages.reinforce_pp_baseline import reinforce_pp_baseline
from treepo.advantages.rloo import rloo
from treepo.advantages.sibling import sibling
from treepo.advantages.spo import spo
from treepo.advantages.tree_grpo import tree_grpo
from treepo.advantages.treepo import treepo
from treepo.advantages.treepo_drop_degenerate import treepo_drop_degenerate
from treepo.advantages.treepo_loo import treepo_loo
from treepo.advantages.treepo_no_root import treepo_no_root
from treepo.advantages.treepo_size_weighted import treepo_size_weighted
from treepo.advantages.treerl import treerl
from treepo.advantages.treerpo import treerpo
from treepo.advantages.trees import leaf_ancestors, leaf_num_tokens, sum_over_leaves_below
from treepo.algorithm_settings import ADVANTAGES, AdvantageSettings

__all__ = [
    "ADVANTAGES", "SPREAD_TOLERANCE", "WHITEN_EPS", "AdvantageSettings", "Estimator",
    "FilterCounts", "LevelAdvantages", "ScoredTree", "TreeAdvantages", "child_minus_parent",
    "dr_grpo", "estimate", "filter_groups", "grpo", "has_spread", "leaf_ancestors",
    "leaf_num_tokens", "level_advantages", "reinforce_pp", "reinforce_pp_baseline", "rloo",
    "scored_tree", "sibling", "spo", "spread_over_leaves", "spread_over_segments", "std",
    "sum_over_leaves_below", "tree_grpo", "treepo", "treepo_drop_degenerate", "treepo_loo",
    "treepo_no_root", "treepo_size_weighted", "treerl", "treerpo",
]  # fmt: skip


def estimate(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """Advantages of a batch by the estimator that the settings name.

    Raises:
        ValueError: no such estimator.
    """
    estimator: Estimator = ADVANTAGES.get(settings.adv_estimator)
    return estimator(groups, settings)
