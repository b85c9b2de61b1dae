"""TreePO's advantage: the plain average over levels."""

from __future__ import annotations

from collections.abc import Sequence

from treepo.advantages.levels import finish_levels, level_advantages
from treepo.advantages.records import ScoredTree, TreeAdvantages
from treepo.algorithm_settings import AdvantageSettings


def treepo(groups: Sequence[ScoredTree], settings: AdvantageSettings) -> list[TreeAdvantages]:
    """TreePO (arXiv 2508.17445, Eq. 5): Â_i = sum over j in J_i of Â_ij / (|J_i| * std).

    J_i: the root's level always, and each level below at which leaf i has company (groups of one
    are skipped, as in the published code). The paper leaves open what the std ranges over: 'tree',
    over all Â_ij of the tree, leaves and levels together ('auto'; a tree that forks at the prompt
    alone then gives GRPO), 'batch' over those of the batch, or the others of
    ``treepo/advantages/normalisation.py``; 'release' is what the published code does.

    The baselines are biased in two ways. A leaf is part of its own means, which shrinks Â_ij by
    (n - 1) / n in a group of n: by half in a pair (``treepo_loo`` takes it out). And leaves of one
    tree are correlated; the fallback also favours prefixes whose continuations end early, so that
    means are of the paths that were sampled, not of the policy.
    """
    return finish_levels(groups, [level_advantages(group) for group in groups], settings)
